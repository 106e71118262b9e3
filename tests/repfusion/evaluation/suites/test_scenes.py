"""Perfect images score one, shuffled prompts near nothing, and every count adds up."""

import json
from dataclasses import replace

import numpy as np
import pytest

from repfusion.evaluation.columns import asked
from repfusion.evaluation.parts import per_item
from repfusion.evaluation.suites.base import Count, Scores
from repfusion.evaluation.suites.scenes import (
    ScenesSuite,
    ScenesSuiteConfig,
    facts,
    items_of,
    prompt_of,
    shuffled_partners,
)
from repfusion.scenes.captions import TASKS, Prompt, Wanted, draw_prompts, possible_tasks, write_prompt
from repfusion.scenes.detector import check
from repfusion.scenes.world import Scene, Thing, WorldConfig, draw_scene, render


def prompts_with_images(per_task: int) -> tuple[list[Prompt], np.ndarray]:
    """As many prompts of each task, with a rendering of the scene that each was written about."""
    prompts: list[Prompt] = []
    images = []
    counts = dict.fromkeys(TASKS, 0)
    seed = 0
    while min(counts.values()) < per_task:
        scene = draw_scene(seed, split="held_out")
        seed += 1
        for task in possible_tasks(scene):
            if counts[task] < per_task:
                counts[task] += 1
                prompts.append(write_prompt(scene, task))
                images.append(render(scene))
    return prompts, np.stack(images)


SUITE = ScenesSuite(ScenesSuiteConfig(), seed=0)


def score(images: np.ndarray, prompts: list[Prompt]) -> Scores:
    """The suite's judge on images in [0, 1], its answers written as JSON and read, and its rule."""
    items = items_of(prompts)
    outputs = [[image] for image in np.rint(np.moveaxis(images, 1, -1) * 255).astype(np.uint8)]
    return SUITE.score(items, json.loads(json.dumps(SUITE.judge("cpu")(items, outputs))))


def test_items_carry_their_prompts_and_a_row_of_each_task_is_shown():
    items, prompts = SUITE.items(), draw_prompts(240)
    assert [prompt_of(item) for item in items] == prompts
    assert json.loads(json.dumps([item.truth for item in items])) == [item.truth for item in items]
    rows = SUITE.gallery(items)
    assert list(rows) == [task.replace("_", " ") for task in TASKS]
    for task, row in zip(TASKS, rows.values(), strict=True):
        texts = {prompt.text for prompt in prompts if prompt.task == task}
        assert {prompts[i].task for i in row} == {task} and len(row) == 6
        assert len({prompts[i].text for i in row}) == min(6, len(texts))
    assert SUITE.gallery(items[:12]) == {}  # no full row: all items are shown


def test_perfect_images_score_one_and_shuffled_prompts_little():
    prompts, images = prompts_with_images(12)
    scores = score(images, prompts)
    assert scores.headline == "overall" and scores.values["overall"] >= 0.99
    tasks = [f"task/{task}" for task in TASKS]
    position = ["strict_position", "position_floor", "strict_position_floor"]
    assert list(scores.values) == ["overall", *tasks, "new_concept", "shuffled_overall", *position]
    assert list(scores.values) == [value.name for value in SUITE.values]
    assert scores.values["new_concept"] >= 0.99
    assert scores.values["shuffled_overall"] <= 0.1
    assert scores.values["strict_position"] == 1
    assert len(scores.by_item) == len(prompts) == sum(scores.counts[task].total for task in tasks)
    assert scores.counts["new_concept"].total == sum(prompt.is_new for prompt in prompts)
    assert sum(scores.by_item.values()) == sum(scores.counts[task].correct for task in tasks)
    assert {key for key, share in scores.by_item.items() if not share} == scores.reasons.keys()


def test_overall_is_the_mean_over_tasks_not_over_prompts():
    prompts, images = prompts_with_images(2)
    counting = [i for i, prompt in enumerate(prompts) if prompt.task == "counting"]
    extra = prompts + [prompts[counting[0]]] * 10
    blank = np.full((10, *images.shape[1:]), 0.1, np.float32)
    scores = score(np.concatenate([images, blank]), extra)
    assert scores.values["task/counting"] == pytest.approx(2 / 12)
    assert scores.values["overall"] == pytest.approx((5 + 2 / 12) / 6)


def test_blank_images_score_nothing():
    prompts, images = prompts_with_images(2)
    scores = score(np.full_like(images, 0.1), prompts)
    floors = {"position_floor", "strict_position_floor"}
    assert {share for name, share in scores.values.items() if name not in floors} == {0.0}
    assert len(scores.values) == 12 and all(scores.reasons[item.key] for item in items_of(prompts))


def test_what_is_counted_for_no_item_is_no_value():
    prompts, images = prompts_with_images(1)
    old = [i for i, prompt in enumerate(prompts) if not prompt.is_new]
    scores = score(images[old], [prompts[i] for i in old])
    assert "new_concept" not in scores.values and scores.counts["new_concept"].total == 0
    elsewhere = [i for i in old if prompts[i].task != "position"]
    scores = score(images[elsewhere], [prompts[i] for i in elsewhere])
    assert not any("position" in name for name in scores.values)


