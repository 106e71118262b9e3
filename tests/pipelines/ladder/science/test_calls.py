"""Calls: what one leaves, that the next goes on or does nothing, and what is refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pipelines.ladder.plans.repfusion import REPFUSION
from pipelines.ladder.science.bench import Workbench
from pipelines.ladder.science.export import copy_folder, export
from pipelines.ladder.science.feed import Feed
from pipelines.ladder.science.memory import NotEnoughMemory, check_memory
from pipelines.ladder.science.plan import SciencePlan, asked_plan, read_plan
from pipelines.ladder.science.results import FILE, read_results
from pipelines.ladder.science.session import Clock, fix_steps, run_call, shortfalls
from pipelines.ladder.science.training import Training
from repfusion.config import load_config
from repfusion.foundation.config import FoundationConfig
from repfusion.foundation.deadline import OutOfTime
from repfusion.llm.load import load_language_model
from repfusion.request import Request
from repfusion.runs.checkpoint import load_checkpoint
from repfusion.scenes.world import BASE_COLOURS, BASE_SHAPES

DEVICE = torch.device("cpu")
SLOW_ROWS = ("repfusion_tuned", "text_embed", "repfusion_vae")


@pytest.fixture
def bench(asked) -> Workbench:
    plan = read_plan(asked.out)
    assert plan is not None
    return Workbench(asked.out / "foundation", plan, DEVICE, asked.out)


@pytest.mark.slow
def test_a_call_leaves_a_line_with_everything_the_plan_asks_for(asked):
    (line,) = read_results(asked.out / FILE)
    plan = read_plan(asked.out)
    assert plan is not None
    assert (line.row, line.seed, line.status, line.num_steps) == ("repfusion", 0, "ok", 6)
    assert line.budget == plan.digest and set(line.foundation) >= {"llava", "language", "vae", "decoder"}
    for scores in (line.scores, line.half):
        values = scores["values"]
        assert {"overall", "strict_position", "position_floor", "strict_position_floor"} <= set(values)
        assert scores["intervals"]["overall"]["low"] <= values["overall"]
        assert values["position_floor"] == pytest.approx(1 / 3)
    assert len(line.paired) == 6
    for losses in line.paired.values():
        assert set(losses["wrong"]) == set(losses["none"])
        assert set(losses["wrong"]) == {"colour", "shape", "count", "direction", "axis", "swap"}
    assert line.curve[-1][0] == 6 and line.steps_per_sec and line.num_trained and line.num_frozen
    assert "by_noise_level" in line.perception
    assert not list((asked.out / "states").glob("*.safetensors"))


def test_averaged_weights_are_a_checkpoint_to_generate_from(asked):
    model = load_checkpoint(asked.out / "rows" / "repfusion-0")
    assert model.config.conditioning.method == "noisy_latents"


def test_a_second_call_does_nothing(asked):
    before = {path: path.stat().st_mtime_ns for path in asked.out.rglob("*") if path.is_file()}
    said: list[str] = []
    assert run_call(asked, said.append)
    assert said == ["all 1 rows are done"]
    after = {path: path.stat().st_mtime_ns for path in asked.out.rglob("*") if path.is_file()}
    changed = {path.name for path in after.keys() | before.keys() if before.get(path) != after.get(path)}
    assert changed <= {".lock", "foundation.json"}


@pytest.mark.slow
def test_its_modules_load_neither_ray_nor_mlflow_nor_deepspeed():
    code = (
        "import sys\n"
        "for name in ('ray', 'mlflow', 'deepspeed'):\n"
        "    sys.modules[name] = None\n"
        "from pipelines.ladder.science import __main__, export, session, table\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_another_row_runs_without_ray_mlflow_and_deepspeed(asked, tmp_path):
    """The command line, in a process of its own."""
    out = tmp_path / "out"
    shutil.copytree(asked.out, out)
    code = (
        "import sys; from pipelines.ladder.science.__main__ import main\n"
        "assert main() == 0\n"
        "print('loaded', sorted({'ray', 'mlflow', 'deepspeed'} & set(sys.modules)))"
    )
    words = ["--config", str(asked.config), "--out", str(out), "--rows", "text_embed", "--seeds", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, *asked.overrides], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert [(one.row, one.seed) for one in read_results(out / FILE)] == [("repfusion", 0), ("text_embed", 1)]
    assert "`text_embed`" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    "row", ["repfusion", *(pytest.param(row, marks=pytest.mark.slow) for row in SLOW_ROWS)]
)
def test_a_row_that_was_cut_off_goes_on_to_the_same_weights(bench, tmp_path, row):
    def train(name: str, num_calls: int) -> Training:
        for call in range(num_calls):
            training = bench.training(row, 0, tmp_path / name)
            if call + 1 < num_calls:
                with pytest.raises(OutOfTime, match=f"{call + 1} of 6 steps are done"):
                    training.run(lambda: {"found": "half"}, until=0.0)
        training.run(lambda: {"found": "half"})
        return training

    whole, cut = train("whole", 1), train("cut", 4)
    for name, average in whole.averages().items():
        assert torch.equal(average, cut.averages()[name]), name
        assert torch.equal(whole.named[name], cut.named[name]), name
    assert cut.progress.curve == whole.progress.curve and cut.progress.half == {"found": "half"}


def test_the_state_of_another_training_is_refused(bench, tmp_path):
    with pytest.raises(OutOfTime):
        bench.training("repfusion", 0, tmp_path / "state").run(dict, until=0.0)
    with pytest.raises(ValueError, match="the state of another training"):
        bench.training("static_queries", 0, tmp_path / "state")
    bench.plan = bench.plan.model_copy(update={"lr": 0.1})
    with pytest.raises(ValueError, match="the state of another training"):
        bench.training("repfusion", 0, tmp_path / "state")


def test_averaged_weights_are_in_the_model_for_the_length_of_a_block(bench, tmp_path):
    training = bench.training("static_queries", 0, tmp_path / "state")
    training.run(dict)
    own = {name: p.detach().clone() for name, p in training.named.items()}
    with training.averaged():
        for name, average in training.averages().items():
            assert torch.equal(training.named[name], average)
    assert all(torch.equal(training.named[name], value) for name, value in own.items())


@pytest.mark.parametrize("row", ["repfusion", "static_queries", "text_embed"])
def test_a_model_reads_captions_as_it_reads_requests(bench, row, tmp_path):
    """Padded ids or states that were computed ahead, in the place of what the library's collation makes."""
    training = bench.training(row, 0, tmp_path / "state")
    training.run(dict)  # at first the denoiser's output is zero
    model, feed, captions = training.model, training.feed, bench.pictures.captions
    tokenizer = model.conditioner.llm.tokenizer
    texts = [tokenizer.decode(list(ids)).strip() for ids in captions.ids[:8]]
    assert texts[0] == "" and all(texts[1:])
    inputs = feed.inputs(0, 3)
    inputs = {name: inputs[name][:8] for name in ("features", "t", "noise")}
    ours = model({**inputs, "request": feed.request(torch.arange(8))})
    request = model.conditioner.collate([Request(text) for text in texts], ["full"] * 8)
    torch.testing.assert_close(ours["velocity"], model({**inputs, "request": request})["velocity"])


