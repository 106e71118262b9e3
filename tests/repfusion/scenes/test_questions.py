"""Answers are right: each is worked out again from the question's words and the scene."""

import numpy as np
import pytest
from scene_texts import NOUNS, holds

from repfusion.scenes.questions import ask, ask_what, ask_where
from repfusion.scenes.world import Scene, Thing, draw_scene


def place_of(thing: Thing) -> str:
    return ("top" if thing.y < 0.5 else "bottom") + (" left" if thing.x < 0.5 else " right")


def answers_of(question: str, scene: Scene) -> list[str]:
    """The right answers, worked out from the question's words alone."""
    names = dict(zip((1, 2, 3, 4), ("one", "two", "three", "four"), strict=True))
    match question.rstrip("?").split():
        case ["how", "many", "things", "are", "there"]:
            return [names[len(scene.things)]]
        case ["how", "many", noun, "are", "there"]:
            return [names[sum(t.shape == NOUNS[noun][0] for t in scene.things)]]
        case ["what", "colour", "is" | "are", "the", noun]:
            (colour,) = {t.colour for t in scene.things if t.shape == NOUNS[noun][0]}
            return [colour]
        case ["in", "which", "corner", "is", "the", colour, shape]:
            return [place_of(t) for t in scene.things if (t.colour, t.shape) == (colour, shape)]
        case ["where", "is", "the", colour, shape]:
            (other,) = [t for t in scene.things if (t.colour, t.shape) != (colour, shape)]
            look = f"{other.colour} {other.shape}"
            return [
                f"{relation} the {look}"
                for relation in ("left of", "right of", "above", "below")
                if holds(f"a {colour} {shape} {relation} a {look}", scene)
            ]
        case ["what", "is", "at", "the", *place]:
            return [f"a {t.colour} {t.shape}" for t in scene.things if place_of(t) == " ".join(place)]
        case ["what", "is", *relation, "the", colour, shape]:
            (other,) = [t for t in scene.things if (t.colour, t.shape) != (colour, shape)]
            look = f"{other.colour} {other.shape}"
            is_so = holds(f"a {look} {' '.join(relation)} a {colour} {shape}", scene)
            return [f"a {look}"] if is_so else []
    raise AssertionError(question)


def test_answers_are_right():
    rng = np.random.default_rng(2)
    begun = set()
    for seed in range(1_500):
        scene = draw_scene(seed)
        question, answer = ask(scene, rng)
        assert [answer] == answers_of(question, scene), (question, scene)
        begun.add(" ".join(question.split()[:3]))
    expected = {"how many things", "what colour is", "where is the", "what is at", "in which corner"}
    assert expected | {"what is above", "what is left"} <= begun


@pytest.mark.parametrize("ask_about", [ask_where, ask_what])
def test_relations_are_asked_from_either_side(ask_about):
    scene = next(scene for scene in map(draw_scene, range(100)) if scene.relation)
    rng = np.random.default_rng(0)
    asked = {ask_about(scene, rng) for _ in range(50)}
    assert len(asked) == 2
    assert all([answer] == answers_of(question, scene) for question, answer in asked)
    lone = next(scene for scene in map(draw_scene, range(100)) if not scene.relation)
    with pytest.raises(ValueError, match="no two things in a relation"):
        ask_about(lone, rng)
