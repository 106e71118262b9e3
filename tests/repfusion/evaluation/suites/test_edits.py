"""What the suites of edits and of references ask, and what they say of right, copied and spoilt images."""

from pathlib import Path

import numpy as np
import pytest

from repfusion.evaluation.checkpoints import gallery_rows, score_suite
from repfusion.evaluation.columns import asked
from repfusion.evaluation.draw import Drawing
from repfusion.evaluation.gallery import gallery
from repfusion.evaluation.record import EvaluationConfig
from repfusion.evaluation.suites.base import Item, Suite
from repfusion.evaluation.suites.edits import EditsSuite, EditsSuiteConfig, edit_of
from repfusion.evaluation.suites.references import ReferencesSuite, ReferencesSuiteConfig
from repfusion.evaluation.suites.scenes import prompt_of
from repfusion.scenes.captions import Prompt
from repfusion.scenes.detector import check
from repfusion.scenes.edits import EDIT_KINDS
from repfusion.scenes.world import Scene, Thing, WorldConfig, is_held_out, place, render, to_uint8

WORLD = WorldConfig()
EDITS = EditsSuite(EditsSuiteConfig(num_edits=60), seed=0)
REFERENCES = ReferencesSuite(ReferencesSuiteConfig(num_compositions=24), seed=0)
ITEMS, COMPOSITIONS = EDITS.items(), REFERENCES.items()


def scored(suite: Suite, items: list[Item], images: list[np.ndarray]):
    return suite.score(items, suite.judge("cpu")(items, [[image] for image in images]))


def targets() -> list[np.ndarray]:
    return [to_uint8(render(edit_of(item).target, WORLD)) for item in ITEMS]


def sources() -> list[np.ndarray]:
    return [item.request.images[0] for item in ITEMS]


def test_items_are_edits_to_held_out_scenes_every_kind_alike():
    assert [item.truth["kind"] for item in ITEMS] == [*EDIT_KINDS] * 10
    for item in ITEMS:
        edit = edit_of(item)
        assert is_held_out(edit.target) and item.request.prompt == edit.instruction != ""
        (image,) = item.request.images
        assert np.array_equal(image, to_uint8(render(edit.source, WORLD))) and image.dtype == np.uint8
    again = EditsSuite(EditsSuiteConfig(num_edits=60), seed=0).items()
    assert asked(again) == asked(ITEMS) != asked(EditsSuite(EditsSuiteConfig(num_edits=60), 1).items())
    shown = EditsSuite(EditsSuiteConfig(num_edits=12, split="train"), 0).items()
    assert not any(is_held_out(edit_of(item).target) for item in shown)


def test_expected_targets_are_right_to_the_pixel():
    scores = scored(EDITS, ITEMS, targets())
    assert scores.headline_value == scores.values["changed"] == scores.values["kept"] == 1.0
    assert all(scores.values[f"kind/{kind}"] == 1.0 for kind in EDIT_KINDS) and not scores.reasons
    assert scores.values["kept_error"] < 1 / 255


def test_a_copy_of_the_source_keeps_everything_and_changes_nothing():
    scores = scored(EDITS, ITEMS, sources())
    assert (scores.values["changed"], scores.values["kept"], scores.headline_value) == (0.0, 1.0, 0.0)
    assert (scores.values["copy_changed"], scores.values["copy_kept"]) == (0.0, 1.0)
    assert set(scores.reasons) == {item.key for item in ITEMS}


def test_chance_is_what_the_right_images_of_other_edits_of_the_kind_get():
    shifted = targets()
    images = []
    for number, item in enumerate(ITEMS):
        others = [*range(number + 1, len(ITEMS)), *range(number)]
        images.append(shifted[next(i for i in others if ITEMS[i].truth["kind"] == item.truth["kind"])])
    scores = scored(EDITS, ITEMS, images)
    assert scores.values["chance_edited"] == scores.headline_value < 0.2
    for name in ("changed", "kept"):
        assert scores.values[f"chance_{name}"] == scores.values[name]
    assert scores.values["kept_error"] > 0.05


def test_a_blank_image_is_wrong_but_where_things_are_to_go():
    scores = scored(EDITS, ITEMS, [np.full((32, 32, 3), 26, np.uint8)] * len(ITEMS))
    assert scores.headline_value == 0.0
    assert scores.values["changed"] == pytest.approx(1 / 6)  # what was to be removed is gone


def test_what_was_to_stay_is_missed_where_it_moved_changed_or_went():
    item = next(one for one in ITEMS if one.truth["kind"] == "recolour" and len(edit_of(one).kept) == 1)
    edit = edit_of(item)
    (stays,) = edit.kept
    (new,) = (thing for thing in edit.target.things if thing != stays)
    taken = {(int(t.y * 2), int(t.x * 2)) for t in edit.target.things}
    row, col = next((r, c) for r in range(2) for c in range(2) if (r, c) not in taken)
    rng = np.random.default_rng(0)
    colour = next(one for one in WORLD.colours if one not in (stays.colour, new.colour))
    for things, reason in {
        (new,): "is not where it was",
        (new, place(rng, stays.shape, stays.colour, row, col, WORLD)): "is not where it was",
        (new, Thing(stays.shape, colour, stays.x, stays.y, stays.size)): "is not where it was",
        (new, stays, place(rng, "cross", "blue", row, col, WORLD)): "3 things, at most 2",
        (stays,): "where it should be",
    }.items():
        scores = scored(EDITS, [item], [to_uint8(render(Scene(things), WORLD))])
        assert scores.headline_value == 0.0 and reason in scores.reasons[item.key], things


