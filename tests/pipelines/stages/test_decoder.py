"""A workflow's own decoder: a stage that resumes, and that trainings name as they name each other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_critics import write_lpips

from pipelines.build import build_stages
from pipelines.config import WorkflowConfig
from pipelines.stages.decoder import decoder_folder
from pipelines.workflow.run import run
from repfusion.decoding.train import DecoderTraining
from repfusion.latents.load import fitting_decoder

SMALL = {"hidden_size": 16, "depth": 1, "num_heads": 2, "length": {"num_steps": 3, "batch_size": 4}}


class Workflow:
    """A workflow whose data are there, and that makes a decoder of them."""

    def __init__(self, root: Path, configure: Callable[..., WorkflowConfig], tower: Path):
        self.root, self.configure, self.tower = root, configure, tower
        self.said: list[str] = []

    def run(self, **changes: Any) -> list[str]:
        """The stages that ran."""
        section = {**SMALL, "encoder": {"path": self.tower}, "save_every_sec": 1e-9, **changes}
        config = self.configure(self.root, last_stage="decoder", decoder=section)
        results = run(build_stages(config), config.root, config.ray, self.said.append)
        return [result.name for result in results if not result.skipped]

    @property
    def weights(self) -> bytes:
        return (decoder_folder(self.root) / "model.safetensors").read_bytes()


@pytest.fixture
def workflow(
    run_copy: WorkflowConfig, configure: Callable[..., WorkflowConfig], models: dict[str, Path]
) -> Workflow:
    return Workflow(run_copy.root, configure, models["tower"])


def test_it_is_made_once_and_set_aside_when_it_is_asked_for_otherwise(workflow):
    assert workflow.run() == ["decoder"]
    fitting_decoder(decoder_folder(workflow.root), (4, 4), 32)
    manifest = json.loads((workflow.root / "decoder" / "manifest.json").read_text())
    assert manifest["extra"]["measured"]["num_steps"] == 3
    assert manifest["fields"]["decoder.length.batch_size"] == 4
    assert "decoder.device" not in manifest["fields"]
    first = workflow.weights
    # what changes rounding alone, or what is looked at, makes no other decoder
    assert workflow.run(measure_every_steps=2, compile=True) == []
    assert workflow.run(seed=1) == ["decoder"] and workflow.weights != first
    assert any("stale: decoder.seed 0 -> 1" in line for line in workflow.said)
    assert workflow.run() == [] and workflow.weights == first


def test_one_that_was_killed_goes_on_from_its_state(workflow, monkeypatch):
    steps: list[int] = []
    own = DecoderTraining.take_step

    def take_step(self, step):
        steps.append(step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return own(self, step)

    monkeypatch.setattr(DecoderTraining, "take_step", take_step)
    with pytest.raises(KeyboardInterrupt):
        workflow.run()
    assert workflow.run() == ["decoder"] and steps == [0, 1, 2, 2]


def test_a_judge_that_is_none_is_said_before_the_first_stage(workflow, tmp_path):
    folder = write_lpips(tmp_path / "lpips")
    adversarial = {"path": folder, "discriminator_from_step": 0, "gan_from_step": 0}
    with pytest.raises(ValueError, match=r"decoder\.adversarial\.path: .*no config\.json"):
        workflow.run(perceptual={"path": folder}, adversarial=adversarial)
    assert not (workflow.root / "decoder").exists()
    with pytest.raises(ValueError, match=r"decoder\.perceptual\.path"):
        workflow.run(perceptual={"path": tmp_path / "nothing"})


def named(decoder: str = "stage:decoder") -> dict[str, Any]:
    return {"train": {"model": {"decoder": decoder}}}


def test_trainings_name_it_as_they_name_each_other(make_config):
    config: WorkflowConfig = make_config(last_stage="train", decoder=SMALL, trainings=named())
    names = config.stage_names
    assert names.index("image_features") < names.index("decoder") < names.index("train")
    assert config.training("train").model.decoder == decoder_folder(config.root)
    stages = {stage.name: stage for stage in build_stages(config)}
    assert "decoder" in [one.name for one in stages["train"].upstream]
    assert stages["decoder"].fields["decoder.encoder.layer"] == -2
    stages["train"].check()  # it is not there yet
    assert "decoder" not in make_config().stage_names


def test_what_names_no_decoder_or_another_encoder_is_refused(make_config, models):
    with pytest.raises(ValueError, match="stage:decoder is no decoder of this workflow: there is no section"):
        make_config(trainings=named())
    with pytest.raises(ValueError, match=r"stage:curate is no decoder .* expected stage:decoder"):
        make_config(decoder=SMALL, trainings=named("stage:curate"))
    other = {**SMALL, "encoder": {"path": models["tower"], "layer": -1}}
    with pytest.raises(ValueError, match=r"trainings\.train\.model\.encoder is .*, but the decoder is of"):
        build_stages(make_config(last_stage="train", decoder=other, trainings=named()))
    with pytest.raises(ValueError, match=r"decoder\.encoder: no training's model\.decoder is stage:decoder"):
        build_stages(make_config(last_stage="decoder", decoder=SMALL))
    with pytest.raises(ValueError, match="cannot name a column or training"):
        make_config(trainings={"decoder": {}})
