"""Edits of scenes, and what an exact detector sees in their images -> whether what was asked for has changed,
whether the rest was kept, and what a copy of the source and other targets would get.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Literal

import numpy as np
from pydantic import Field

from repfusion.config import Config
from repfusion.evaluation.suites.base import Answer, Count, Image, Item, Judge, Scores, Value, check_answered
from repfusion.evaluation.suites.intervals import mean_interval, wilson
from repfusion.evaluation.suites.scenes import count, things_of
from repfusion.request import Request
from repfusion.scenes.captions import Wording
from repfusion.scenes.detector import detect
from repfusion.scenes.edit_rules import EditFinding, check_edit, kept_error
from repfusion.scenes.edits import EDIT_KINDS, Edit, draw_triple
from repfusion.scenes.world import Split, WorldConfig, render, scene_of, to_uint8

PAIRS_SHOWN = 3
"""Edits in a row of the gallery: each is its source and its result."""
VALUES = (
    Value("edited", "edited", "headline", meaning="changed as asked and kept the rest (mean over kinds)"),
    *(Value(f"kind/{kind}", kind, "part") for kind in EDIT_KINDS),
    Value("changed", "changed", "beside", meaning="changed as asked"),
    Value("kept", "kept", "beside", meaning="kept the rest"),
    Value("kept_error", "pixel error", "beside", meaning="mean difference of pixels where things stay"),
    Value("copy_changed", "source: changed", "floor", legend="a copy of the source, changed"),
    Value("copy_kept", "source: kept", "floor", legend="a copy of the source, kept"),
    Value("chance_edited", "by chance", "floor", legend="targets of other edits"),
    Value("chance_changed", "by chance: changed", "floor", legend="targets of other edits, changed"),
    Value("chance_kept", "by chance: kept", "floor", legend="targets of other edits, kept"),
)


class EditsSuiteConfig(Config):
    kind: Literal["edits"] = "edits"
    num_edits: int = Field(default=120, ge=1)
    """The kinds of edits in turn."""
    split: Split = "held_out"
    """Edits to a combination that no training image shows, or to such as training shows."""
    wording: Wording = "plain"
    """How instructions are put."""
    rewrite: str | Literal[False] | None = None
    """System prompt under which a model that rewrites instructions does so, in sight of the source; False:
    it leaves them as they are; None: its own habit.
    """
    world: WorldConfig = WorldConfig()
    """Size of the source images, shapes, colours and cells."""


class EditsSuite:
    """Instructions with a source image, judged without any learned part."""

    values: Sequence[Value] = VALUES
    about = (
        "whose image shows what was asked for and all the rest as it was, checked by an exact detector of "
        "shapes and colours: things that stay are in their cells with their looks, and nothing else has "
        "come; *pixel error* is the mean difference from the source, in [0, 1], where things stay; *by "
        "chance*: the right images of other edits of the kind; *source*: the source image itself"
    )
    judge_version = "detector 2, kept boxes 1"
    rule_version = "edits 1"

    def __init__(self, config: EditsSuiteConfig, seed: int):
        self.config, self.seed = config, seed
        self.subject = {
            "held_out": "edits to held-out combinations",
            "train": "edits to combinations that training shows",
        }[config.split]

    def items(self) -> list[Item]:
        config = self.config
        first = first_seed(self.seed)
        edits = [
            draw_triple(
                first + i, config.world, {EDIT_KINDS[i % len(EDIT_KINDS)]: 1.0}, config.split, config.wording
            )
            for i in range(config.num_edits)
        ]
        return [_item(number, edit, config) for number, edit in enumerate(edits)]

    def judge(self, device: str) -> Judge:
        return self._look

    def _look(self, items: Sequence[Item], outputs: Sequence[Sequence[Image]]) -> list[Answer]:
        """Things that each item's image shows, and the error where things stay."""
        return [self._answer(edit_of(one), images[0]) for one, images in zip(items, outputs, strict=True)]

    def _answer(self, edit: Edit, image: Image) -> Answer:
        pixels = np.moveaxis(image, -1, 0).astype(np.float32) / 255
        before = render(edit.source, self.config.world.model_copy(update={"image_size": len(image)}))
        things = [asdict(thing) for thing in detect(pixels)]
        return {"things": things, "kept_error": kept_error(edit, before, pixels)}

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> Scores:
        """Shares of edits that are right (`edited`, the mean over `kind/...`), that changed what they should,
        and that kept the rest; `kept_error` is the mean over edits in which something surely stays.

        Raises:
            ValueError: where items and answers differ in number, or there are none.
        """
        check_answered(items, answers)
        edits, world = [edit_of(item) for item in items], self.config.world
        found = [
            check_edit(edit, things_of(answer["things"]), world)
            for edit, answer in zip(edits, answers, strict=True)
        ]
        kinds = _by_kind(edits, found)
        counted = {
            **{f"kind/{kind}": one for kind, one in kinds.items()},
            "changed": count([one.changed for one in found]),
            "kept": count([one.kept for one in found]),
        }
        errors = [error for answer in answers if (error := answer["kept_error"]) is not None]
        named = {
            "edited": _mean(kinds),
            **{name: one.correct / one.total for name, one in counted.items()},
            **({"kept_error": float(np.mean(errors))} if errors else {}),
            **_floors(edits, world),
        }
        return Scores(
            headline="edited",
            values={value.name: named[value.name] for value in VALUES if value.name in named},
            counts=counted,
            intervals={
                "edited": mean_interval(kinds.values()),
                **{name: wilson(one) for name, one in counted.items()},
            },
            by_item={item.key: float(one.is_right) for item, one in zip(items, found, strict=True)},
            reasons={i.key: one.reason for i, one in zip(items, found, strict=True) if not one.is_right},
        )

    def gallery(self, items: Sequence[Item]) -> Mapping[str, Sequence[int]]:
        """A row of each kind."""
        rows = {kind: [i for i, one in enumerate(items) if one.truth["kind"] == kind] for kind in EDIT_KINDS}
        return {kind: row[:PAIRS_SHOWN] for kind, row in rows.items() if row}