def test_of_several_alike_any_may_go():
    fewer = [
        one
        for one in (edit_of(item) for item in EditsSuite(EditsSuiteConfig(num_edits=120), 3).items())
        if one.kind == "count" and len(one.target.things) < len(one.source.things)
    ]
    assert fewer
    suite = EditsSuite(EditsSuiteConfig(num_edits=120), 3)
    for item in suite.items():
        edit = edit_of(item)
        if edit in fewer:
            others = edit.source.things[::-1][: len(edit.target.things)]
            scores = scored(suite, [item], [to_uint8(render(Scene(others), WORLD))])
            assert scores.headline_value == 1.0 and "kept_error" not in scores.values


def test_images_of_another_size_are_compared_with_the_source_at_theirs():
    large = WORLD.model_copy(update={"image_size": 64})
    scores = scored(EDITS, ITEMS, [to_uint8(render(edit_of(item).target, large)) for item in ITEMS])
    assert scores.headline_value == 1.0 and scores.values["kept_error"] < 1 / 255


def test_compositions_name_their_things_by_their_images_alone():
    for item in COMPOSITIONS:
        prompt, (first, second) = prompt_of(item), item.request.images
        assert item.request.prompt == f"the object of image 1 {prompt.relation} the object of image 2"
        for image, want in zip((first, second), prompt.wanted, strict=True):
            (thing,) = (Thing(**one) for one in REFERENCES.judge("cpu")([item], [[image]])[0])
            assert (thing.shape, thing.colour) == (want.shape, want.colour)
    assert len({str(asked([item])[0]["images"]) for item in COMPOSITIONS}) == len(COMPOSITIONS)


def composed(prompt: Prompt, cells: tuple[tuple[int, int], tuple[int, int]]) -> np.ndarray:
    rng = np.random.default_rng(0)
    pairs = zip(prompt.wanted, cells, strict=True)
    things = [place(rng, want.shape, want.colour, *cell, WORLD) for want, cell in pairs if want.colour]
    return to_uint8(render(Scene(tuple(things)), WORLD))


CELLS = {
    "left of": ((0, 0), (0, 1)),
    "right of": ((0, 1), (0, 0)),
    "above": ((0, 0), (1, 0)),
    "below": ((1, 0), (0, 0)),
}


def test_both_things_have_to_be_there_and_to_stand_as_asked():
    prompts = [prompt_of(item) for item in COMPOSITIONS]
    right = [composed(prompt, CELLS[prompt.relation or "above"]) for prompt in prompts]
    scores = scored(REFERENCES, COMPOSITIONS, right)
    assert scores.headline_value == scores.values["things"] == 1.0
    assert scores.values["placed_by_chance"] == pytest.approx(1 / 6)
    assert scores.values["shuffled"] < 0.2
    across = [composed(prompt, ((0, 0), (1, 1))) for prompt in prompts]
    scores = scored(REFERENCES, COMPOSITIONS, across)
    assert (scores.headline_value, scores.values["things"]) == (0.0, 1.0)
    copies = [item.request.images[0] for item in COMPOSITIONS]
    scores = scored(REFERENCES, COMPOSITIONS, copies)
    assert (scores.headline_value, scores.values["things"]) == (0.0, 0.0)
    assert not any(check([], prompt).correct for prompt in prompts)


class Given(Drawing):
    """Draws the images that it was given."""

    def __init__(self, images: list[np.ndarray]):
        super().__init__(Path("none"), EvaluationConfig(device="cpu"), lambda work: work())
        self.images, self.calls = images, 0

    def identity(self, items, first=0):
        return {"items": asked(items), "images": "given"}

    def check(self, items):
        """All can be drawn."""

    def __call__(self, items, first=0):
        self.calls += 1
        return np.stack(self.images[first : first + len(items)])


def test_images_that_were_asked_with_are_in_the_identity_and_in_the_gallery(tmp_path: Path):
    drawing = Given(targets())
    one = score_suite(EDITS, tmp_path / "edits", drawing)
    assert one.result.scores.headline_value == 1.0 and drawing.calls == 1
    assert score_suite(EDITS, tmp_path / "edits", drawing).scores == one.scores
    assert drawing.calls == 1
    rows = one.rows()
    assert list(rows) == list(EDIT_KINDS) and {len(row) for row in rows.values()} == {6}
    before, after = rows["recolour"][:2]
    assert before.caption == "image 1" and before.is_right is None
    assert after.caption == ITEMS[0].request.prompt and after.is_right is True
    assert np.array_equal(before.image, ITEMS[0].request.images[0])
    two = score_suite(REFERENCES, tmp_path / "references", Given([np.zeros((32, 32, 3), np.uint8)] * 24))
    assert [tile.caption for tile in two.rows()["references"][:3]][:2] == ["image 1", "image 2"]
    picture = gallery(gallery_rows({"edits": one, "references": two}))
    assert picture.width > 6 * 128


def test_each_suite_is_chosen_by_its_name():
    config = EvaluationConfig.model_validate({"suites": {"scenes": {}, "edits": {}, "references": {}}})
    kinds = [type(suite).__name__ for suite in config.build_suites().values()]
    assert kinds == ["ScenesSuite", "EditsSuite", "ReferencesSuite"]
    for suite in config.build_suites().values():
        assert isinstance(suite, Suite)
        assert [value.name for value in suite.values if value.role == "headline"]
