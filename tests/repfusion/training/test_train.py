"""The loop: exact resume, one rank equals two, what is trained and what is not, and clear errors."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from programs import torchrun
from safetensors.torch import load_file
from tiny_training import (
    GRID,
    WIDTH,
    make_columns,
    make_foundation,
    npy,
    scan_and_replace,
    tiny_data,
    tiny_model,
    tiny_train,
    write_tar,
)

from repfusion.config import ConfigError, load_config
from repfusion.data.columns import scan_tar
from repfusion.data.mixture import Mixture
from repfusion.data.recipe import Recipe
from repfusion.devices import placing
from repfusion.diffusion.flow import FlowConfig
from repfusion.flops import train_flops
from repfusion.lineage.describe import read_lineage
from repfusion.runs.folder import complete_checkpoints, latest_checkpoint, step_of
from repfusion.train import TrainConfig, build_trainable, train
from repfusion.training.engine import NonFiniteError
from repfusion.training.meters import Report


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("training")
    return make_foundation(root / "weights"), make_columns(root / "data")


class Interrupted(Exception):
    pass


def weights(config: TrainConfig, name: str = "model") -> dict[str, torch.Tensor]:
    folder = latest_checkpoint(config.output_dir / "checkpoints")
    assert folder is not None
    return load_file(folder / f"{name}.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("zero_stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_four_steps_equal_two_and_two_bit_for_bit(world, tmp_path: Path, zero_stage: int):
    reports: dict[str, list[Report]] = {"whole": [], "parts": []}
    whole = tiny_train(*world, tmp_path / "whole", {"zero_stage": zero_stage, "micro_batch_size": 4})
    train(whole, on_report=reports["whole"].append)

    def interrupt(folder: Path, step: int, seconds: float) -> None:
        raise Interrupted

    parts = whole.model_copy(update={"output_dir": tmp_path / "parts"})
    with pytest.raises(Interrupted):
        train(parts, on_checkpoint=interrupt, on_report=reports["parts"].append)
    assert [folder.name for folder in complete_checkpoints(parts.output_dir / "checkpoints")] == [
        "step_00000002"
    ]
    summary = train(parts, on_report=reports["parts"].append)

    assert summary["resumed_at_step"] == 2
    assert_same(weights(whole), weights(parts))
    assert_same(weights(whole, "ema"), weights(parts, "ema"))
    for a, b in zip(reports["whole"], reports["parts"], strict=True):
        assert (a.step, a.loss, a.grad_norm, a.lr) == (b.step, b.loss, b.grad_norm, b.lr)
    loop = json.loads((tmp_path / "parts/checkpoints/step_00000004/resume/loop.json").read_text())
    assert (loop["step"], loop["position"]) == (4, 32)


def test_a_finished_training_does_nothing_and_says_the_same(world, tmp_path: Path):
    config = tiny_train(*world, tmp_path)
    assert train(config) == train(config)


@pytest.mark.slow
def test_micro_batches_equal_one_full_batch(world, tmp_path: Path):
    whole, parts = (
        tiny_train(*world, tmp_path / "a"),
        tiny_train(*world, tmp_path / "b", {"micro_batch_size": 2}),
    )
    train(whole), train(parts)
    a, b = weights(whole), weights(parts)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=5e-4, msg=name)


def trained_on_ranks(config: TrainConfig, path: Path, num_ranks: int) -> dict:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    torchrun(num_ranks, "-m", "repfusion.train", path)
    return json.loads((config.output_dir / "train.json").read_text())


@pytest.mark.slow
def test_torchrun_starts_two_ranks_that_equal_one(world, tmp_path: Path):
    one = tiny_train(*world, tmp_path / "one")
    train(one)
    two = tiny_train(*world, tmp_path / "two", {"micro_batch_size": 4})
    summary = trained_on_ranks(two, tmp_path / "two.yaml", 2)
    assert summary["world_size"] == 2
    a, b = weights(one), weights(two)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=5e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "conditioning", ["noisy_latents", pytest.param("text_embed", marks=pytest.mark.slow)]
)
def test_activations_computed_again_change_nothing(world, tmp_path: Path, conditioning: str):
    foundation, columns = world
    model = tiny_model(foundation, conditioning)
    data = tiny_data(columns)
    kinds = ("none", "selective", "full")
    for kind in kinds:
        engine = {"activation_checkpointing": kind}
        train(tiny_train(*world, tmp_path / kind, engine, model=model, data=data, num_steps=2))
    kept, *others = (weights(tiny_train(*world, tmp_path / kind)) for kind in kinds)
    for again in others:
        assert_same(kept, again)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "full"},
        {"reads_prompts_apart": True},
        {"zero_stage": 3, "frozen": "sharded"},
    ],
    ids=str,
)
def test_compiled_blocks_train_as_the_others_do(world, tmp_path: Path, changes: dict):
    """In a process of its own: the shape checks that tests run under cannot be compiled."""
    losses = []
    for compiled in (False, True):
        engine = {"compile": compiled, **(changes if compiled else {})}
        config = tiny_train(*world, tmp_path / str(compiled), engine, num_steps=2)
        (path := tmp_path / f"{compiled}.json").write_text(config.model_dump_json())
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "repfusion.train", str(path)]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert found.returncode == 0, found.stderr[-3000:]
        assert "cannot be compiled" not in found.stderr
        losses.append(json.loads((config.output_dir / "train.json").read_text())["final_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_a_report_says_how_it_goes(world, tmp_path: Path):
    reports: list[Report] = []
    config = tiny_train(*world, tmp_path, log_every_steps=2, num_steps=4, condition_dropout=0.0)
    train(config, on_report=reports.append)
    assert [(one.step, one.samples_seen, one.epochs) for one in reports] == [(2, 16, 0.8), (4, 32, 1.6)]
    for report in reports:
        assert 0 <= report.data_wait <= 1 and report.memory_gib > 0.1 and report.mfu is None
        assert report.samples_per_sec * report.step_sec == pytest.approx(8)
        assert set(report.loss_by_noise) <= {"0.0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0"}
        low, high = min(report.loss_by_noise.values()), max(report.loss_by_noise.values())
        assert low <= report.loss <= high
        assert "train/loss_at_t/0.0-0.2" in report.metrics()
    generator = build_trainable(config, Mixture.open(config.data, config.model.columns))
    num_tokens = 4.0  # three words and the begin token; every other sample has a caption of four words too
    rate = reports[0].tflops * 1e12 / reports[0].samples_per_sec
    assert train_flops(generator, num_tokens) < rate < train_flops(generator, num_tokens + 1)


@pytest.mark.slow
def test_a_checkpoint_knows_where_it_comes_from(world, tmp_path: Path):
    config = tiny_train(*world, tmp_path / "run", tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    train(config)
    found = read_lineage(tmp_path / "run/checkpoints/step_00000002")
    assert found is not None
    run = json.loads((tmp_path / "run/mlflow_run.json").read_text())
    assert (found["run_id"], found["tracking_uri"], found["step"]) == (run["run_id"], run["uri"], 2)
    assert found["datasets"]["main"]["image_features"]["folder"] == str(config.data.columns["image_features"])


@pytest.mark.parametrize("conditioning", ["noisy_latents", "text_embed"])
def test_what_trains_and_what_is_frozen(world, tmp_path: Path, conditioning: str):
    foundation, columns = world
    model = tiny_model(foundation, conditioning)
    data = tiny_data(columns)
    config = tiny_train(*world, tmp_path, model=model, data=data)
    dataset = Mixture.open(config.data, config.model.columns)
    fresh = build_trainable(config, dataset)
    before = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    train(config)
    trained = weights(config)
    fixed = fresh.fixed_state()
    assert all(torch.equal(trained.pop(name), fixed[name]) for name in fixed)
    assert trained.keys() == fresh.trainable_state().keys()
    assert not any("language_model" in name for name in trained)
    unchanged = [name for name, value in trained.items() if torch.equal(before[name], value)]
    assert unchanged == []
    if conditioning == "noisy_latents":
        assert any("projector" in name for name in trained)


@pytest.mark.slow
def test_one_batch_is_learned_by_heart(world, tmp_path: Path):
    """Of Gaussian latents, with t uniform, no model that knows the distribution alone gets below pi / 2."""
    root = make_columns(tmp_path / "data", num_samples=8)
    losses: list[float] = []
    config = tiny_train(
        world[0],
        root,
        tmp_path / "out",
        {"weight_decay": 0.0, "micro_batch_size": 32},
        model=tiny_model(world[0]).model_copy(update={"flow": FlowConfig(base_dim=GRID**2 * WIDTH)}),
        num_steps=400,
        checkpoint_every_steps=400,
        global_batch_size=32,
        condition_dropout=0.0,
    )
    train(config, on_report=lambda report: losses.append(report.loss))
    assert np.mean(losses[-50:]) < 0.7 * np.pi / 2


def test_it_continues_from_a_base_with_the_base_s_statistics(world, tmp_path: Path):
    base = tiny_train(*world, tmp_path / "base")
    train(base)
    other = make_columns(tmp_path / "data", num_samples=8, seed=5)
    folder = tmp_path / "base/checkpoints/step_00000004"
    given = {
        "output_dir": tmp_path / "tuned",
        "init_from": str(folder),
        "num_steps": 2,
        "global_batch_size": 8,
    }
    given |= {"data": tiny_data(other)}
    config = TrainConfig.model_validate({**given, "engine": base.engine, "model": {"mllm_dtype": "float32"}})
    assert config.model == base.model  # not given: the checkpoint's
    seen: list[int] = []
    train(config, on_checkpoint=lambda path, step, seconds: seen.append(step))
    assert seen == [0, 2]
    start = config.output_dir / "checkpoints/step_00000000"
    assert_same(load_file(folder / "ema.safetensors"), load_file(start / "model.safetensors"))
    assert_same(load_file(folder / "statistics.safetensors"), load_file(start / "statistics.safetensors"))

    shifted = config.model_copy(
        update={
            "output_dir": tmp_path / "shifted",
            "model": config.model.model_copy(
                update={"flow": config.model.flow.model_copy(update={"base_dim": 8})}
            ),
        }
    )
    with pytest.raises(ValueError, match=r"trained with model\.flow base_dim=4096, the run has base_dim=8"):
        train(shifted)
    encoder = config.model.encoder.model_copy(update={"layer": -1})
    last = config.model.model_copy(update={"encoder": encoder})
    with pytest.raises(ValueError, match=r"\(layer, image_size, num_frames\) \(-2, \d+, None\)"):
        train(config.model_copy(update={"output_dir": tmp_path / "last", "model": last}))
    wider = config.model.model_copy(update={"dit": config.model.dit.model_copy(update={"hidden_size": 32})})
    with pytest.raises(
        ValueError, match=r"does not fit the model: .*\(24, .*expected \(32.*dit\.hidden_size 24, expected 32"
    ):
        train(config.model_copy(update={"output_dir": tmp_path / "wider", "model": wider}))


def test_a_sample_that_is_not_finite_is_named_and_nothing_is_updated(world, tmp_path: Path):
    root = make_columns(tmp_path / "data", num_samples=8)
    bad = np.zeros((GRID**2, WIDTH), np.float16)
    bad[1, 2] = np.nan
    scan_and_replace(root / "image_features" / "00000.tar", "000003.image_features.npy", npy(bad))
    config = tiny_train(world[0], root, tmp_path / "out")
    with pytest.raises(NonFiniteError, match=r"step 0: the loss is not finite.*Samples: 000003\."):
        train(config)
    assert complete_checkpoints(config.output_dir / "checkpoints") == []


def test_features_of_another_encoder_are_refused(world, tmp_path: Path):
    root = make_columns(tmp_path / "data", num_samples=8, width=8)
    with pytest.raises(ValueError, match=r"features \(4, 8\), the encoder .* gives \(4, 16\)"):
        train(tiny_train(world[0], root, tmp_path / "out"))


def test_a_changed_seed_cannot_resume(world, tmp_path: Path):
    config = tiny_train(*world, tmp_path)
    train(config)
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        train(config.model_copy(update={"seed": 1, "num_steps": 6}))


def test_auto_precision_is_for_good_that_of_the_machine_where_a_run_began(world, tmp_path: Path, monkeypatch):
    engine = {"precision": "auto"}
    for steps, has in ((1, True), (2, False)):
        monkeypatch.setattr(placing, "multiplies_bf16", lambda _, has=has: has)
        train(tiny_train(*world, tmp_path / "parts", engine, num_steps=steps, checkpoint_every_steps=1))
    train(tiny_train(*world, tmp_path / "whole", {"precision": "bf16"}, num_steps=2))
    one, two = (tiny_train(*world, tmp_path / name, num_steps=2) for name in ("parts", "whole"))
    assert_same(weights(one), weights(two))


def test_optimizer_state_is_kept_for_the_last_checkpoints_alone(world, tmp_path: Path):
    config = tiny_train(*world, tmp_path, checkpoint_every_steps=1, keep_resume=2)
    train(config)
    kept = [(folder / "resume").exists() for folder in complete_checkpoints(tmp_path / "checkpoints")]
    assert kept == [False, False, True, True]


def test_checkpoints_that_nobody_needs_are_removed(world, tmp_path: Path):
    config = tiny_train(
        *world, tmp_path, checkpoint_every_steps=1, num_steps=9, keep_last=2, keep_every_steps=4
    )

    def pin(folder: Path, step: int, seconds: float) -> None:
        (folder / "pins").mkdir()
        match step:
            case 1:  # an evaluation at work
                (folder / "pins" / "evaluation").touch()
            case 2:  # one that died two days ago
                (folder / "pins" / "evaluation").touch()
                os.utime(folder / "pins" / "evaluation", (time.time() - 2 * 86400,) * 2)
            case 3:
                (folder / "pins" / "best").touch()
                os.utime(folder / "pins" / "best", (time.time() - 2 * 86400,) * 2)

    train(config, on_checkpoint=pin)
    kept = [step_of(folder) for folder in complete_checkpoints(tmp_path / "checkpoints")]
    assert kept == [1, 3, 4, 8, 9]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_the_command_line_overrides_the_file_and_a_typo_names_its_key(world, tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tiny_train(*world, tmp_path).model_dump(mode="json")))
    assert load_config(TrainConfig, path, ["engine.lr=0.5", "num_steps=7"]).engine.lr == 0.5
    with pytest.raises(ConfigError, match=r"engine\.learning_rate"):
        load_config(TrainConfig, path, ["engine.learning_rate=0.5"])
    assert load_config(TrainConfig, path, []) == tiny_train(*world, tmp_path)


def write_caption(columns: Path, key: str, caption: str, variants: list[str] = []) -> None:  # noqa: B006
    """Gives a sample of `make_columns` another caption."""
    shard = next(path for path in (columns / "curate").glob("*.tar") if f"{key}.txt" in scan_tar(path))
    members: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as archive:
        for one in archive:
            stem, _, extension = one.name.partition(".")
            stream = archive.extractfile(one)
            assert stream is not None
            members.setdefault(stem, {})[extension] = stream.read()
    members[key] |= {"txt": caption.encode(), "json": json.dumps({"captions": variants}).encode()}
    write_tar(shard, list(members.items()))


@pytest.mark.parametrize("where", ["caption", "variant"])
def test_a_caption_that_does_not_fit_is_named_before_the_first_step(world, tmp_path, where):
    """Also one that the steps of this training would not have met."""
    foundation, _ = world
    columns, long = make_columns(tmp_path / "data"), "a red circle " * 20
    write_caption(columns, "000011", *((long,) if where == "caption" else ("a red", ["a", long])))
    config = tiny_train(foundation, columns, tmp_path / "run", num_steps=1, global_batch_size=1)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"micro_batch_size": 1})})
    says = (
        r"shard \S+00001\.tar, key 000011: its caption 'a red circle .*'\.\.\. has 61 tokens, begin token "
        r"included; the context of model\.mllm takes 48 .*curate\.max_caption_tokens .*data\.caption_weights"
    )
    with pytest.raises(ValueError, match=says):
        train(config)
    assert not complete_checkpoints(tmp_path / "run" / "checkpoints")


def test_a_caption_that_does_not_fit_is_named_in_the_step_that_meets_it_too(world, tmp_path):
    """A text that grows when it is tokenised could pass by its size."""
    foundation, _ = world
    columns = make_columns(tmp_path / "data")
    write_caption(columns, "000003", "a red circle " * 20)
    config = tiny_train(foundation, columns, tmp_path / "run")
    mixture = Mixture.open(config.data, config.model.columns)
    model = build_trainable(config, mixture)
    samples = [mixture.datasets["main"][i] for i in (2, 3)]
    with pytest.raises(ValueError, match=r"shard \S+00000\.tar, key 000003: its caption .* has 61 tokens"):
        model.collate(samples, Recipe(0.0), [1, 2])


def test_a_decoder_that_does_not_fit_is_named_before_the_training(world, tmp_path):
    foundation, columns = world
    wide = make_foundation(tmp_path / "wide", tower_width=2 * WIDTH)
    model = tiny_model(foundation).model_copy(update={"decoder": wide / "decoder"})
    with pytest.raises(
        ValueError, match=r"model\.decoder: decoder .* reads \(grid, width\) \(\(2, 2\), 32\)"
    ):
        train(tiny_train(foundation, columns, tmp_path / "run", model=model))
    assert not (tmp_path / "run").exists()
