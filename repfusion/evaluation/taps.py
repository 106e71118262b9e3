"""A checkpoint of LAP and sets of its taps -> scores without each set, beside those with all.

OUT/  taps.json           what every set scored, written last
      all/                the evaluation with all taps, as `checkpoints.py` writes it
      without_4_28_31/    that of a set
"""

from collections.abc import Sequence
from pathlib import Path

from repfusion.conditioning.lap import drop_taps
from repfusion.config import Strict
from repfusion.evaluation.checkpoints import evaluate_checkpoint
from repfusion.evaluation.record import EvaluationConfig
from repfusion.evaluation.shown import in_brief
from repfusion.files import write_json
from repfusion.model.check import check_flow
from repfusion.model.config import flow_of
from repfusion.runs.checkpoint import read_config

TAPS = "taps.json"
Taps = tuple[int, ...]


class WithoutTaps(Strict):
    """What a checkpoint scored without some of its taps."""

    dropped: Taps
    folder: str
    metrics: dict[str, float]
    """Values by their names in a tracker, such as `eval/overall`."""


def taps_of(text: str) -> Taps:
    """Numbers between commas. Raises ValueError where one is none."""
    return tuple(int(one) for one in text.split(","))


def evaluate_without(
    checkpoint: Path, out: Path, config: EvaluationConfig, sets: Sequence[Taps]
) -> list[str]:
    """Evaluates with all taps and without each set, of the same prompts and noise; says each in a line.

    Raises:
        ValueError: as `evaluate_checkpoint` and `drop_taps` do.
    """
    # a set that does not fit is said before hours of others
    bare = check_flow(flow_of(read_config(checkpoint)[0], "--drop-taps"))
    for dropped in sets:
        drop_taps(bare.conditioner, dropped)
    found: list[WithoutTaps] = []
    lines: list[str] = []
    for dropped in dict.fromkeys([(), *sets]):
        folder = "without_" + "_".join(map(str, dropped)) if dropped else "all"
        own = config.model_copy(update={"dropped_taps": dropped})
        evaluation = evaluate_checkpoint(checkpoint, out / folder, own)
        found.append(WithoutTaps(dropped=dropped, folder=folder, metrics=evaluation.metrics()))
        lines.append(f"{folder}: {in_brief(evaluation)}")
    write_json(out / TAPS, [one.model_dump(mode="json") for one in found])
    return lines
