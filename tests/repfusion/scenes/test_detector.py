"""The detector accepts what prompts state, rejects each wrong fact, and bears the flaws of decoded images."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from slowly import all_but_one_slow

from repfusion.scenes.captions import TASKS, Prompt, Wanted, possible_tasks, write_prompt
from repfusion.scenes.detector import background_of, check, detect, score_image
from repfusion.scenes.world import (
    BACKGROUNDS,
    INVERSE,
    Scene,
    Thing,
    WorldConfig,
    draw_scene,
    render,
)

LEFT_RED_CIRCLE = Thing("circle", "red", 0.25, 0.27, 0.36)
RIGHT_BLUE_SQUARE = Thing("square", "blue", 0.75, 0.24, 0.34)
PAIR = Scene((LEFT_RED_CIRCLE, RIGHT_BLUE_SQUARE), "left of")
THREE_CROSSES = Scene(
    tuple(Thing("cross", "green", x, y, 0.35) for x, y in ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75)))
)


def held_out_set(config: WorldConfig, num: int) -> list[tuple[Scene, np.ndarray]]:
    scenes = [draw_scene(seed, config, "held_out") for seed in range(num)]
    return [(scene, render(scene, config)) for scene in scenes]


def degrade(pixels: np.ndarray, blur_px: float, noise: float, seed: int) -> np.ndarray:
    blurred = gaussian_filter(pixels, (0, blur_px, blur_px)) if blur_px else pixels
    return (blurred + np.random.default_rng(seed).normal(0, noise, pixels.shape)).astype(np.float32)


@pytest.mark.parametrize("image_size", [pytest.param(32, marks=pytest.mark.slow), 64])
@pytest.mark.parametrize(
    ("blur_px", "noise"),
    [(0, 0), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((0.6, 0), (0, 0.03))), (0.6, 0.03)],
)
def test_held_out_renderings_satisfy_their_prompts_and_hardly_any_other(image_size, blur_px, noise):
    shown = held_out_set(WorldConfig(image_size=image_size), 150)
    things = [
        detect(degrade(pixels, blur_px * image_size / 32, noise, i)) for i, (_, pixels) in enumerate(shown)
    ]
    own, other = [], []
    for i, (scene, _) in enumerate(shown):
        for task in possible_tasks(scene):
            prompt = write_prompt(scene, task)
            own.append(check(things[i], prompt).correct)
            if task not in ("single_object", "two_objects"):  # prompts without colours fit many scenes
                other.append(check(things[(i + 1) % len(shown)], prompt).correct)
    assert np.mean(own) >= 0.99
    assert np.mean(other) <= 0.05


def looks(things: Iterable[Thing]) -> Counter[tuple[str, str]]:
    return Counter((thing.shape, thing.colour) for thing in things)


def exact_share(config: WorldConfig, num: int, blur_px: float = 0, noise: float = 0) -> float:
    """Share of images in which the detector finds every thing and nothing else."""
    return float(
        np.mean(
            [
                looks(detect(degrade(pixels, blur_px, noise, i))) == looks(scene.things)
                for i, (scene, pixels) in enumerate(held_out_set(config, num))
            ]
        )
    )


@pytest.mark.parametrize("texture", all_but_one_slow([None, "stripes", "grain"], "grain"))
@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("cells", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_every_world_is_read_without_a_fault(cells, background, texture):
    config = WorldConfig(image_size=64, cells=cells, background=background, texture=texture)
    assert exact_share(config, 24) == 1


@pytest.mark.parametrize(
    ("image_size", "cells", "sizes"),
    [
        (64, 2, (0.3, 0.92)),
        (64, 4, (0.4, 0.5)),
        (64, 4, (0.8, 0.92)),
        (96, 2, (0.62, 0.78)),
        (96, 4, (0.4, 0.92)),
    ],
)
def test_small_and_large_things_are_read_without_a_fault(image_size, cells, sizes):
    assert exact_share(WorldConfig(image_size=image_size, cells=cells, sizes=sizes), 40) == 1


@pytest.mark.parametrize("background", all_but_one_slow(BACKGROUNDS, "navy"))
@pytest.mark.parametrize(("cells", "blur_px", "least"), [(2, 1.2, 0.99), (3, 1.2, 0.9), (4, 0.6, 0.95)])
def test_blur_and_noise_cost_little_in_every_world(background, cells, blur_px, least):
    config = WorldConfig(image_size=64, cells=cells, background=background, texture="grain")
    assert exact_share(config, 30, blur_px, noise=0.03) >= least


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_background_is_seen_without_being_told(background):
    config = WorldConfig(image_size=64, cells=4, background=background, sizes=(0.92, 0.92))
    for i, (_, pixels) in enumerate(held_out_set(config, 60)):
        assert background_of(pixels) == background_of(degrade(pixels, 1.2, 0.03, i)) == background


@pytest.mark.parametrize("image_size", [32, 64, 96])
def test_finds_every_thing_where_it_stands(image_size):
    for scene, pixels in held_out_set(WorldConfig(image_size=image_size), 60):
        found = detect(pixels)
        assert len(found) == len(scene.things)
        for thing in scene.things:
            nearest = min(found, key=lambda other: abs(other.x - thing.x) + abs(other.y - thing.y))
            assert (nearest.shape, nearest.colour) == (thing.shape, thing.colour)
            assert [nearest.x, nearest.y] == pytest.approx([thing.x, thing.y], abs=0.5 / image_size)
            assert nearest.size == pytest.approx(thing.size, abs=1 / image_size)


def single(shape, colour, number=1) -> Prompt:
    task = "counting" if number > 1 else "colours"
    return Prompt("", task, (Wanted(shape, colour, number),))


@pytest.mark.parametrize(
    ("scene", "prompt", "reason"),
    [
        (PAIR, single("triangle", "red"), "no red triangle"),
        (PAIR, single("circle", "blue"), "another colour"),
        (PAIR, single("circle", "yellow"), "another colour"),
        (THREE_CROSSES, single("cross", "green", 2), "3 of 2"),
        (THREE_CROSSES, single("cross", "green", 4), "3 of 4"),
        (THREE_CROSSES, single("cross", "red", 3), "another colour"),
        (
            Scene((*THREE_CROSSES.things[:2], replace(THREE_CROSSES.things[2], colour="red"))),
            single("cross", "green", 3),
            "another colour",
        ),
    ],
)
def test_one_wrong_fact_fails_and_is_named(scene, prompt, reason):
    finding = check(detect(render(scene)), prompt)
    assert not finding.correct
    assert reason in finding.reason


@pytest.mark.parametrize("swap", ["relation", "places", "colours"])
def test_swapped_pairs_fail(swap):
    prompt = write_prompt(PAIR, "position")
    attribution = write_prompt(PAIR, "colour_attribution")
    assert score_image(render(PAIR), prompt)
    match swap:
        case "relation":
            assert not score_image(render(PAIR), replace(prompt, relation="right of"))
            assert not score_image(render(PAIR), replace(prompt, relation="above"))
        case "places":
            moved = Scene((replace(LEFT_RED_CIRCLE, x=0.75), replace(RIGHT_BLUE_SQUARE, x=0.25)))
            assert not score_image(render(moved), prompt)
            assert score_image(render(moved), attribution)
        case "colours":
            painted = Scene(
                (replace(LEFT_RED_CIRCLE, colour="blue"), replace(RIGHT_BLUE_SQUARE, colour="red"))
            )
            assert not score_image(render(painted), attribution)
            assert score_image(render(painted), write_prompt(PAIR, "two_objects"))


def test_a_relation_needs_a_clear_offset():
    stacked = Scene((replace(LEFT_RED_CIRCLE, x=0.48, y=0.25), replace(RIGHT_BLUE_SQUARE, x=0.52, y=0.75)))
    prompt = write_prompt(PAIR, "position")
    assert not score_image(render(stacked), prompt)
    assert score_image(render(stacked), replace(prompt, relation="above"))


def standing(dx: float, dy: float) -> list[Thing]:
    """Two things of 0.3; the second is in the middle, the first beside it."""
    return [Thing("circle", "red", 0.5 + dx, 0.5 + dy, 0.3), Thing("square", "blue", 0.5, 0.5, 0.3)]


@pytest.mark.parametrize(
    ("dx", "dy", "by_geneval", "strictly"),
    [
        (-0.45, 0.0, {"left of"}, {"left of"}),
        (0.45, 0.0, {"right of"}, {"right of"}),
        (0.0, -0.45, {"above"}, {"above"}),
        (0.0, 0.45, {"below"}, {"below"}),
        (-0.45, 0.45, {"left of", "below"}, set()),
        (0.45, -0.45, {"right of", "above"}, set()),
        # less a margin of 0.06: 0.39 along, and 0.18 or 0.21 across, on both sides of a half
        (-0.45, 0.24, {"left of"}, {"left of"}),
        (-0.45, 0.27, {"left of"}, set()),
        # both within the margin: nowhere
        (0.05, -0.05, set(), set()),
    ],
)
def test_the_strict_rule_takes_no_diagonal(dx, dy, by_geneval, strictly):
    prompt = write_prompt(PAIR, "position")
    for is_strict, held in ((False, by_geneval), (True, strictly)):
        found = {
            relation
            for relation in INVERSE
            if check(standing(dx, dy), replace(prompt, relation=relation), is_strict).correct
        }
        assert found == held


def test_renderings_of_relations_hold_strictly():
    for config in (WorldConfig(relation_share=1.0), WorldConfig(relation_share=1.0, cells=4)):
        for seed in range(200):
            scene = draw_scene(seed, config, "held_out")
            assert check(list(scene.things), write_prompt(scene, "position"), is_strict=True).correct


@pytest.mark.parametrize("task", TASKS)
def test_blank_grey_and_noise_satisfy_nothing(task):
    scene = next(
        s for s in (draw_scene(i, split="held_out") for i in range(200)) if task in possible_tasks(s)
    )
    prompt = write_prompt(scene, task)
    noise = np.random.default_rng(0).random((3, 32, 32), dtype=np.float32)
    for pixels in (np.zeros((3, 32, 32), np.float32), np.full((3, 32, 32), 0.5, np.float32), noise):
        assert not score_image(pixels, prompt)


def test_the_colour_alone_is_not_enough():
    """A blob of the right colour and size, and a shape whose patches do not fit together, are no shapes."""
    pixels = np.full((3, 32, 32), 0.1, np.float32)
    pixels[:, 6:12, 4:26] = np.reshape((0.90, 0.15, 0.15), (3, 1, 1))
    assert detect(pixels) == []
    torn = render(Scene((Thing("circle", "red", 0.5, 0.5, 0.4),)), WorldConfig(image_size=32))
    assert [thing.shape for thing in detect(torn)] == ["circle"]
    torn[:, :, 16:] = np.roll(torn[:, :, 16:], 5, axis=1)
    assert detect(torn) == []


def test_faint_colours_and_specks_do_not_count():
    pixels = render(PAIR)
    faint = 0.1 + 0.55 * (pixels - 0.1)
    assert detect(faint.astype(np.float32)) == []
    speckled = pixels.copy()
    speckled[:, 28:30, 3:5] = np.reshape((0.90, 0.15, 0.15), (3, 1, 1))
    assert len(detect(speckled)) == 2


@pytest.mark.parametrize(("image_size", "speck_px", "thing_px"), [(32, 4, 6), (64, 5, 7), (96, 7, 9)])
def test_specks_are_told_from_small_things_at_every_size(image_size, speck_px, thing_px):
    for side, number in ((speck_px, 0), (thing_px, 1)):
        pixels = np.full((3, image_size, image_size), 0.1, np.float32)
        pixels[:, 10 : 10 + side, 5 : 5 + side] = np.reshape((0.90, 0.15, 0.15), (3, 1, 1))
        assert len(detect(pixels)) == number


def test_touching_things_of_one_colour_are_told_apart():
    things = (Thing("square", "green", 0.3, 0.3, 0.36), Thing("square", "green", 0.3 + 0.36, 0.34, 0.36))
    pixels = gaussian_filter(render(Scene(things)), (0, 0.6, 0.6))
    assert [thing.shape for thing in detect(pixels)] == ["square", "square"]


def test_refuses_what_is_no_square_image():
    with pytest.raises(ValueError, match="32 x 16 px"):
        detect(np.zeros((3, 16, 32), np.float32))
    with pytest.raises(ValueError, match="not finite"):
        detect(np.full((3, 32, 32), np.nan, np.float32))
