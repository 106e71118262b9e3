"""Seeds give scenes, scenes give pixels; what is held out never occurs in training."""

import hashlib
from itertools import combinations, permutations, product

import numpy as np
import pytest
from pydantic import ValidationError
from slowly import all_but_one_slow

from repfusion.scenes.world import (
    BACKGROUNDS,
    BASE_COLOURS,
    BASE_SHAPES,
    COLOURS,
    HELD_OUT_PAIRS,
    INVERSE,
    NEW_COLOUR,
    NEW_SHAPE,
    SHAPES,
    TEXTURE_DEPTH,
    Scene,
    Thing,
    WorldConfig,
    draw_scene,
    inside,
    is_held_out,
    render,
)

NUM_SCENES = 3000


@pytest.fixture(scope="module")
def train() -> list[Scene]:
    return [draw_scene(seed) for seed in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def held_out() -> list[Scene]:
    return [draw_scene(seed, split="held_out") for seed in range(500)]


def looks(scene: Scene) -> list[tuple[str, str]]:
    return [(thing.colour, thing.shape) for thing in scene.things]


def combination(scene: Scene) -> tuple:
    """What a scene shows, however it is told: looks and number, or looks with the relation read one way."""
    if scene.relation in ("right of", "below"):
        return (*looks(scene)[::-1], INVERSE[scene.relation])
    return (*(looks(scene) if scene.relation else sorted(looks(scene))), scene.relation)


def test_a_seed_gives_one_scene(train):
    assert [draw_scene(seed) for seed in range(50)] == train[:50]
    assert len(set(train)) == NUM_SCENES
    assert draw_scene(0, split="held_out") != draw_scene(0)


def test_training_never_shows_what_is_held_out(train, held_out):
    assert not any(is_held_out(scene) for scene in train)
    assert all(is_held_out(scene) for scene in held_out)
    assert not any(look in HELD_OUT_PAIRS for scene in train for look in looks(scene))
    assert not {combination(scene) for scene in train} & {combination(scene) for scene in held_out}


def test_every_shape_and_colour_is_trained_and_every_kind_of_combination_held_out(train, held_out):
    assert {thing.shape for scene in train for thing in scene.things} == set(SHAPES)
    assert {thing.colour for scene in train for thing in scene.things} == set(COLOURS)
    unpaired = [scene for scene in held_out if not any(look in HELD_OUT_PAIRS for look in looks(scene))]
    assert any(scene.is_count for scene in unpaired)
    assert {scene.relation for scene in unpaired if not scene.is_count} == {None, *INVERSE}
    pairs = {look for scene in held_out for look in looks(scene) if look in HELD_OUT_PAIRS}
    assert pairs == HELD_OUT_PAIRS


def test_the_split_is_the_one_the_shipped_base_was_trained_with():
    """Held-out combinations follow from hashes; the base saw some of what another split holds out."""
    things = {
        (colour, shape): Thing(shape, colour, 0.5, 0.5, 0.3) for colour, shape in product(COLOURS, SHAPES)
    }
    held = [f"one {look}" for look, thing in things.items() if is_held_out(Scene((thing,)))]
    for look, thing in things.items():
        held += [f"{n} {look}" for n in (2, 3, 4) if is_held_out(Scene((thing,) * n))]
    for (first, a), (second, b) in permutations(things.items(), 2):
        if first[1] != second[1]:
            for relation in (None, *INVERSE):
                if is_held_out(Scene((a, b), relation)):
                    held.append(f"{first} {relation} {second}")
    assert hashlib.sha256("\n".join(sorted(held)).encode()).hexdigest()[:16] == "9dfe6d00d43d34f2"


def test_a_relation_and_its_inverse_are_the_same_scene():
    things = [Thing(shape, colour, 0.5, 0.5, 0.3) for colour, shape in product(COLOURS, SHAPES)]
    for a, b in combinations(things, 2):
        for relation, inverse in INVERSE.items():
            assert is_held_out(Scene((a, b), relation)) == is_held_out(Scene((b, a), inverse))
        assert is_held_out(Scene((a, b))) == is_held_out(Scene((b, a)))


def test_scenes_are_one_thing_two_different_or_up_to_four_alike(train):
    kinds = {"single": 0, "pair": 0, "count": 0}
    for scene in train:
        if len(scene.things) == 1:
            kinds["single"] += 1
        elif scene.is_count:
            kinds["count"] += 1
            assert len(set(looks(scene))) == 1 and 2 <= len(scene.things) <= 4
        else:
            kinds["pair"] += 1
            assert len(scene.things) == 2
            assert scene.things[0].shape != scene.things[1].shape
        assert scene.relation is None or len(set(looks(scene))) == 2
    assert min(kinds.values()) > 0.2 * NUM_SCENES
    assert {len(scene.things) for scene in train if scene.is_count} == {2, 3, 4}


def test_relations_say_how_the_first_thing_stands_to_the_second(train, held_out):
    for scene in train + held_out:
        if len(scene.things) != 2 or scene.is_count:
            continue
        dx = scene.things[0].x - scene.things[1].x
        dy = scene.things[0].y - scene.things[1].y
        match scene.relation:
            case "left of":
                assert dx < -abs(dy)
            case "right of":
                assert dx > abs(dy)
            case "above":
                assert dy < -abs(dx)
            case "below":
                assert dy > abs(dx)
            case None:
                assert min(abs(dx), abs(dy)) > 0.3  # across a diagonal


@pytest.mark.parametrize(
    ("fields", "digest"),
    [
        ({"image_size": 32}, "306d5753ae4123b6"),
        ({}, "5e96dab1cd50f303"),
        ({"jitter": 0}, "2997b73db2be5d01"),
        ({"jitter": 0.5}, "cd50a82ba1b732d4"),
    ],
)
def test_the_pixels_are_the_ones_the_shipped_weights_were_trained_with(fields, digest):
    config = WorldConfig(**fields)
    pixels = hashlib.sha256()
    for split, seed in product(("train", "held_out"), range(200)):
        pixels.update(render(draw_scene(seed, config, split), config).tobytes())
    assert pixels.hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("cells", "sizes"), [(2, (0.62, 0.78)), (3, (0.62, 0.78)), (2, (0.3, 0.92)), (4, (0.92, 0.92))]
)
def test_things_never_touch_each_other_or_the_border(cells, sizes):
    config = WorldConfig(cells=cells, sizes=sizes)
    for seed in range(600):
        things = draw_scene(seed, config).things
        for thing in things:
            assert min(thing.x, thing.y) - thing.size / 2 > 0.03 / cells
            assert max(thing.x, thing.y) + thing.size / 2 < 1 - 0.03 / cells
        for a, b in combinations(things, 2):
            gap = max(abs(a.x - b.x), abs(a.y - b.y)) - (a.size + b.size) / 2
            assert gap >= 0.08 / cells - 1e-9


