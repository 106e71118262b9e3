"""An export holds all that generating needs, whole or not at all, and says where it came from."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from repfusion.diffusion.sampler import SamplerConfig
from repfusion.evaluation.record import Evaluation, EvaluationConfig, SuiteResult
from repfusion.evaluation.suites.base import Scores
from repfusion.export import export, main
from repfusion.generate import generate
from repfusion.latents.statistics import LatentStatistics
from repfusion.llm.load import load_language_model
from repfusion.model.build import build_model
from repfusion.model.config import ModelConfig
from repfusion.model.text_to_image import TextToImage
from repfusion.request import Request
from repfusion.runs.checkpoint import load_checkpoint, save_checkpoint
from repfusion.runs.exported import MARK, check_export, load_export
from repfusion.weights import WEIGHTS

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a red circle", "two blue squares", ""]
CONFIG = SamplerConfig(num_steps=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(WEIGHTS / "base", tmp_path_factory.mktemp("export") / "base")


def draw(generator: TextToImage) -> torch.Tensor:
    return generate(generator, generator.load_decoder(), [Request(prompt) for prompt in PROMPTS], 5, CONFIG)


def trained(config: ModelConfig, folder: Path) -> Path:
    """A checkpoint of a config, its weights moved away from their start; `model` and `ema` differ."""
    torch.manual_seed(2)
    encoder = config.encoder.load()
    statistics = LatentStatistics.empty(encoder.num_tokens, encoder.feature_dim)
    statistics.update(torch.randn(8, encoder.num_tokens, encoder.feature_dim))
    generator = build_model(config, statistics)
    with torch.no_grad():
        for parameter in generator.trainable_state().values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ema = {name: p + 0.1 * torch.randn_like(p) for name, p in generator.trainable_state().items()}
    save_checkpoint(folder, generator, ema, step=7)
    return folder


def test_the_export_of_the_shipped_base_draws_the_same_bits(base):
    assert torch.equal(draw(load_export(base)), draw(load_checkpoint(WEIGHTS / "base")))


@pytest.mark.parametrize("use_ema", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_tokenizer_projector_and_geometry_survives(elsewhere, tmp_path, use_ema):
    checkpoint = trained(elsewhere, tmp_path / "step_00000007")
    out = export(checkpoint, tmp_path / "out", use_ema)
    assert torch.equal(draw(load_export(out)), draw(load_checkpoint(checkpoint, use_ema)))
    before, after = load_language_model(elsewhere.mllm), load_language_model(out / "language_model")
    assert after.max_text_tokens == before.max_text_tokens
    one, other = before.tokenise(PROMPTS), after.tokenise(PROMPTS)
    assert torch.equal(one.ids, other.ids) and torch.equal(one.mask, other.mask)


@pytest.mark.parametrize(
    ("conditioning", "mllm"),
    [
        ("noisy_latents", "llava"),
        pytest.param("noisy_latents", "language", marks=pytest.mark.slow),
        pytest.param("text_embed", "llava", marks=pytest.mark.slow),
        ("text_embed", "language"),
    ],
)
def test_every_method_and_kind_of_language_model(tmp_path, mllm, conditioning):
    config = ModelConfig(mllm=WEIGHTS / mllm, conditioning=conditioning)
    checkpoint = trained(config, tmp_path / "step_00000007")
    out = export(checkpoint, tmp_path / "out")
    assert torch.equal(draw(load_export(out)), draw(load_checkpoint(checkpoint)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "conditioning",
    [
        {"method": "li_dit", "instruction": "describe the image", "refiner_depth": 1},
        pytest.param({"method": "gill", "num_queries": 16, "width": 16, "depth": 1}, marks=pytest.mark.slow),
    ],
    ids=["li_dit", "gill"],
)
def test_a_second_language_model_goes_along(tmp_path, conditioning):
    second = tmp_path / "second"
    shutil.copytree(WEIGHTS / "language", second)
    checkpoint = trained(
        ModelConfig(conditioning={**conditioning, "second": second}), tmp_path / "step_00000007"
    )
    expected = draw(load_checkpoint(checkpoint))
    out = export(checkpoint, tmp_path / "out")
    shutil.rmtree(second)
    assert torch.equal(draw(load_export(out)), expected)
    index = json.loads((out / "model_index.json").read_text())
    assert index["second_language_model"] == ["transformers", "LlamaForCausalLM"]


@pytest.mark.slow
def test_a_vae_goes_along(tmp_path):
    vae = {"path": WEIGHTS / "vae", "image_size": 32}
    config = ModelConfig(mllm=WEIGHTS / "language", encoder=vae, decoder=WEIGHTS / "vae")
    checkpoint = trained(config, tmp_path / "step_00000007")
    out = export(checkpoint, tmp_path / "out")
    assert json.loads((out / "model_index.json").read_text())["decoder"] == [
        "repfusion.latents.vae",
        "VAEDecoder",
    ]
    assert torch.equal(draw(load_export(out)), draw(load_checkpoint(checkpoint)))


@pytest.mark.slow
def test_a_bfloat16_language_model_is_stored_as_it_is_used(tmp_path):
    config = ModelConfig(mllm_dtype="bfloat16")
    checkpoint = trained(config, tmp_path / "step_00000007")
    out = export(checkpoint, tmp_path / "out")
    stored = load_file(str(out / "language_model" / "model.safetensors"))
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert torch.equal(draw(load_export(out)), draw(load_checkpoint(checkpoint)))


@pytest.mark.slow
def test_it_generates_where_nothing_else_is_at_hand(base, tmp_path):
    """Another folder, another process, and none of the shipped weights."""
    moved = tmp_path / "far" / "away"
    shutil.copytree(base, moved)
    code = (
        "import sys, torch\n"
        "import repfusion.weights\n"
        "from pathlib import Path\n"
        "repfusion.weights.WEIGHTS = Path('/nowhere')\n"
        "from repfusion.runs.exported import load_export\n"
        "from repfusion.request import Request\n"
        "from repfusion.generate import generate\n"
        "from repfusion.diffusion.sampler import SamplerConfig\n"
        "generator = load_export(sys.argv[1])\n"
        "decoder, config = generator.load_decoder(), SamplerConfig(num_steps=3)\n"
        f"requests = [Request(prompt) for prompt in {PROMPTS!r}]\n"
        "images = generate(generator, decoder, requests, 5, config)\n"
        "torch.save(images, sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, moved, tmp_path / "images.pt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    expected = draw(load_checkpoint(WEIGHTS / "base"))
    assert torch.equal(torch.load(tmp_path / "images.pt"), expected)


def test_transformers_reads_the_language_model_by_itself(base):
    folder = base / "language_model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    logits = model(**tokenizer("a red circle", return_tensors="pt")).logits
    assert logits.shape[-1] == model.config.vocab_size and logits.isfinite().all()


def test_the_weights_keep_the_precision_they_were_stored_in(base):
    for ours, source in (("language_model", "llava"), ("decoder", "decoder")):
        kept = load_file(str(base / ours / "model.safetensors"))
        original = load_file(str(WEIGHTS / source / "model.safetensors"))
        assert {t.dtype for t in kept.values()} == {t.dtype for t in original.values()} == {torch.float16}
    own = load_file(str(base / "denoiser" / "model.safetensors"))
    saved = load_file(str(WEIGHTS / "base" / "ema.safetensors"))
    assert own.keys() == saved.keys() and all(torch.equal(own[name], saved[name]) for name in own)


def test_loading_leaves_torchs_own_randomness_alone(base):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load_export(base)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_file_is_recorded_with_its_digest(base):
    files = json.loads((base / MARK).read_text())["files"]
    present = {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()} - {"README.md", MARK}
    assert files.keys() == present
    for name, saved in files.items():
        content = (base / name).read_bytes()
        assert saved == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert {stat.S_IMODE((base / name).stat().st_mode) for name in files} == {
        stat.S_IMODE((base / "README.md").stat().st_mode)
    }


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    ["denoiser/model.safetensors", "language_model/tokenizer.json", "decoder/config.json", "lineage.json"],
)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_last_byte, "{name} has sha256 .* its content was changed or damaged; copy it again"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "{name} is .* bytes long .truncated"),
        (Path.unlink, "{name} is missing; copy it again"),
    ],
)
def test_a_damaged_file_is_named(base, tmp_path, name, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    damage(copy / name)
    with pytest.raises(ValueError, match=message.format(name=name)):
        load_export(copy)


def test_the_card_is_yours_to_edit(base, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    (copy / "README.md").write_text("# mine\n")
    (copy / "example.png").write_bytes(b"mine too")
    check_export(copy)


def test_an_export_cut_short_is_none(base, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    (copy / MARK).unlink()
    with pytest.raises(ValueError, match=r"has no export\.json"):
        load_export(copy)
    with pytest.raises(ValueError, match="does not exist"):
        load_export(tmp_path / "nowhere")


def test_it_never_takes_the_place_of_something_else(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years")
    for out in (theirs, theirs / "thesis.txt"):
        with pytest.raises(ValueError, match="exists and is no export"):
            export(WEIGHTS / "base", out)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    assert (theirs / "thesis.txt").read_text() == "years"


def test_an_empty_folder_and_an_earlier_export_are_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    killed = tmp_path / ".out.partial" / "denoiser"  # what a killed export leaves
    killed.mkdir(parents=True)
    (killed / "stray.txt").write_text("of the killed one")
    export(WEIGHTS / "base", out)
    assert "denoiser/stray.txt" not in check_export(out)["files"]
    (out / "stray.txt").write_text("of the old one")
    export(WEIGHTS / "base", out)
    assert not (out / "stray.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_that_fails_midway_leaves_the_earlier_one(base, tmp_path):
    checkpoint = trained(ModelConfig(), tmp_path / "train" / "checkpoints" / "step_00000007")
    out = tmp_path / "exports" / "out"
    shutil.copytree(base, out)
    before = (out / MARK).read_bytes()
    scores = (
        tmp_path / "train" / "evaluations" / checkpoint.name / "scores.json"
    )  # read when all else is written
    scores.parent.mkdir(parents=True)
    scores.write_text("{")
    with pytest.raises(ValueError, match="Invalid JSON"):
        export(checkpoint, out)
    check_export(out)
    assert (out / MARK).read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_checkpoint_that_is_not_whole_is_not_exported(foundation, tmp_path):
    from tiny_training import tiny_model

    copied = tmp_path / "foundation"
    shutil.copytree(foundation, copied)
    checkpoint = trained(tiny_model(copied), tmp_path / "step_00000007")
    with pytest.raises(ValueError, match=r"holds no model\.safetensors; choose the other weights"):
        export(WEIGHTS / "base", tmp_path / "out", use_ema=False)
    weights = load_file(str(copied / "llava" / "model.safetensors"))
    save_file({name: tensor + 1 for name, tensor in weights.items()}, copied / "llava" / "model.safetensors")
    with pytest.raises(ValueError, match="was trained with mllm weights"):
        export(checkpoint, tmp_path / "out")
    (checkpoint / "complete.json").unlink()
    with pytest.raises(ValueError, match="was cut short"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_index_card_and_lineage_say_what_it_is(tmp_path):
    run = tmp_path / "train"
    checkpoint = trained(ModelConfig(), run / "checkpoints" / "step_00000007")
    training = {
        "run_id": "f00d",
        "tracking_uri": "sqlite:///x.db",
        "git_commit": "abc-dirty",
        "lock_digest": None,
        "step": 7,
        "datasets": {"main": {"features": {"folder": "/d", "manifest_digest": "d" * 64, "fingerprint": "f"}}},
        "digests": {},
    }
    (checkpoint / "lineage.json").write_text(json.dumps(training))
    scores = run / "evaluations" / checkpoint.name / "scores.json"
    scores.parent.mkdir(parents=True)
    config = EvaluationConfig()
    values = {"overall": 0.625, "task/counting": 0.5, "new_concept": 0.25}
    result = SuiteResult(
        num_items=2, scores=Scores(headline="overall", values=values), **config.versions()["scenes"]
    )
    evaluation = Evaluation(checkpoint="", step=7, config=config, suites={"scenes": result}, seconds=1)
    scores.write_text(evaluation.model_dump_json())
    out = export(checkpoint, tmp_path / "out")
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "RepFusionPipeline"
    folders = [name for name in index if not name.startswith("_")]
    assert all((out / name / "model.safetensors").is_file() for name in folders)
    assert index["language_model"] == ["transformers", "LlamaForCausalLM"]
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["training"] == training and lineage["weights"] == "averaged"
    assert lineage["checkpoint"]["path"] == str(checkpoint) and lineage["checkpoint"]["step"] == 7
    card = (out / "README.md").read_text()
    for part in ("f00d", "abc-dirty", "dddddddddddd", "7, averaged weights"):
        assert part in card
    assert "| task | score |\n|---|---|\n| overall | 0.625 |\n| counting | 0.500 |\n\n" in card


def test_the_command(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["export", "--out", str(out)])
    main()
    assert str(out) in capsys.readouterr().out
    check_export(out)
    monkeypatch.setattr(sys, "argv", ["export", "--checkpoint", "/nowhere", "--out", str(out)])
    with pytest.raises(SystemExit, match="error: checkpoint /nowhere does not exist"):
        main()