def test_rows_of_one_seed_see_the_same(bench):
    space, captions = bench.space("rae"), bench.pictures.captions
    inputs = [
        Feed(bench.model(row, 3), space, captions, bench.plan).inputs(3, 5)
        for row in ("repfusion", "static_queries")
    ]
    for name in ("features", "t", "noise"):
        assert torch.equal(inputs[0][name], inputs[1][name])
    assert torch.equal(inputs[0]["request"]["prefix"].ids, inputs[1]["request"]["prefix"].ids)
    other = Feed(bench.model("repfusion", 3), space, captions, bench.plan).inputs(3, 6)
    assert not torch.equal(inputs[0]["t"], other["t"])


def test_a_foundation_part_that_was_cut_off_goes_on(foundation_yaml, tmp_path, asked):
    """Every call of no seconds does a chunk of scenes or a step."""
    out = tmp_path / "out"
    shutil.copytree(asked.out / "foundation" / "llava", out / "foundation" / "llava")
    (out / "foundation" / "llava" / "model.safetensors").unlink()
    call = replace(asked, out=out, seconds=0.0)
    said: list[str] = []
    for _ in range(3):
        assert not run_call(call, said.append)
    assert [line.partition(": ")[2] for line in said] == [
        f"perception: {done} of 3 steps are done; call again to go on" for done in (1, 2)
    ] + ["judgement: 1 of 3 steps are done; call again to go on"]
    for name in ("vision_tower", "decoder"):
        whole, cut = (
            load_file(str(one / "foundation" / name / "model.safetensors")) for one in (asked.out, out)
        )
        if name == "vision_tower":
            assert all(torch.equal(whole[key], cut[key]) for key in whole)
        assert whole.keys() == cut.keys()


def test_another_foundation_plan_or_device_is_refused(asked, foundation_yaml, tmp_path):
    with pytest.raises(ValueError, match=r"plan.json: fixed with batch_size 8, asked for 16; choose another"):
        run_call(replace(asked, overrides=[*asked.overrides, "batch_size=16"]), print)
    other = tmp_path / "other.yaml"
    other.write_text(foundation_yaml.read_text().replace("text_width: 32", "text_width: 64"))
    with pytest.raises(ValueError, match="made with other text_width; choose another folder"):
        run_call(replace(asked, config=other), print)
    if not torch.cuda.is_available():
        other.write_text("device: cuda\n")
        with pytest.raises(ValueError, match="torch sees no GPU here; give --config"):
            run_call(replace(asked, config=other), print)