def test_only_admitted_shapes_and_colours_occur():
    config = WorldConfig(shapes=BASE_SHAPES, colours=BASE_COLOURS)
    scenes = [draw_scene(seed, config) for seed in range(300)]
    assert not any(scene.has_new for scene in scenes)
    assert {thing.shape for scene in scenes for thing in scene.things} == set(BASE_SHAPES)
    assert NEW_SHAPE not in BASE_SHAPES and NEW_COLOUR not in BASE_COLOURS


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_new_things_is_as_told(share):
    config = WorldConfig(new_share=share)
    scenes = [draw_scene(seed, config) for seed in range(400)]
    assert np.mean([scene.has_new for scene in scenes]) == pytest.approx(share, abs=0.07)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cells", all_but_one_slow([2, 4], 2))
def test_the_share_of_relations_is_as_told(share, cells):
    config = WorldConfig(relation_share=share, cells=cells)
    scenes = [draw_scene(seed, config) for seed in range(1000)]
    assert np.mean([scene.relation is not None for scene in scenes]) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_shares_of_new_things_and_of_relations_hold_together(split):
    config = WorldConfig(new_share=0.3, relation_share=0.6)
    scenes = [draw_scene(seed, config, split) for seed in range(400)]
    new = np.array([scene.has_new for scene in scenes])
    related = np.array([scene.relation is not None for scene in scenes])
    assert new.mean() == pytest.approx(0.3, abs=0.07)
    assert related.mean() == pytest.approx(0.6, abs=0.07)
    assert (new & related).mean() == pytest.approx(0.18, abs=0.06)


