"""A workflow's tokenizer and its codes: what follows from what, and what is refused."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_codes import write_tokenizer
from tiny_shards import write_shards

from pipelines.build import build_stages, data_stages, kept_stages
from pipelines.config import WorkflowConfig
from pipelines.runtime.pool import ShardJob
from pipelines.shards.storage import Folder
from pipelines.stages.codes.column import CodesConfig, CodesWorker
from pipelines.stages.codes.tokenizer import tokenizer_folder
from pipelines.workflow.run import run
from repfusion.codes.column import TOKENIZER_FILE, TokenizerMark, check_column
from repfusion.codes.tokenizer import ImageTokenizer
from repfusion.images.decode import read_pixels

BRANCHES = {
    "semantic": {"num_codes": 24, "width": 6, "hidden_size": 16, "depth": 1, "num_heads": 2},
    "pixel": {"num_codes": 40, "width": 5},
    "conv": {"channels": 8, "multipliers": [1, 1, 1, 1], "depth": 1},
}
LENGTH = {"num_steps": 2, "batch_size": 4}
OWN = "stage:tokenizer"


def sections(models: dict[str, Path], model: dict[str, Any], **tokenizer: Any) -> dict[str, Any]:
    """Sections of a workflow whose training reads codes of its own tokenizer."""
    encoder = {"path": models["tower"]}
    recipe = {"encoder": encoder, "branches": BRANCHES, "length": LENGTH, "num_measured": 4}
    return {
        "tokenizer": {**recipe, **tokenizer},
        "columns": {"codes": {}},
        "trainings": {"train": {"model": model}},
    }


def unidisc(models: dict[str, Path], tokenizer: str | Path = OWN) -> dict[str, Any]:
    text = {"text": models["llava"], "text_length": 24}
    return {"kind": "unidisc", "tokenizer": tokenizer, **text}


@pytest.fixture
def workflow(make_config, models) -> Callable[..., WorkflowConfig]:
    def make(model: dict[str, Any] | None = None, **changes: Any) -> WorkflowConfig:
        values = make_config().model_dump(mode="json", exclude={"columns", "trainings"})
        made = sections(models, model or unidisc(models), **changes.pop("tokenizer", {}))
        return WorkflowConfig.model_validate({**values, "last_stage": "train", **made, **changes})

    return make


def test_a_training_names_the_tokenizer_as_it_names_others(workflow, models):
    config = workflow()
    names = config.stage_names
    assert names.index("curate") < names.index("tokenizer") < names.index("codes") < names.index("train")
    assert "image_features" not in names
    assert config.training("train").model.tokenizer == tokenizer_folder(config.root)
    stages = {stage.name: stage for stage in build_stages(config)}
    assert [one.name for one in stages["codes"].upstream] == ["curate", "tokenizer"]
    assert [one.name for one in stages["train"].upstream] == ["curate", "codes", "tokenizer"]
    assert "codes" not in [one.name for one in data_stages(config)]  # a plan cannot make it
    assert [one.name for one in kept_stages(config)][-2:] == ["tokenizer", "codes"]
    other = {one.name: one for one in build_stages(workflow(tokenizer={"seed": 1}))}
    assert other["codes"].fingerprint != stages["codes"].fingerprint
    assert other["curate"].fingerprint == stages["curate"].fingerprint
    same = {one.name: one for one in build_stages(workflow(tokenizer={"compile": True}))}
    assert same["codes"].fingerprint == stages["codes"].fingerprint


def test_what_names_no_tokenizer_is_refused(workflow, models):
    with pytest.raises(ValueError, match="no tokenizer of this workflow: it is another stage"):
        workflow(unidisc(models, "stage:curate"))
    with pytest.raises(ValueError, match=r"there is no section 'tokenizer'"):
        config = workflow()
        values = config.model_dump(mode="json", exclude={"tokenizer"})
        WorkflowConfig.model_validate(values)
    with pytest.raises(ValueError, match=r"overlap: .*for which all codes wait"):
        workflow(overlap=True)
    with pytest.raises(ValueError, match=r"train\.model\n  Input tag 'unidisk'"):
        workflow({**unidisc(models), "kind": "unidisk"})
    with pytest.raises(ValueError, match="conditioning"):
        workflow({**unidisc(models), "conditioning": "lap"})


@pytest.mark.slow
@pytest.mark.ray
def test_tokenizer_and_codes_are_made_and_follow_each_other(run_copy, workflow):
    config = workflow(last_stage="codes")
    ran = [one.name for one in run(build_stages(config), config.root, config.ray) if not one.skipped]
    assert ran[-2:] == ["tokenizer", "codes"]
    folder, tokenizer = config.root / "codes", tokenizer_folder(config.root)
    check_column(folder, tokenizer)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["fields"]["columns.codes.tokenizer"] == "stage:tokenizer"
    loaded = ImageTokenizer.from_pretrained(tokenizer, with_tower=True)
    with (
        tarfile.open(folder / "00000.tar") as codes,
        tarfile.open(config.root / "curate/00000.tar") as images,
    ):
        for member in codes.getmembers():
            array = np.load(io.BytesIO(codes.extractfile(member).read()))
            image = read_pixels(images.extractfile(member.name.replace("codes.npy", "png")).read())
            expected = loaded.encode_images(torch.from_numpy(image)[None])[0]
            assert array.dtype == np.int32 and array.tolist() == expected.tolist()
    assert all(one.skipped for one in run(build_stages(config), config.root, config.ray))
    again = workflow(last_stage="codes", tokenizer={"seed": 1})
    ran = [one.name for one in run(build_stages(again), again.root, again.ray) if not one.skipped]
    assert ran == ["tokenizer", "codes"]
    with pytest.raises(ValueError, match="are those of the tokenizer of weights"):
        (folder / TOKENIZER_FILE).write_text(
            TokenizerMark.of(tokenizer).model_copy(update={"digest": "0"}).model_dump_json()
        )
        check_column(folder, tokenizer)


def test_a_shard_of_codes_is_what_the_tokenizer_says(models, tmp_path):
    made = write_tokenizer(tmp_path / "tokenizer", models["tower"])
    images = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8) for i in range(5)]
    source = Folder(str(write_shards(tmp_path / "curate", images, 1)))
    worker = CodesWorker(Folder(str(tmp_path / "codes")), source, CodesConfig(batch_size=3), made)
    assert worker(ShardJob("00000", "f", {}, {})).samples == 5
    with tarfile.open(tmp_path / "codes/00000.tar") as tar:
        rows = [np.load(io.BytesIO(tar.extractfile(one).read())) for one in tar.getmembers()]
    expected = ImageTokenizer.from_pretrained(made, True).encode_images(torch.from_numpy(np.stack(images)))
    np.testing.assert_array_equal(np.stack(rows), expected)
    assert all(row.dtype == np.int32 for row in rows)
