"""What is said of a stage and of a training while they run: samples, steps and the time left."""

import pytest

from pipelines.runtime.progress import LINE_SEC, StageProgress, TrainingProgress, duration
from pipelines.shards.store import Sidecar

SHARD = Sidecar(
    name="00000", file="00000.tar", fingerprint="f", inputs={}, samples=98, bytes=2, sha256="s",
    drops={"http_404": 2}, files={}, seconds=1.0, versions={},
)  # fmt: skip


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (95, "2 min"), (3540, "59 min"), (7500, "2 h 5 min")]
)
def test_a_duration_reads_well(seconds, text):
    assert duration(seconds) == text


def test_a_stage_says_samples_and_the_time_left(clock):
    said: list[str] = []
    with StageProgress("curate", 8, 2, is_terminal=False, say=said.append, clock=clock) as progress:
        for _ in range(5):
            clock.now += 10
            progress.completed(SHARD)
    assert said == [
        "curate: 4/8 shards, 200 samples, 10.0/s, 40 s left",
        "curate: 6/8 shards, 400 samples, 10.0/s, 20 s left",
    ]


def test_what_makes_no_shards_is_counted_without_samples(clock):
    with StageProgress("verify", 2, is_terminal=False, say=lambda line: None, clock=clock) as progress:
        clock.now += 1
        progress.completed(None)
    assert (progress.done, progress.samples) == (1, 0)


def test_a_bar_shows_samples_beside_shards(clock, capsys):
    with StageProgress("curate", 2, is_terminal=True, clock=clock) as progress:
        clock.now += 4
        progress.completed(SHARD)
        progress.bar.refresh()
    shown = capsys.readouterr().err
    assert "1/2" in shown and "100 samples, 25.0/s" in shown


def test_a_training_says_its_step_before_the_first_log_line(clock):
    said: list[str] = []
    with TrainingProgress(40, 600, is_terminal=False, say=said.append, clock=clock) as progress:
        assert not progress.show({"step": 40})
        clock.now += 30  # to load and to compile is not the pace of steps
        assert progress.show({"step": 42})
        clock.now += LINE_SEC
        assert progress.show({"step": 57})
        assert not progress.show({"step": 57})
        clock.now += LINE_SEC
        progress.show({"step": 72, "loss": 0.5, "samples_per_sec": 210.4})
    assert said == [
        "train: step 42/600",
        "train: step 57/600, 9 min left",
        "train: step 72/600, 9 min left, loss 0.5000, 210 samples/s",
    ]
