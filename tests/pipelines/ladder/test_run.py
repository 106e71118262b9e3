"""A whole ladder of two rows on a real Ray: what is done is not done twice, a failure stops nothing else."""

import shutil
from pathlib import Path

import pytest
from tiny_training import IMAGE_SIZE, make_foundation

from pipelines.ladder.compute import run_compute
from pipelines.ladder.config import LadderConfig
from pipelines.ladder.report import write_report
from pipelines.ladder.results import ComputePoint, Result, read
from pipelines.ladder.schedule import run_ladder
from repfusion.runs.folder import RunFolder
from repfusion.tracking import metric_history

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture
def config(tmp_path: Path) -> LadderConfig:
    docs = tmp_path / "docs"
    make_foundation(tmp_path / "weights")
    return LadderConfig.model_validate(
        {
            "root": tmp_path / "runs",
            "weights": tmp_path / "weights",
            "results": docs / "ladder" / "results.jsonl",
            "compute_results": docs / "ladder" / "compute.jsonl",
            "report": docs / "ladder.md",
            "tracking_uri": f"sqlite:///{tmp_path / 'mlflow.db'}",
            "rows": ["repfusion_language", "static_queries"],
            "seeds": [0],
            "dit": {"hidden_size": 16, "depth": 1, "num_heads": 2},
            "data": {
                "scenes": {"num_samples": 24, "world": {"image_size": IMAGE_SIZE}},
                "num_validation": 6,
            },
            "training": {"num_steps": 4, "global_batch_size": 4, "engine": {"micro_batch_size": 4}},
            "scoring": {
                "final": {"suites": {"scenes": {"num_prompts": 12}}, "sampler": {"num_steps": 2}},
                "curve_prompts": 6,
                "num_points": 2,
            },
            "compute": {"rows": ["static_queries", "repfusion"], "num_steps": [1, 3], "num_prompts": 6},
            "ray": {"num_cpus": 2, "object_store_mib": 80},
        }
    )


def test_a_ladder_runs_once_goes_on_after_a_failure_and_is_tracked(
    config: LadderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # a language model that cannot be read: the row fails in its own process
    broken = config.weights / "language"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    said: list[str] = []
    assert run_ladder(config, said.append) == 1
    first = read(config.results, Result)
    by_row = {one.row: one for one in first}
    assert by_row["repfusion_language"].status == "failed" and by_row["repfusion_language"].error
    assert "failed: repfusion_language seed 0" in write_report(config).read_text()

    good = by_row["static_queries"]
    assert [(point.step, point.num_prompts) for point in good.points] == [(2, 6), (4, 12)]
    assert all(point.validation_loss > 0 for point in good.points)
    assert good.trainable_parameters and good.flops_per_image and good.samples_per_sec and good.hardware
    assert good.weights.keys() == {"llava", "vision_tower", "decoder"}
    (folder,) = (config.root / config.name / "runs").glob("static_queries-0-*")
    # weights of the last checkpoint alone stay
    assert [path.name for path in (folder / "checkpoints").glob("step_*")] == ["step_00000004"]
    assert not (folder / "checkpoints" / "step_00000004" / "resume").exists()
    assert good.run_id is not None and config.tracking_uri is not None
    losses = metric_history(config.tracking_uri, good.run_id, "ladder/validation_loss")
    assert losses == [(point.step, point.validation_loss) for point in good.points]
    assert len(metric_history(config.tracking_uri, good.run_id, "eval/overall")) == 2

    # what a killed attempt last said of itself is not believed, before anything runs
    (left,) = (config.root / config.name / "runs").glob("repfusion_language-0-*")
    RunFolder(left).progress.write_text('{"step": 3, "samples_per_sec": 1.0}')
    with monkeypatch.context() as patched:
        patched.setattr("pipelines.ladder.schedule.run_on_ray", lambda *_: iter(()))
        assert run_ladder(config, said.append) == 0
    assert not RunFolder(left).progress.exists()

    # mended, only what failed runs again
    shutil.rmtree(broken)
    shutil.copytree(config.weights / "llava", broken)
    assert run_ladder(config, said.append) == 0
    second = read(config.results, Result)
    assert second[: len(first)] == first
    assert [(one.row, one.status) for one in second[len(first) :]] == [("repfusion_language", "ok")]
    assert "failed" not in write_report(config).read_text()

    # and then nothing
    said.clear()
    assert run_ladder(config, said.append) == 0
    assert read(config.results, Result) == second
    assert said[-1] == "2 runs, 2 of them done before"

    # the checkpoints that are there are sampled, once
    assert run_compute(config, said.append) == 0
    assert any("no final checkpoint on this machine of repfusion seed 0" in line for line in said)
    points = sorted(read(config.compute_results, ComputePoint), key=lambda one: one.num_steps)
    assert [(one.row, one.num_steps) for one in points] == [("static_queries", 1), ("static_queries", 3)]
    assert points[0].flops_per_image is not None and points[1].flops_per_image is not None
    assert points[0].flops_per_image < points[1].flops_per_image
    assert run_compute(config, said.append) == 0
    assert len(read(config.compute_results, ComputePoint)) == 2
