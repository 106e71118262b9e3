"""Every text says what is so; a reader written for these tests checks it against the scene."""

import re

import numpy as np
import pytest

from repfusion.scenes.captions import (
    TASKS,
    Wanted,
    ask,
    canonical_caption,
    caption_scene,
    claim,
    draw_prompts,
    possible_tasks,
    write_prompt,
)
from repfusion.scenes.world import (
    COLOURS,
    HELD_OUT_PAIRS,
    INVERSE,
    SHAPES,
    Scene,
    Thing,
    WorldConfig,
    draw_scene,
    is_held_out,
)

PREFIX = re.compile(r"^(a photo of|a picture of|an image of|a drawing of|there is|there are|draw) ")
PHRASES = {
    "left of": ["to the left of", "on the left of", "left of"],
    "right of": ["to the right of", "on the right of", "right of"],
    "above": ["above", "over", "on top of"],
    "below": ["below", "under", "beneath"],
}
JOINTS = {phrase: relation for relation, phrases in PHRASES.items() for phrase in phrases} | {"and": None}
NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4}
NOUNS = {shape: (shape, 1) for shape in SHAPES}
NOUNS |= {shape + ("es" if shape == "cross" else "s"): (shape, 2) for shape in SHAPES}


def read_phrase(phrase: str) -> Wanted:
    number, *colour, noun = phrase.split()
    shape, least = NOUNS[noun]
    assert (NUMBERS[number] > 1) == (least > 1), phrase
    assert len(colour) <= 1 and set(colour) <= set(COLOURS), phrase
    return Wanted(shape, colour[0] if colour else None, NUMBERS[number])


def read(text: str) -> tuple[tuple[Wanted, ...], str | None]:
    """The facts of a text; fails on any text outside the grammar."""
    text = PREFIX.sub("", text)
    joint = max((j for j in JOINTS if f" {j} " in text), key=len, default=None)
    if joint is None:
        return (read_phrase(text),), None
    first, second = text.split(f" {joint} ")
    return (read_phrase(first), read_phrase(second)), JOINTS[joint]


def matching(scene: Scene, want: Wanted) -> list[Thing]:
    return [t for t in scene.things if t.shape == want.shape and want.colour in (None, t.colour)]


def holds(text: str, scene: Scene) -> bool:
    return states(*read(text), scene)


def states(wanted: tuple[Wanted, ...], relation: str | None, scene: Scene) -> bool:
    found = [matching(scene, want) for want in wanted]
    if any(len(things) != want.number for things, want in zip(found, wanted, strict=True)):
        return False
    if relation is None:
        return True
    (a,), (b,) = found
    dx, dy = a.x - b.x, a.y - b.y
    return {
        "left of": dx < -abs(dy),
        "right of": dx > abs(dy),
        "above": dy < -abs(dx),
        "below": dy > abs(dx),
    }[relation]


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


def test_claims_are_true_when_they_say_so_and_false_by_one_fact_otherwise(scenes):
    rng = np.random.default_rng(1)
    kinds = []
    for scene in scenes:
        text, is_true = claim(scene, rng)
        assert holds(text, scene) == is_true, (text, scene)
        if is_true:
            kinds.append("true")
            continue
        wanted, _ = read(text)
        if all(len(matching(scene, want)) == want.number for want in wanted):
            kinds.append("relation")
            continue
        (wrong,) = [want for want in wanted if len(matching(scene, want)) != want.number]
        if matching(scene, wrong):
            kinds.append("number")
        else:
            kinds.append("colour" if wrong.shape in {t.shape for t in scene.things} else "shape")
    shares = {kind: kinds.count(kind) / len(kinds) for kind in set(kinds)}
    assert shares["true"] == pytest.approx(0.5, abs=0.05)
    assert shares.keys() == {"true", "relation", "number", "colour", "shape"}
    assert min(shares.values()) > 0.03


def place_of(thing: Thing) -> str:
    return ("top" if thing.y < 0.5 else "bottom") + (" left" if thing.x < 0.5 else " right")


def answer_of(question: str, scene: Scene) -> str:
    """The answer, worked out from the question's words alone."""
    names = dict(zip((1, 2, 3, 4), ("one", "two", "three", "four"), strict=True))
    match question.rstrip("?").split():
        case ["how", "many", "things", "are", "there"]:
            return names[len(scene.things)]
        case ["how", "many", noun, "are", "there"]:
            return names[sum(t.shape == NOUNS[noun][0] for t in scene.things)]
        case ["what", "colour", "is" | "are", "the", noun]:
            (colour,) = {t.colour for t in scene.things if t.shape == NOUNS[noun][0]}
            return colour
        case ["where", "is", "the", colour, shape]:
            (thing,) = [t for t in scene.things if (t.colour, t.shape) == (colour, shape)]
            return place_of(thing)
        case ["what", "is", "at", "the", *place]:
            (thing,) = [t for t in scene.things if place_of(t) == " ".join(place)]
            return f"a {thing.colour} {thing.shape}"
        case ["what", "is", *relation, "the", shape]:
            others = [t for t in scene.things if t.shape != shape]
            (thing,) = [t for t in others if holds(f"a {t.shape} {' '.join(relation)} a {shape}", scene)]
            return f"a {thing.colour} {thing.shape}"
    raise AssertionError(question)


def test_answers_are_right(scenes):
    rng = np.random.default_rng(2)
    questions = set()
    for scene in scenes:
        question, answer = ask(scene, rng)
        assert answer == answer_of(question, scene), (question, scene)
        questions.add(" ".join(question.split()[:3]))
    assert {"how many things", "what colour is", "where is the", "what is at", "what is above"} <= questions


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