@pytest.mark.parametrize(("jitter", "spread"), [(1, (0.3, 0.5)), (0.5, (0.35, 0.45)), (0, (0.4, 0.4))])
def test_things_are_as_large_as_told(jitter, spread):
    config = WorldConfig(sizes=(0.3, 0.5), cells=3, jitter=jitter)
    sizes = [3 * thing.size for seed in range(300) for thing in draw_scene(seed, config).things]
    assert spread[0] - 1e-9 <= min(sizes) and max(sizes) <= spread[1] + 1e-9
    assert [min(sizes), max(sizes)] == pytest.approx(spread, abs=0.005)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"shapes": ("circle",)}, "needs at least two shapes"),
        ({"shapes": ("circle", "square"), "colours": ("cyan",), "new_share": 0.0}, "no train scene"),
    ],
)
def test_a_world_too_small_for_its_scenes_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        for seed in range(10):
            draw_scene(seed, WorldConfig(**config))


@pytest.mark.parametrize(
    "field",
    [
        {"image_size": 8},
        {"cells": 1},
        {"new_share": 1.5},
        {"relation_share": -0.1},
        {"shapes": ("star",)},
        {"background": "olive"},
        {"texture": "dots"},
    ],
)
def test_configs_that_cannot_work_name_the_field(field):
    with pytest.raises(ValidationError, match=next(iter(field))):
        WorldConfig(**field)


@pytest.mark.parametrize("sizes", [(0.0, 0.5), (0.7, 0.6), (0.6, 0.93)])
def test_sizes_that_leave_no_thing_or_no_gap_are_refused(sizes):
    with pytest.raises(ValidationError, match=r"(?s)sizes.*expected 0 < smallest <= largest <= 0.92"):
        WorldConfig(sizes=sizes)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_mixtures_with_a_background_are_no_other_colours_mixtures(background):
    behind = np.array(BACKGROUNDS[background])
    lines = {colour: np.array(rgb) - behind for colour, rgb in COLOURS.items()}
    for (_, first), (_, second) in permutations(lines.items(), 2):
        for share in (0.5, 0.75, 1.0):
            along = np.clip(share * first @ second / (second @ second), 0, 1)
            assert np.linalg.norm(share * first - along * second) >= 0.18


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("image_size", [32, 48, 64])
def test_pixels_are_the_things_colours_on_the_background(image_size, background):
    config = WorldConfig(image_size=image_size, background=background)
    for seed in range(40):
        scene = draw_scene(seed, config)
        pixels = render(scene, config)
        assert pixels.dtype == np.float32 and pixels.shape == (3, image_size, image_size)
        assert 0 <= pixels.min() and pixels.max() <= 1
        np.testing.assert_allclose(pixels[:, 0, 0], BACKGROUNDS[background], atol=1e-6)
        for thing in scene.things:
            centre = pixels[:, int(thing.y * image_size), int(thing.x * image_size)]
            np.testing.assert_allclose(centre, COLOURS[thing.colour], atol=1e-6)