def test_an_estimate_that_is_too_large_says_what_fits():
    check_memory(1e9, 1e6, 100, 2e9, "a row")
    with pytest.raises(
        NotEnoughMemory, match=r"a row takes about 1\.9 GiB .* 1\.4 GiB .* batch_size=500 would"
    ):
        check_memory(1e9, 1e6, 1000, 1.5e9, "a row")
    with pytest.raises(NotEnoughMemory, match="no batch of any size would fit"):
        check_memory(1e9, 1e6, 1000, 0.5e9, "a row")


@pytest.mark.slow
def test_steps_follow_from_the_slowest_rows_rate(asked, tmp_path):
    plan = read_plan(asked.out)
    assert plan is not None
    bench = Workbench(
        asked.out / "foundation", plan.model_copy(update={"num_steps": 0, "dits": {}}), DEVICE, asked.out
    )
    fixed = fix_steps(bench, 0.5, lambda line: None)
    assert set(fixed.rates) == {"static_queries_wide", "repfusion_tuned", "repfusion_large"}
    assert fixed.num_steps == max(1, min(1750, int(0.5 * min(fixed.rates.values()))))
    assert fixed.dits.keys() == {"static_queries_wide", "text_embed_wide"}
    assert fixed.digest == fixed.model_copy(update={"rates": {}}).digest != plan.digest


def test_the_plan_is_that_of_the_page():
    assert sum(row.num_seeds for row in REPFUSION.listed) == 100
    order = REPFUSION.in_order(tuple(REPFUSION.rows))
    assert order[:2] == [("repfusion", 0), ("static_queries", 0)] and order[28] == ("repfusion", 1)
    assert {name for name, seed in order if seed == 4} == {
        *("repfusion", "static_queries", "timestep_queries", "repfusion_noise_taught"),
        *("static_queries_noise_taught", "repfusion_language", "static_queries_language"),
        "repfusion_noise_taught_bidirectional",
    }
    plan = asked_plan(
        load_config(FoundationConfig, {"device": "cuda", "num_scenes": 7}), ["suite.num_prompts=12"]
    )
    assert (plan.batch_size, plan.num_scenes, plan.suite.split) == (512, 7, "train")
    assert not plan.suite.include_new and plan.suite.num_prompts == 12
    assert (plan.world.shapes, plan.world.colours) == (BASE_SHAPES, BASE_COLOURS)
    assert (plan.world.jitter, plan.world.relation_share, plan.sampler.guidance_scale) == (0.5, 0.5, 4.0)
    assert plan.world == SciencePlan().world


def test_a_call_keeps_time_back_to_close_but_never_more_than_half():
    clock = Clock(540.0)
    assert clock.until - clock.began == pytest.approx(510)
    assert Clock(20.0).until - Clock(20.0).began == pytest.approx(10, abs=0.1)
    clock.reserve(1000.0, "long work")  # in the first half anything is begun
    clock.began -= 500
    with pytest.raises(OutOfTime, match="long work takes about 60 s"):
        clock.reserve(60.0, "long work")


def test_what_a_foundation_lacks_is_named():
    good = {"train": {"colour": 0.99, "swap": 0.98}, "caption_loss": 1.0}
    quality = {name: dict(good) for name in ("llava", "llava_noise_taught", "llava_large")}
    quality["language"] = {"caption_loss": 1.01}
    assert not any(shortfalls(quality).values())
    quality["llava_large"] = {"train": {"colour": 0.5, "swap": 0.98}, "caption_loss": 1.0}
    assert shortfalls(quality)["llava_large"] == ("llava_large perceives of clean images colour 0.500",)
    assert shortfalls(quality)["llava"] == ()
    quality["language"] = {"caption_loss": 1.03}
    assert "caption losses differ by more than 2%" in shortfalls(quality)["llava"][0]


def test_an_export_holds_small_files_that_have_everything(asked, tmp_path):
    export(asked.out, tmp_path, ("repfusion",), (0, 1), most_bytes=60_000_000)
    assert (
        load_checkpoint(tmp_path / "rows" / "repfusion-0").config.mllm == asked.out / "foundation" / "llava"
    )
    assert (tmp_path / FILE).read_bytes() == (asked.out / FILE).read_bytes()
    folder = tmp_path / "foundation" / "llava"
    copy_folder(asked.out / "foundation" / "llava", folder, most_bytes=70_000)
    assert max(path.stat().st_size for path in folder.glob("*.safetensors")) <= 70_000
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    whole = load_file(str(asked.out / "foundation" / "llava" / "model.safetensors"))
    assert index["weight_map"].keys() == whole.keys()
    for key, name in index["weight_map"].items():
        assert torch.equal(load_file(str(folder / name))[key], whole[key])
    load_language_model(folder)
    with pytest.raises(ValueError, match=r"tensor .* alone takes"):
        export(asked.out, tmp_path, (), (), most_bytes=20_000)
