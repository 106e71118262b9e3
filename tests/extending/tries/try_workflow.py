"""Run within a copy of the code that the patches were applied to: the additions of the workflow do what
they say.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_training import make_columns, make_foundation, tiny_data, tiny_train

from pipelines.build import build_stages, source_entries
from pipelines.config import WorkflowConfig
from pipelines.runtime.session import RayConfig
from pipelines.workflow.run import run
from repfusion.config import validate
from repfusion.data.dataset import ColumnDataset
from repfusion.data.readers import SampleArray
from repfusion.evaluation.checkpoints import evaluate_checkpoint
from repfusion.evaluation.record import EvaluationConfig
from repfusion.train import train


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> WorkflowConfig:
    """A workflow from JSON lines to a column of mean colours, run."""
    root = tmp_path_factory.mktemp("lines")
    lines = []
    for number in range(5):
        name = f"{number}.png"
        Image.new("RGB", (32, 32), (50 * number, 10, 200)).save(root / name)
        lines.append(json.dumps({"image": name, "caption": f"plain colour {number}"}))
    lines += [json.dumps({"image": "gone.png", "caption": "nothing"}), "no json"]
    (root / "list.jsonl").write_text("\n".join(lines))
    config = validate(
        WorkflowConfig,
        {
            "root": root / "run",
            "last_stage": "mean_colours",
            "source": {"kind": "jsonl", "path": root / "list.jsonl", "shard_size": 4},
            "ingest": {"image_size": 32, "max_drop_fraction": 1.0},
            "curate": {"min_side_px": 16, "duplicates": "keep"},
            "columns": {"mean_colours": {"kind": "colours"}},
            "ray": RayConfig(num_cpus=1),
        },
    )
    run(build_stages(config), config.root, config.ray)
    return config


def try_source(made: WorkflowConfig):
    assert source_entries(made).num_entries == 7
    drops = json.loads((made.root / "ingest" / "manifest.json").read_text())["drops"]
    assert drops == {"bad_line": 1, "no_image": 1}


def try_stage(made: WorkflowConfig):
    dataset = ColumnDataset(
        made.root / "curate", {"mean_colours": made.root / "mean_colours"}, {"mean_colours": SampleArray()}
    )
    assert len(dataset) == 5
    for number in range(5):
        colour = dataset[number].read("mean_colours")
        np.testing.assert_allclose(colour, np.array([50 * number, 10, 200]) / 255, atol=1e-4)


def try_suite(tmp_path: Path):
    foundation, columns = make_foundation(tmp_path / "weights"), make_columns(tmp_path / "data")
    train(tiny_train(foundation, columns, tmp_path / "run", data=tiny_data(columns), num_steps=2))
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    config = EvaluationConfig.model_validate(
        {"suites": {"contrast": {"kind": "contrast", "prompts": ["a red circle", "two blue"]}}}
    )
    evaluation = evaluate_checkpoint(checkpoint, tmp_path / "out", config)
    assert set(evaluation.suites["contrast"].scores.values) == {"contrast"}
    assert (tmp_path / "out" / "gallery.png").is_file()
