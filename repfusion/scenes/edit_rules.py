"""An edit and the things that an image shows -> whether what was asked for has changed, and whether the rest
was kept. Exact: no learned part.

What is kept stands in its cell with its look, and nothing has come that nobody asked for. A relation is meant
strictly: on a diagonal a source would satisfy an instruction before anything moved.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from repfusion.scenes.captions import Prompt, Wanted
from repfusion.scenes.detector import check
from repfusion.scenes.edits import Edit, cell_of
from repfusion.scenes.world import INVERSE, Thing, WorldConfig, corner_of

Look = tuple[str, str]
MARGIN = 0.02
"""What belongs to a kept thing beside its box, as a share of the image's side: its blurred edge."""


@dataclass(frozen=True)
class EditFinding:
    """Whether an image shows an edit done; `reason` says what fails first."""

    changed: bool
    kept: bool
    reason: str = ""

    @property
    def is_right(self) -> bool:
        return self.changed and self.kept


def check_edit(edit: Edit, things: Sequence[Thing], world: WorldConfig) -> EditFinding:
    """What the things of an image say of an edit."""
    missing = _not_changed(edit, things, world)
    lost = _not_kept(edit, things, world)
    return EditFinding(not missing, not lost, missing or lost)


def _not_changed(edit: Edit, things: Sequence[Thing], world: WorldConfig) -> str:
    """What of the instruction is not done; empty where all is."""
    new = [thing for thing in edit.target.things if thing not in edit.source.things]
    match edit.kind:
        case "recolour" | "replace":
            absent = [thing for thing in new if not _stands(thing, things, world)]
            return f"no {_said(absent[0])} where it should be" if absent else ""
        case "remove":
            (gone,) = [thing for thing in edit.source.things if thing not in edit.target.things]
            return f"the {_said(gone)} is still there" if _number(gone, things) else ""
        case "add" | "move":
            return _not_placed(edit, new[0], things)
        case "count":
            number, wanted = _number(edit.target.things[0], things), len(edit.target.things)
            return "" if number == wanted else f"{number} instead of {wanted}"


def _not_placed(edit: Edit, thing: Thing, things: Sequence[Thing]) -> str:
    """Whether a thing that was added or moved is missing, or not where the instruction wants it."""
    found = [one for one in things if _look(one) == _look(thing)]
    if not found:
        return f"no {_said(thing)}"
    if edit.kind == "move" and not edit.kept:
        corner = corner_of(thing)
        return "" if corner in map(corner_of, found) else f"no {_said(thing)} at the {corner}"
    relation = next((one for one in INVERSE if f" {one} " in edit.instruction), None)
    if relation is None:
        return ""
    (other,) = edit.kept
    wanted = tuple(Wanted(one.shape, one.colour) for one in (thing, other))
    return check(list(things), Prompt("", "position", wanted, relation), is_strict=True).reason


def _not_kept(edit: Edit, things: Sequence[Thing], world: WorldConfig) -> str:
    """What was to stay and has not; empty where all has. Where some of several alike are to go, any may."""
    wanted = edit.kept if certain(edit) else edit.source.things
    stay = [thing for thing in wanted if _stands(thing, things, world)]
    if len(stay) < len(edit.kept):
        lost = next(thing for thing in wanted if thing not in stay)
        return f"the {_said(lost)} is not where it was"
    most = max(len(edit.source.things), len(edit.target.things))
    return f"{len(things)} things, at most {most} were to be seen" if len(things) > most else ""


def certain(edit: Edit) -> bool:
    """Whether the instruction settles which things stay."""
    return edit.kind != "count" or len(edit.target.things) > len(edit.source.things)


def kept_error(
    edit: Edit, before: Float[np.ndarray, "3 h w"], after: Float[np.ndarray, "3 h w"]
) -> float | None:
    """Mean absolute difference in [0, 1] over the boxes of the things that stay; None where none surely
    does. Both images are square and of one size.
    """
    if not (certain(edit) and edit.kept):
        return None
    side = before.shape[1]
    boxes = np.zeros((side, side), bool)
    for thing in edit.kept:
        rows, cols = (_within(centre, thing.size, side) for centre in (thing.y, thing.x))
        boxes[rows, cols] = True
    return float(np.abs(after - before)[:, boxes].mean())


def _within(centre: float, size: float, side: int) -> slice:
    half = size / 2 + MARGIN
    return slice(max(0, int((centre - half) * side)), int(np.ceil((centre + half) * side)))


def _stands(thing: Thing, things: Sequence[Thing], world: WorldConfig) -> bool:
    """Whether a thing of its look is found in its cell."""
    place = _look(thing), cell_of(thing, world)
    return any((_look(one), cell_of(one, world)) == place for one in things)


def _number(thing: Thing, things: Sequence[Thing]) -> int:
    return sum(_look(one) == _look(thing) for one in things)


def _look(thing: Thing) -> Look:
    return thing.colour, thing.shape


def _said(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"
