"""Edits do what they say and nothing else: each target is worked out again from the instruction's words."""

from collections import Counter

import numpy as np
import pytest
from scene_texts import holds

from repfusion.scenes.captions import NUMBERS
from repfusion.scenes.edits import EDIT_KINDS, Edit, draw_edit, possible_edits
from repfusion.scenes.world import (
    COLOURS,
    SHAPES,
    Scene,
    Thing,
    WorldConfig,
    corner_of,
    draw_scene,
    is_held_out,
    render,
)

WORLD = WorldConfig(image_size=64)
RELATIONS = ("left of", "right of", "above", "below")


def drawn(num: int, **more) -> list[Edit]:
    rng = np.random.default_rng(0)
    return [draw_edit(draw_scene(seed, WORLD), rng, WORLD, **more) for seed in range(num)]


def named(text: str, scene: Scene) -> list[Thing]:
    """The things of a scene that a text names as "the red circle", "the circles"."""
    words = text.replace("crosses", "cross").split()
    found = []
    for thing in scene.things:
        for place, word in enumerate(words):
            is_it = word.rstrip("s") == thing.shape.rstrip("s")
            says = words[place - 1]
            if is_it and says in ("the", thing.colour) and "the" in words[max(0, place - 2) : place]:
                found.append(thing)
    return list(dict.fromkeys(found))


def test_every_kind_of_edit_is_drawn_and_none_else():
    edits = drawn(1_200)
    counts = Counter(edit.kind for edit in edits)
    assert set(counts) == set(EDIT_KINDS) and min(counts.values()) > 60
    assert all(edit.kind in possible_edits(edit.source) for edit in edits)


def test_what_is_not_said_to_change_stays_to_the_pixel():
    for edit in drawn(400):
        others = [thing for thing in edit.source.things if thing not in named(edit.instruction, edit.source)]
        if edit.kind == "count":
            assert len(edit.kept) == min(len(edit.source.things), len(edit.target.things))
            continue
        if edit.kind == "add":
            others = list(edit.source.things)
        assert set(others) <= set(edit.kept), edit
        before, after = render(edit.source, WORLD), render(edit.target, WORLD)
        for thing in edit.kept:
            half = thing.size / 2
            box = [slice(int((c - half) * 64), int(np.ceil((c + half) * 64))) for c in (thing.y, thing.x)]
            assert np.array_equal(before[:, *box], after[:, *box])


def test_a_thing_changes_as_it_is_told():
    for edit in drawn(1_200):
        words = edit.instruction.split()
        changed = [thing for thing in edit.target.things if thing not in edit.source.things]
        gone = [thing for thing in edit.source.things if thing not in edit.target.things]
        match edit.kind:
            case "recolour":
                assert {thing.colour for thing in changed} == {words[-1]}
                assert [(t.shape, t.x, t.y, t.size) for t in changed] == [
                    (t.shape, t.x, t.y, t.size) for t in gone
                ]
                assert gone == [t for t in edit.source.things if t in named(edit.instruction, edit.source)]
            case "replace":
                (shape,) = {thing.shape for thing in changed}
                assert shape in (words[-1], words[-1].removesuffix("s"), words[-1].removesuffix("es"))
                assert [(t.colour, t.x, t.y, t.size) for t in changed] == [
                    (t.colour, t.x, t.y, t.size) for t in gone
                ]
            case "remove":
                assert not changed and gone == named(edit.instruction, edit.source)
            case "add":
                assert not gone and len(changed) == 1
                assert f"a {changed[0].colour} {changed[0].shape}" in edit.instruction
            case "move":
                assert len(changed) == len(gone) == 1
                assert (changed[0].shape, changed[0].colour) == (gone[0].shape, gone[0].colour)
            case "count":
                assert not (changed and gone)
                assert len({(t.shape, t.colour) for t in edit.target.things}) == 1
                number, was = len(edit.target.things), len(edit.source.things)
                assert {NUMBERS[number], NUMBERS[abs(number - was)]} & set(words)


def test_a_place_that_is_told_is_taken():
    seen = Counter()
    for edit in drawn(1_500):
        relation = next((one for one in RELATIONS if f" {one} " in edit.instruction), None)
        changed = [thing for thing in edit.target.things if thing not in edit.source.things]
        if relation is not None:
            (other,) = edit.kept
            text = f"a {changed[0].colour} {changed[0].shape} {relation} a {other.colour} {other.shape}"
            assert holds(text, edit.target), edit
            assert not edit.source.relation or not holds(text, edit.source)
            seen[edit.kind, relation] += 1
        elif edit.kind == "move":
            assert edit.instruction.endswith(corner_of(changed[0]))
            assert edit.described.endswith(f" at the {corner_of(changed[0])}")
    assert len(seen) == 8


def test_a_description_of_the_target_holds():
    for edit in drawn(600):
        text = edit.described.split(" at the ")[0]
        assert holds(text, edit.target), edit
        if edit.kind == "add" and not any(one in edit.instruction for one in RELATIONS):
            assert " and " in text  # where it stands was not said


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_targets_are_of_the_split(split):
    assert all(is_held_out(edit.target) == (split == "held_out") for edit in drawn(150, split=split))


def test_a_kind_that_a_scene_does_not_admit_is_an_error():
    scene = next(scene for scene in map(draw_scene, range(99)) if len(scene.things) == 1)
    with pytest.raises(ValueError, match="no train edit of the kinds"):
        draw_edit(scene, np.random.default_rng(0), WORLD, ["count"])


def test_edits_keep_to_the_worlds_shapes_and_colours():
    world = WorldConfig(shapes=("circle", "square", "cross"), colours=("red", "green", "blue"))
    rng = np.random.default_rng(0)
    for seed in range(150):
        target = draw_edit(draw_scene(seed, world), rng, world).target
        assert {t.shape for t in target.things} <= set(world.shapes) < set(SHAPES)
        assert {t.colour for t in target.things} <= set(world.colours) < set(COLOURS)
