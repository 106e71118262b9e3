"""What a path names: an export or checkpoint itself, the best of a training, of a workflow's scored one."""

import shutil

import pytest

from repfusion.runs.checkpoint import save_checkpoint
from repfusion.runs.named import named_model
from repfusion.weights import WEIGHTS


@pytest.fixture
def workflow(tmp_path, make_generator):
    """A root with two trainings, the first of two checkpoints, and one that was set aside; none is scored."""
    root, model = tmp_path / "root", make_generator()
    for name, steps in (("train", (1, 2)), ("finetune", (1,)), ("train.stale-abc", (7,))):
        for step in steps:
            folder = root / name / "checkpoints" / f"step_{step:08d}"
            save_checkpoint(folder, model, model.trainable_state(), step=step)
    (root / "curate").mkdir()
    return root


def score_best(checkpoint):
    (checkpoint / "pins").mkdir()
    (checkpoint / "pins" / "best").touch()


def test_a_checkpoint_and_what_is_not_there_stand_for_themselves(workflow, tmp_path):
    first = workflow / "train" / "checkpoints" / "step_00000001"
    for path in (first, WEIGHTS / "base", tmp_path / "nowhere"):
        assert named_model(path) == path


def test_a_training_stands_for_its_best_checkpoint_and_else_its_last(workflow, caplog):
    training = workflow / "train"
    first, last = training / "checkpoints" / "step_00000001", training / "checkpoints" / "step_00000002"
    with caplog.at_level("INFO"):
        assert named_model(training) == last == named_model(training / "checkpoints")
    assert "taken is the last, step_00000002" in caplog.text
    score_best(first)
    assert named_model(training) == first


def test_a_root_stands_for_its_scored_training(workflow):
    with pytest.raises(
        ValueError, match=r"holds 2 trainings, 0 of them scored; name one: .*finetune, .*train"
    ):
        named_model(workflow)
    best = workflow / "train" / "checkpoints" / "step_00000001"
    score_best(best)
    assert named_model(workflow) == best
    shutil.rmtree(workflow / "train")
    assert named_model(workflow) == workflow / "finetune" / "checkpoints" / "step_00000001"


def test_a_folder_that_is_none_of_these_says_what_is_expected(workflow, tmp_path):
    with pytest.raises(ValueError, match="neither a checkpoint or export, nor a training"):
        named_model(workflow / "curate")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        named_model(tmp_path / "empty")