@pytest.mark.parametrize("texture", ["stripes", "grain"])
def test_a_texture_varies_the_brightness_of_things_and_nothing_else(texture):
    flat, config = WorldConfig(image_size=64), WorldConfig(image_size=64, texture=texture)
    changes = []
    for seed in range(40):
        scene = draw_scene(seed, config)
        assert scene == draw_scene(seed, flat)
        pixels, plain = render(scene, config), render(scene, flat)
        np.testing.assert_array_equal(pixels, render(scene, config))
        assert 0 <= pixels.min() and pixels.max() <= 1
        covered = (plain != plain[:, :1, :1]).any(axis=0)
        np.testing.assert_array_equal(pixels[:, ~covered], plain[:, ~covered])
        assert (abs(pixels - plain) <= TEXTURE_DEPTH * plain.max() + 1e-6).all()
        changes += [(pixels - plain)[:, covered].mean(), (pixels - plain)[:, covered].std()]
    assert abs(np.mean(changes[::2])) < 0.01  # as often lighter as darker
    assert np.mean(changes[1::2]) > 0.02
    looks = [render(Scene((Thing("square", "red", x, 0.5, 0.3),)), config) for x in (0.25, 0.75)]
    assert abs(looks[0][:, :, :32] - looks[1][:, :, 32:]).max() > 0.05  # each thing has its own pattern


@pytest.mark.parametrize("texture", [None, "stripes", "grain"])
def test_a_larger_rendering_shows_the_same_scene(texture):
    for seed in range(30):
        scene = draw_scene(seed)
        small, large = (render(scene, WorldConfig(image_size=size, texture=texture)) for size in (32, 128))
        shrunk = large.reshape(3, 32, 4, 32, 4).mean((2, 4))
        assert abs(shrunk - small).max() < 0.2  # edges, by the number of samples a pixel
        assert abs(shrunk - small).mean() < 0.005


@pytest.mark.parametrize("shape", SHAPES)
def test_the_covered_area_is_the_shapes(shape):
    expected = {"circle": np.pi, "square": 1.8**2, "triangle": 1.9, "cross": 4 * 0.68 - 0.68**2, "diamond": 2}
    points = (np.arange(1000) + 0.5) / 500 - 1
    covered = inside(shape, *np.meshgrid(points, points)).mean() * 4
    assert covered == pytest.approx(expected[shape], rel=0.01)
    thing = Thing(shape, "red", 0.5, 0.5, 0.4)
    config = WorldConfig(image_size=64)
    red, background = COLOURS["red"][0], BACKGROUNDS["black"][0]
    coverage = (render(Scene((thing,)), config)[0] - background) / (red - background)
    assert coverage.sum() / 64**2 == pytest.approx(covered * 0.2**2, rel=0.03)


def test_shapes_stand_upright():
    thing = Thing("triangle", "red", 0.5, 0.5, 0.5)
    red = render(Scene((thing,)))[0] > 0.5
    widths = red.sum(1)[red.any(1)]
    assert widths[0] <= 2 and widths[-1] >= 14
    assert (np.diff(widths.astype(int)) >= 0).all()


def test_without_jitter_things_stand_in_the_middle_of_their_cells_at_one_size():
    for seed in range(50):
        for thing in draw_scene(seed, WorldConfig(jitter=0)).things:
            assert thing.size == pytest.approx(0.35)
            assert {round(4 * thing.x, 6), round(4 * thing.y, 6)} <= {1.0, 3.0}
    free, half, still = (
        [draw_scene(seed, WorldConfig(jitter=jitter)) for seed in range(200)] for jitter in (1, 0.5, 0)
    )
    spread = [np.std([thing.size for scene in scenes for thing in scene.things]) for scenes in (free, half)]
    assert spread[1] == pytest.approx(spread[0] / 2, rel=0.2)
    looks = [[[(t.shape, t.colour) for t in s.things] for s in scenes] for scenes in (free, half, still)]
    assert looks[0] == looks[1] == looks[2]
