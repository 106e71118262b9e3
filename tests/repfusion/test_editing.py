"""A UniFusion model that was trained for a few steps, asked to edit: by the command and by the pipeline, with
one image and with several, and with what is no image.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repfusion.diffusion.flow import draw
from repfusion.generate import main
from repfusion.generation.pictures import all_pixels, to_pixels
from repfusion.model.text_to_image import TextToImage
from repfusion.pipeline import RepFusionPipeline
from repfusion.request import Request
from repfusion.runs.checkpoint import save_checkpoint

PROMPT = "a red circle left of a blue square"


def shown(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 40, 3), dtype=np.uint8)


def train(model: TextToImage, num_steps: int = 6) -> list[float]:
    """Plain steps on a batch of a prompt, an edit and a composition of two images; the losses."""
    requests = [Request("a red circle"), Request("blue", (shown(0),)), Request("two", (shown(0), shown(1)))]
    seeds = [1, 2, 3]
    t, noise = draw(seeds, model.latent_shape, model.shift)
    features = model.denormalise(torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))).half()
    request = model.conditioner.collate(requests, ["full"] * 3, seeds)
    inputs = {"request": request, "features": features, "t": t, "noise": noise}
    optimizer, losses = torch.optim.AdamW(model.trainable_state().values(), lr=1e-2), []
    for _ in range(num_steps):
        loss = model(inputs)["velocity"].mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.fixture(params=["unifusion", pytest.param("unifusion_references", marks=pytest.mark.slow)])
def checkpoint(request: pytest.FixtureRequest, make_generator, tmp_path) -> Path:
    model = make_generator(request.param, awake=False)
    losses = train(model)
    assert losses[-1] < 0.98 * losses[0]
    folder = tmp_path / "step_00000006"
    save_checkpoint(folder, model, model.trainable_state(), step=6)
    return folder


def command(
    monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, images: list[Path], *more: str
) -> np.ndarray:
    arguments = ["--checkpoint", folder, "--prompt", PROMPT, "--out", out, "--seed", 3, "--num-steps", 2]
    arguments += ["--scale", 1, "--device", "cpu", *(word for one in images for word in ("--image", one))]
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments), *more])
    main()
    return np.asarray(Image.open(out))


def test_one_command_edits_and_refers_as_the_pipeline_does(checkpoint, tmp_path, monkeypatch):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, path in enumerate(paths):
        Image.fromarray(shown(seed)).save(path)
    pipe = RepFusionPipeline.from_pretrained(checkpoint)

    def piped(*images: Image.Image | np.ndarray) -> np.ndarray:
        generator = torch.Generator().manual_seed(3)
        return np.asarray(pipe(PROMPT, 2, generator=generator, image=images).images[0])

    both = command(monkeypatch, checkpoint, tmp_path / "x.png", paths)
    np.testing.assert_array_equal(both, piped(*map(Image.open, paths)))
    np.testing.assert_array_equal(both, piped(shown(0), shown(1)))
    others = [piped(), piped(shown(0)), piped(shown(1)), piped(shown(1), shown(0))]
    assert all((both.astype(int) - other).any() for other in others)  # each image counts, and so does order
    apart = command(monkeypatch, checkpoint, tmp_path / "y.png", paths, "--image-guidance-scale", "1.5")
    assert (apart.astype(int) - both).any()


def test_what_cannot_be_shown_is_refused_by_its_number(make_generator, tmp_path, monkeypatch):
    model = make_generator("unifusion")
    save_checkpoint(tmp_path / "step_00000001", model, model.trainable_state(), step=1)
    pipe = RepFusionPipeline(model, model.load_decoder())
    line = shown(0)[:1]
    for image, says in (
        ([shown(0), line], r"image 2 of 2: image is 40 x 1 px, expected 2 px a side or more"),
        ([shown(0), Image.fromarray(line)], r"image 2 of 2: image is 40 x 1 px"),
        ([shown(0)[..., 0]], r"image 1 of 1: image is \(32, 40\) uint8, expected RGB.*read_pixels"),
        ([shown(0)] * 60, r"60 images and the prompt .* the context of 128 leaves 128, where the first 2\d"),
    ):
        with pytest.raises(ValueError, match=says):
            pipe(PROMPT, 1, image=image)
    with pytest.raises(ValueError, match=r"image 2 of 2: a str; expected a PIL image or a uint8 array"):
        all_pixels([shown(0), "a.png"])
    paths = [tmp_path / "a.png", tmp_path / "line.png", tmp_path / "text.png"]
    Image.fromarray(shown(0)).save(paths[0])
    Image.fromarray(line).save(paths[1])
    paths[2].write_text("no image")
    for images, says in (
        (paths[:2], r"error: image .*line.png: image is 40 x 1 px, expected 2 px a side or more"),
        ([paths[2]], r"error: image .*text.png: \[undecodable_image\]"),
        ([paths[0]] * 60, r"the first 2\d images fit: leave others out, or make them smaller"),
    ):
        with pytest.raises(SystemExit, match=says):
            command(monkeypatch, tmp_path / "step_00000001", tmp_path / "x.png", images)


GREY = Image.new("L", (6, 4), 255)
WHITE = Image.new("RGB", (6, 4), (255, 255, 255))
MODES = {
    **{mode: GREY.convert(mode) for mode in ("1", "L", "LA", "P")},
    **{mode: WHITE.convert(mode) for mode in ("RGBA", "CMYK", "YCbCr", "HSV")},
    "I;16": Image.new("I;16", (6, 4), 65535),
    "LAB": Image.new("LAB", (6, 4), (255, 128, 128)),
}


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_all_modes_become_rgb(mode):
    """White is white in each."""
    assert MODES[mode].mode == mode
    pixels = to_pixels(MODES[mode])
    assert pixels.shape == (4, 6, 3) and pixels.dtype == np.uint8 and pixels.min() >= 254


def test_a_mode_that_says_no_colours_is_named():
    with pytest.raises(ValueError, match=r"a PIL image of mode 'F': .*convert it to RGB"):
        to_pixels(Image.new("F", (6, 4)))
