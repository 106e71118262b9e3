"""Every text says what is so; a reader written for these tests checks it against the scene."""

import numpy as np
import pytest
from scene_texts import JOINTS, holds, read, states

from repfusion.scenes.captions import (
    TASKS,
    canonical_caption,
    caption_scene,
    draw_prompts,
    possible_tasks,
    write_prompt,
)
from repfusion.scenes.world import (
    HELD_OUT_PAIRS,
    INVERSE,
    Scene,
    Thing,
    WorldConfig,
    draw_scene,
    is_held_out,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(seed) for seed in range(1500)] + [draw_scene(s, split="held_out") for s in range(300)]


def test_captions_are_true_and_vary(scenes):
    rng = np.random.default_rng(0)
    texts = [caption_scene(scene, rng) for scene in scenes]
    assert [(text, scene) for text, scene in zip(texts, scenes, strict=True) if not holds(text, scene)] == []
    scene = next(scene for scene in scenes if scene.relation)
    assert len({caption_scene(scene, rng) for _ in range(200)}) > 30
    assert {joint for joint in JOINTS if any(f" {joint} " in text for text in texts)} == set(JOINTS)
    assert all(
        any(text.startswith(prefix) for text in texts) for prefix in ("draw ", "there are ", "a photo of ")
    )


def test_prompts_state_the_facts_they_carry(scenes):
    rng = np.random.default_rng(0)
    for scene in scenes:
        for task in possible_tasks(scene):
            for prompt in (write_prompt(scene, task), write_prompt(scene, task, rng, bool(rng.integers(2)))):
                assert read(prompt.text) == (prompt.wanted, prompt.relation)
                assert prompt.task == task
                assert holds(prompt.text, scene)


def test_tasks_follow_the_scene(scenes):
    asked = {task: 0 for task in TASKS}
    for scene in scenes:
        for task in possible_tasks(scene):
            asked[task] += 1
        for task in set(TASKS) - set(possible_tasks(scene)):
            with pytest.raises(ValueError, match=f"no {task} prompt"):
                write_prompt(scene, task)
    assert min(asked.values()) > 100


def test_a_description_is_canonical_and_complete(scenes):
    """One text per content, whatever the order in which the scene lists its things, and the jitter."""
    for scene in scenes:
        text = canonical_caption(scene)
        assert holds(text, scene)
        wanted, relation = read(text)
        assert sum(want.number for want in wanted) == len(scene.things)
        assert all(want.colour is not None for want in wanted)
        assert relation in (None, "left of", "above")
        assert (relation is None) == (scene.relation is None)
        turned = Scene(scene.things[::-1], INVERSE[scene.relation] if scene.relation else None)
        moved = tuple(Thing(t.shape, t.colour, t.x + 0.01, t.y - 0.01, t.size * 0.95) for t in scene.things)
        assert canonical_caption(turned) == canonical_caption(Scene(moved, scene.relation)) == text


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (Scene((Thing("cross", "blue", 0.2, 0.2, 0.3),)), "a blue cross"),
        (
            Scene(tuple(Thing("cross", "blue", x, 0.2, 0.3) for x in (0.2, 0.7))),
            "two blue crosses",
        ),
        (
            Scene(
                (Thing("circle", "red", 0.7, 0.2, 0.3), Thing("square", "cyan", 0.2, 0.2, 0.3)), "right of"
            ),
            "a cyan square left of a red circle",
        ),
        (
            Scene((Thing("circle", "red", 0.7, 0.7, 0.3), Thing("square", "cyan", 0.2, 0.2, 0.3))),
            "a cyan square and a red circle",
        ),
    ],
)
def test_descriptions(scene, text):
    assert canonical_caption(scene) == text


def test_held_out_prompts_ask_for_what_training_never_showed():
    prompts = draw_prompts(120)
    assert [prompt.task for prompt in prompts[:6]] == list(TASKS)
    assert {task: sum(p.task == task for p in prompts) for task in TASKS} == dict.fromkeys(TASKS, 20)
    assert all(read(prompt.text) == (prompt.wanted, prompt.relation) for prompt in prompts)
    train = [draw_scene(seed) for seed in range(2000)]
    for prompt in prompts:
        if prompt.task in (
            "single_object",
            "two_objects",
        ):  # name no colours, so name nothing that is held out
            assert all(want.colour is None for want in prompt.wanted)
            continue
        facts = read(prompt.text)
        assert not any(states(*facts, scene) for scene in train if scene.relation or not facts[1]), (
            prompt.text
        )


@pytest.mark.parametrize("task", ["colours", "counting", "colour_attribution"])
def test_the_things_of_held_out_prompts_are_held_out(task):
    for prompt in draw_prompts(120):
        if prompt.task == task:
            things = tuple(
                Thing(want.shape, want.colour, 0.5, 0.5, 0.3)
                for want in prompt.wanted
                for _ in range(want.number)
            )
            assert is_held_out(Scene(things)), prompt.text


def test_held_out_prompts_of_position_are_held_out_in_their_relation():
    for prompt in draw_prompts(120):
        if prompt.task == "position":
            things = tuple(Thing(want.shape, want.colour, 0.5, 0.5, 0.3) for want in prompt.wanted)
            assert is_held_out(Scene(things, prompt.relation)), prompt.text


def test_a_held_out_prompt_is_unseen_in_the_fact_of_its_task_alone():
    for prompt in draw_prompts(240):
        unseen = [(want.colour, want.shape) in HELD_OUT_PAIRS for want in prompt.wanted]
        if prompt.task == "colours":
            assert all(unseen), prompt.text
        elif prompt.task in ("counting", "position", "colour_attribution"):
            assert not any(unseen), prompt.text


def test_held_out_prompts_are_the_same_every_time_and_differ_by_seed():
    assert draw_prompts(30) == draw_prompts(60)[:30]
    assert draw_prompts(30) != draw_prompts(30, seed=1)


def test_held_out_prompts_name_new_things_only_where_admitted():
    assert not any(prompt.is_new for prompt in draw_prompts(60, include_new=False))
    prompts = draw_prompts(180)
    assert 0.1 < np.mean([prompt.is_new for prompt in prompts]) < 0.45
    named = {word for prompt in prompts for word in prompt.text.split()}
    assert {"diamond", "cyan"} <= named


def test_prompts_hold_for_scenes_of_the_base_alone():
    config = WorldConfig(shapes=("circle", "square"), colours=("red", "green"))
    rng = np.random.default_rng(0)
    for seed in range(100):
        scene = draw_scene(seed, config)
        assert holds(caption_scene(scene, rng), scene)


def test_prompts_of_the_training_split_ask_for_what_training_shows():
    prompts = draw_prompts(120, split="train")
    assert [prompt.task for prompt in prompts[:6]] == list(TASKS)
    looks = {(want.colour, want.shape) for prompt in prompts for want in prompt.wanted}
    assert not looks & HELD_OUT_PAIRS
    assert prompts != draw_prompts(120) and prompts[:60] == draw_prompts(60, split="train")