def test_things_on_a_diagonal_satisfy_position_and_not_its_strict_rule():
    prompts, _ = prompts_with_images(6)
    pairs = [prompt for prompt in prompts if prompt.task == "position"]
    steps = {"left of": (-1, 1), "right of": (1, 1), "above": (1, -1), "below": (1, 1)}
    drawn = []
    for prompt in pairs:
        assert prompt.relation is not None
        dx, dy = steps[prompt.relation]
        first, second = (
            Thing(want.shape, want.colour or "red", 0.5 + side * dx * 0.24, 0.5 + side * dy * 0.24, 0.34)
            for want, side in zip(prompt.wanted, (1, -1), strict=True)
        )
        drawn.append(render(Scene((first, second))))
    scores = score(np.stack(drawn), pairs)
    assert scores.values["task/position"] == 1 and scores.values["strict_position"] == 0
    assert scores.counts["strict_position"] == Count(correct=0, total=len(pairs))


@pytest.mark.parametrize(("cells", "by_geneval", "strictly"), [(2, 4 / 12, 2 / 12), (3, 23 / 72, 13 / 72)])
def test_the_floor_of_position_is_what_random_cells_score(cells, by_geneval, strictly):
    suite = ScenesSuite(ScenesSuiteConfig(cells=cells), seed=0)
    items = suite.items()[:48]
    values = suite.score(items, [[]] * len(items)).values
    assert values["position_floor"] == pytest.approx(by_geneval)
    assert values["strict_position_floor"] == pytest.approx(strictly)
    rng, world = np.random.default_rng(0), WorldConfig(cells=cells)
    prompt = next(prompt_of(item) for item in items if item.truth["task"] == "position")
    found = []
    for seed in range(1500):
        scene = draw_scene(seed, world)
        if len(scene.things) == 2 and not scene.is_count:
            order = rng.permutation(2)
            things = [
                replace(scene.things[i], shape=want.shape, colour=want.colour or "red")
                for i, want in zip(order, prompt.wanted, strict=True)
            ]
            found.append([check(things, prompt, is_strict).correct for is_strict in (False, True)])
    assert np.mean(found, axis=0) == pytest.approx([by_geneval, strictly], abs=0.05)


def test_every_share_has_its_interval_and_lies_in_it():
    prompts, images = prompts_with_images(4)
    images[::3] = 0.1
    scores = score(images, prompts)
    tasks = {f"task/{task}" for task in TASKS}
    assert scores.intervals.keys() == {"overall", *tasks, "new_concept", "strict_position"}
    for name, interval in scores.intervals.items():
        assert 0 <= interval.low <= scores.values[name] <= interval.high <= 1
    widths = {name: one.high - one.low for name, one in scores.intervals.items()}
    assert widths["overall"] < min(widths[task] for task in tasks)
    assert scores == score(images, prompts)


def test_partners_share_the_task_and_never_the_facts():
    prompts, _ = prompts_with_images(10)
    partners = shuffled_partners(prompts, seed=3)
    for prompt, partner in zip(prompts, partners, strict=True):
        assert partner is not None
        assert prompts[partner].task == prompt.task
        assert facts(prompts[partner]) != facts(prompt)
    assert partners == shuffled_partners(prompts, seed=3)
    assert partners != shuffled_partners(prompts, seed=4)


def test_facts_do_not_depend_on_order_or_wording():
    circle, cross = Wanted("circle", "red"), Wanted("cross", "blue")
    first = Prompt("a red circle and a blue cross", "colour_attribution", (circle, cross))
    second = Prompt("draw a blue cross and a red circle", "colour_attribution", (cross, circle))
    assert facts(first) == facts(second)
    left = Prompt("", "position", (circle, cross), "left of")
    assert facts(left) != facts(Prompt("", "position", (circle, cross), "right of"))
    assert facts(left) == facts(Prompt("", "position", (cross, circle), "right of"))


def test_refuses_unequal_numbers():
    prompts, _ = prompts_with_images(1)
    items = items_of(prompts[:6])
    with pytest.raises(ValueError, match="5 answers and 6 items"):
        SUITE.score(items, [[]] * 5)
    with pytest.raises(ValueError, match="5 images; 6 items ask for 6"):
        per_item(np.zeros((5, 32, 32, 3), np.uint8), items)


def test_terse_prompts_ask_for_what_the_plain_ones_do():
    plain, terse = (
        ScenesSuite(ScenesSuiteConfig(num_prompts=24, wording=wording), 3) for wording in ("plain", "terse")
    )
    before, after = plain.items(), terse.items()
    assert [one.truth for one in before] == [one.truth for one in after]
    assert [one.request.prompt for one in after] == [one.request.prompt for one in terse.items()]
    assert sum(a.request.prompt != b.request.prompt for a, b in zip(before, after, strict=True)) > 20
    assert terse.subject == f"terse {plain.subject}"


@pytest.mark.parametrize("rewrite", [None, False, "in full"])
def test_whether_prompts_are_rewritten_is_asked_for(rewrite):
    config = ScenesSuiteConfig.model_validate({"num_prompts": 6, "rewrite": rewrite})
    items = ScenesSuite(config, 0).items()
    assert [one.request.rewrite for one in items] == [rewrite] * 6
    assert ("rewrite" in asked(items)[0]) == (rewrite is not None)
