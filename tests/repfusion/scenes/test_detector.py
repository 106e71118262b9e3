"""The detector accepts what prompts state, rejects each wrong fact, and bears the flaws of decoded images."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from repfusion.scenes.captions import TASKS, Prompt, Wanted, possible_tasks, write_prompt
from repfusion.scenes.detector import check, detect, score_image
from repfusion.scenes.world import Scene, Thing, WorldConfig, draw_scene, render

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


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize(("blur_px", "noise"), [(0, 0), (0.6, 0), (0, 0.03), (0.6, 0.03)])
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


@pytest.mark.parametrize("image_size", [32, 64])
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
    torn = render(Scene((Thing("circle", "red", 0.5, 0.5, 0.4),)))
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


def test_touching_things_of_one_colour_are_told_apart():
    things = (Thing("square", "green", 0.3, 0.3, 0.36), Thing("square", "green", 0.3 + 0.36, 0.34, 0.36))
    pixels = gaussian_filter(render(Scene(things)), (0, 0.6, 0.6))
    assert [thing.shape for thing in detect(pixels)] == ["square", "square"]


def test_refuses_what_is_no_square_image():
    with pytest.raises(ValueError, match="32 x 16 px"):
        detect(np.zeros((3, 16, 32), np.float32))
    with pytest.raises(ValueError, match="not finite"):
        detect(np.full((3, 32, 32), np.nan, np.float32))