def first_seed(seed: int) -> int:
    """Where a suite's items begin: apart from what a source of the same seed draws for training."""
    return (seed << 32) + (1 << 31)


def _item(number: int, edit: Edit, config: EditsSuiteConfig) -> Item:
    truth = {
        "kind": edit.kind,
        "described": edit.described,
        "source": edit.source.facts,
        "target": edit.target.facts,
    }
    source = to_uint8(render(edit.source, config.world))
    return Item(f"{number:05d}", Request(edit.instruction, (source,), rewrite=config.rewrite), truth=truth)


def edit_of(item: Item) -> Edit:
    """The edit that an item was made of."""
    truth = item.truth
    source, target = (scene_of(truth[name]) for name in ("source", "target"))
    return Edit(truth["kind"], source, item.request.prompt, target, truth["described"])


def _by_kind(edits: Sequence[Edit], found: Sequence[EditFinding]) -> dict[str, Count]:
    """How many edits of each kind that occurs are right."""
    pairs = list(zip(edits, found, strict=True))
    right = {kind: [one.is_right for edit, one in pairs if edit.kind == kind] for kind in EDIT_KINDS}
    return {kind: count(values) for kind, values in right.items() if values}


def _mean(counts: Mapping[str, Count]) -> float:
    return float(np.mean([one.correct / one.total for one in counts.values()]))


def _floors(edits: Sequence[Edit], world: WorldConfig) -> dict[str, float]:
    """What copies of the sources score, and the right images of other edits of the same kind."""
    copies = [check_edit(edit, edit.source.things, world) for edit in edits]
    partners = [(edit, _other(number, edits)) for number, edit in enumerate(edits)]
    pairs = [(edit, other) for edit, other in partners if other is not None]
    chances = [check_edit(edit, other.target.things, world) for edit, other in pairs]
    floors = {
        "copy_changed": float(np.mean([one.changed for one in copies])),
        "copy_kept": float(np.mean([one.kept for one in copies])),
    }
    if not chances:
        return floors
    return floors | {
        "chance_edited": _mean(_by_kind([edit for edit, _ in pairs], chances)),
        "chance_changed": float(np.mean([one.changed for one in chances])),
        "chance_kept": float(np.mean([one.kept for one in chances])),
    }


def _other(number: int, edits: Sequence[Edit]) -> Edit | None:
    """The next edit of the same kind, round in a circle; None where there is no other."""
    later = [*edits[number + 1 :], *edits[:number]]
    return next((one for one in later if one.kind == edits[number].kind), None)
