"""A suite is its own file and two places in `build.py`. In a copy of the sources that has both, it is drawn,
judged, scored, shown, tracked, and picks the best checkpoint.
"""

import difflib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITES = Path("repfusion/evaluation/suites")
EDITS = {
    "from repfusion.evaluation.suites.base import Suite\n": (
        "from repfusion.evaluation.suites.base import Suite\n"
        "from repfusion.evaluation.suites.brightness import BrightnessConfig, BrightnessSuite\n"
    ),
    "    ScenesSuiteConfig\n": "    ScenesSuiteConfig\n    | BrightnessConfig\n",
    "    match config:\n": (
        "    match config:\n        case BrightnessConfig():\n            return BrightnessSuite(config)\n"
    ),
}
"""What changes in `build.py`."""
EVALUATE = """
import json, sys
from pathlib import Path

import torch
from evaluated_training import EvaluatedTraining, evaluate_config

from pipelines.evaluation.jobs import EvaluationJobs
from pipelines.evaluation.process import Evaluator
from pipelines.evaluation.records import finished, pin_best
from pipelines.reporting.scores import facts, scores
from repfusion.evaluation.shown import in_brief
from repfusion.tracking import metric_history

training = EvaluatedTraining(Path(sys.argv[1]), (2,))
with torch.no_grad():
    for weights in training.generator.trainable_state().values():
        weights += 0.1 * torch.randn_like(weights)
training.write_checkpoint(4)
suites = {"brightness": {"threshold": 0.0, "seen": "mean"}, "scenes": {"num_prompts": 6}}
config = evaluate_config(suites=suites, best_by="brightness/mean", device="cpu")
jobs, checkpoints = EvaluationJobs(config, training.train), [training.checkpoint(step) for step in (2, 4)]
for checkpoint in checkpoints:
    Evaluator(jobs.task(checkpoint, 1, is_idle=False)).evaluate()
pin_best(checkpoints, jobs.folder, config, training.train.num_steps)
found = [(jobs.place(path), finished(jobs.place(path), config.scoring)) for path in checkpoints]
names = ("eval/mean", "eval/bright", "eval/scenes/overall")
print(json.dumps({
    "means": [one.suites["brightness"].scores.values["mean"] for _, one in found],
    "in_brief": [in_brief(one) for _, one in found],
    "page": scores(found),
    "facts": facts(found),
    "tracked": {name: metric_history(training.uri, training.run_id, name) for name in names},
    "best": training.client.get_model_version_by_alias("repfusion", "best").tags["step"],
    "pinned": [step for step in (2, 4) if (training.checkpoint(step) / "pins" / "best").exists()],
    "files": sorted(path.name for path in (found[0][0] / "brightness").iterdir()),
}))
"""


def extended(folder: Path) -> Path:
    """The sources with the suite added to them."""
    for name in ("repfusion", "pipelines", "tests/support"):
        ignored = shutil.ignore_patterns("__pycache__", "weights")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "repfusion" / "weights").mkdir()
    shutil.copyfile(ROOT / "repfusion/weights/__init__.py", folder / "repfusion/weights/__init__.py")
    shutil.copyfile(Path(__file__).with_name("brightness.py"), folder / SUITES / "brightness.py")
    text = (folder / SUITES / "build.py").read_text()
    for before, after in EDITS.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (folder / SUITES / "build.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    root = tmp_path_factory.mktemp("extended")
    sources = extended(root / "sources")
    path = os.pathsep.join(map(str, (sources, sources / "tests" / "support")))
    command = [sys.executable, "-c", EVALUATE, str(root / "run")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_it_is_drawn_judged_scored_and_shown(found: dict):
    first, last = found["means"]
    assert 0 < first < 1 and first != last
    assert "items.jsonl" in found["files"] and "outputs" in found["files"]
    assert (
        found["in_brief"][0]
        == f"bright 1.00, mean brightness {first:.2f}; scenes: overall 0.00, new concept 0.00"
    )
    assert (
        "<h2>Scores: brightness</h2><p>Percent of 3 colours whose image is <i>bright</i>. 1 " in found["page"]
    )
    assert "<h2>Scores: scenes</h2><p>Percent of 6 held-out prompts" in found["page"]
    assert ["100%", "images are bright"] in found["facts"]


@pytest.mark.slow
def test_it_is_tracked_and_picks_the_best_checkpoint(found: dict):
    means = found["means"]
    assert found["tracked"]["eval/mean"] == [[2, means[0]], [4, means[1]]]
    assert found["tracked"]["eval/bright"] == [[2, 1.0], [4, 1.0]]
    assert found["tracked"]["eval/scenes/overall"] == [[2, 0.0], [4, 0.0]]
    best = 2 if means[0] >= means[1] else 4
    assert (found["best"], found["pinned"]) == (str(best), [best])


def test_two_files_are_touched(tmp_path: Path):
    sources = extended(tmp_path)
    changed = [
        str(path.relative_to(sources))
        for path in sorted(sources.rglob("*.py"))
        if not (original := ROOT / path.relative_to(sources)).exists()
        or original.read_text() != path.read_text()
    ]
    assert changed == [str(SUITES / name) for name in ("brightness.py", "build.py")]
    before, after = ((root / SUITES / "build.py").read_text().splitlines() for root in (ROOT, sources))
    edited = [line for line in difflib.ndiff(before, after) if line[0] in "+-" and line[2:]]
    assert len(edited) == 4
