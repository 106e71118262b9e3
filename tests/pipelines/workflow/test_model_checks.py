"""What no stage at the end can run with is said before the first: no stage ran, Ray was not started."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import ray
from safetensors.torch import load_file, save_file

from pipelines import commands
from pipelines.build import build_stages
from pipelines.config import WorkflowConfig
from pipelines.workflow.run import run
from repfusion.config import to_yaml
from repfusion.latents.rae_decoder import RAEDecoder, RAEDecoderConfig
from repfusion.weights import WEIGHTS


def refused(config, says: str) -> None:
    """Nothing was done: neither a folder of a stage nor a cluster is there."""
    before = ray.is_initialized()
    with pytest.raises(ValueError, match=says):
        run(build_stages(config), config.root, config.ray)
    assert not [path.name for path in config.root.iterdir() if path.is_dir()]
    assert ray.is_initialized() == before


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """A decoder that fits the tests' tower: 4 x 4 tokens of 32 channels."""
    fields = {"feature_dim": 32, "grid": (4, 4), "patch_size": 8, "hidden_size": 16, "depth": 1}
    RAEDecoder(RAEDecoderConfig.model_validate(fields)).save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


def training(decoder: Path, **model) -> dict:
    small = {"hidden_size": 48, "depth": 1, "num_heads": 2}
    return {"train": {"model": {"decoder": decoder, "dit": small, **model}}}


def test_a_decoder_of_another_width_ends_a_run_before_its_first_stage(make_config, decoder):
    fields = json.loads((decoder / "config.json").read_text()) | {"feature_dim": 24}
    RAEDecoder(RAEDecoderConfig.model_validate(fields)).save_pretrained(decoder)
    config = make_config(last_stage="train", trainings=training(decoder))
    refused(config, r"trainings\.train\.model\.decoder: .*\(\(4, 4\), 24\), the model makes \(\(4, 4\), 32\)")


def test_a_projector_of_another_width_ends_a_run_before_its_first_stage(
    make_config, decoder, models, tmp_path
):
    from tiny_training import make_foundation

    make_foundation(tmp_path / "other", tower_width=16)
    own = training(decoder, mllm=tmp_path / "other" / "llava", conditioning="noisy_latents")
    config = make_config(last_stage="train", trainings=own)
    refused(
        config,
        r"trainings\.train\.model: .*projector takes width 16, the latents have 32; use the vision tower",
    )


@pytest.mark.parametrize("last_stage", ["image_features", "prompt_features", "train"])
@pytest.mark.parametrize("part", ["tower", "llava"])
def test_a_weight_that_is_gone_ends_a_run_before_its_first_stage(
    part, last_stage, make_config, decoder, models, tmp_path
):
    folder = Path(shutil.copytree(models[part], tmp_path / part))
    weights = load_file(folder / "model.safetensors")
    del weights[random.Random(part).choice(sorted(weights))]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    own = {"encoder": {"path": folder}} if part == "tower" else {"mllm": folder}
    config = make_config(last_stage=last_stage, trainings=training(decoder, **own))
    key = {"tower": r"encoder\.path", "llava": "mllm"}[part]
    if (part, last_stage) == ("llava", "image_features"):
        for stage in build_stages(config):
            stage.check()  # not asked for
        return
    refused(config, rf"trainings\.train\.model\.{key}: .* folder {folder}: weights do not fit .*missing: ")


def test_a_checkpoint_of_another_size_ends_a_run_before_its_first_stage(make_config):
    """The shipped base has a DiT of width 192."""
    own = {"init_from": WEIGHTS / "base", "model": {"dit": {"hidden_size": 96}}}
    config = make_config(last_stage="train")
    values = config.model_dump(mode="json", exclude={"columns"}) | {"trainings": {"train": own}}
    refused(
        WorkflowConfig.model_validate(values),
        r"trainings\.train\.init_from: checkpoint .*base does not fit the model: weights of another geometry",
    )


def test_plan_says_the_same_and_status_does_not_look(
    make_config, decoder, models, tmp_path, monkeypatch, capsys
):
    folder = Path(shutil.copytree(models["llava"], tmp_path / "llava"))
    (folder / "tokenizer.json").unlink()
    config = make_config(last_stage="train", trainings=training(decoder, mllm=folder))
    path = tmp_path / "workflow.yaml"
    path.write_text(to_yaml(config))
    for command, status in (("status", 0), ("plan", 1), ("run", 1)):
        monkeypatch.setattr(sys, "argv", ["pipelines", command, str(path)])
        assert commands.main() == status
    out, err = capsys.readouterr()
    assert "missing  not run yet" in out
    assert err.count(f"MLLM folder {folder}: no tokenizer; expected tokenizer.json") == 2


@pytest.mark.slow
def test_what_is_fresh_is_not_looked_at_again(run_copy, monkeypatch):
    """A run with nothing to do reads no model."""
    stages = build_stages(run_copy)
    monkeypatch.setattr("repfusion.pretrained.weights.read_headers", None)
    assert all(result.skipped for result in run(stages, run_copy.root, run_copy.ray, lambda line: None))
