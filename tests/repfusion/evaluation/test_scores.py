"""Perfect images score one, shuffled prompts near nothing, and every count adds up."""

import numpy as np
import pytest

from repfusion.evaluation.gallery import gallery, wrap
from repfusion.evaluation.scores import facts, score_images, shuffled_partners
from repfusion.scenes.captions import TASKS, Prompt, Wanted, possible_tasks, write_prompt
from repfusion.scenes.world import draw_scene, render


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


def test_perfect_images_score_one_and_shuffled_prompts_little():
    prompts, images = prompts_with_images(12)
    result = score_images(images, prompts)
    scores = result.scores
    assert scores.overall >= 0.99
    assert set(scores.per_task) == set(TASKS)
    assert scores.new_concept is not None and scores.new_concept >= 0.99
    assert scores.shuffled_overall <= 0.1
    assert scores.num_prompts == len(prompts) == sum(scores.counts[task].total for task in TASKS)
    assert scores.counts["new_concept"].total == sum(prompt.is_new for prompt in prompts)
    assert sum(verdict.correct for verdict in result.verdicts) == sum(scores.counts[t].correct for t in TASKS)
    assert scores.metrics()["eval/task/counting"] == scores.per_task["counting"]


def test_overall_is_the_mean_over_tasks_not_over_prompts():
    prompts, images = prompts_with_images(2)
    counting = [i for i, prompt in enumerate(prompts) if prompt.task == "counting"]
    extra = prompts + [prompts[counting[0]]] * 10
    blank = np.full((10, 3, 32, 32), 0.1, np.float32)
    scores = score_images(np.concatenate([images, blank]), extra).scores
    assert scores.per_task["counting"] == pytest.approx(2 / 12)
    assert scores.overall == pytest.approx((5 + 2 / 12) / 6)


def test_blank_images_score_nothing():
    prompts, images = prompts_with_images(2)
    scores = score_images(np.full_like(images, 0.1), prompts).scores
    assert (scores.overall, scores.shuffled_overall, scores.new_concept) == (0.0, 0.0, 0.0)


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
    prompts, images = prompts_with_images(1)
    with pytest.raises(ValueError, match="5 images and 6 prompts"):
        score_images(images[:5], prompts[:6])
    with pytest.raises(ValueError, match="2 images, 1 prompts"):
        gallery(images[:2], ["a red circle"])


def test_gallery_shows_the_pixels_and_the_marks():
    images = np.stack([np.full((3, 32, 32), value, np.float32) for value in (0.0, 1.0)])
    picture = gallery(
        images, ["a black nothing", "a white nothing with a long prompt " * 3], [True, False], columns=2
    )
    colours = {colour for _, colour in picture.getcolors(1 << 16)}
    assert {(0, 0, 0), (255, 255, 255), (38, 140, 78), (200, 58, 48)} <= colours
    plain = gallery(images, ["one", "two"], columns=2)
    assert (38, 140, 78) not in {colour for _, colour in plain.getcolors(1 << 16)}
    assert plain.height < picture.height  # long prompts are wrapped, not cut


def test_wrap_keeps_every_word():
    lines = wrap("a purple triangle above a blue square", 12, len)
    assert lines == ["a purple", "triangle", "above a blue", "square"]
