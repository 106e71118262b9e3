"""Any method's checkpoint is drawn from, evaluated, exported and loaded as a pipeline without being told
which method it is; the pixels are the same all along.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import METHODS, sparing

from repfusion.diffusion.sampler import SamplerConfig
from repfusion.evaluation.checkpoints import evaluate_checkpoint
from repfusion.evaluation.record import EvaluationConfig
from repfusion.export import export
from repfusion.generate import generate, main, to_uint8
from repfusion.model.text_to_image import TextToImage
from repfusion.pipeline import RepFusionPipeline
from repfusion.request import Request
from repfusion.runs.checkpoint import read_config, save_checkpoint
from repfusion.scenes.captions import draw_prompts

PROMPT = "a red circle left of two blue square"
SAMPLER = SamplerConfig(num_steps=3, solver="heun", guidance_scale=3, guidance_interval=(0.05, 1.0))


@pytest.fixture(params=sparing(METHODS, ("noisy_latents", "key_values", "unifusion")))
def generator(request: pytest.FixtureRequest, make_generator) -> TextToImage:
    return make_generator(request.param)


@pytest.fixture
def checkpoint(generator, tmp_path) -> Path:
    """Its averaged weights are the generator's own, its last weights others."""
    folder, ema = tmp_path / "step_00000005", {k: p.clone() for k, p in generator.trainable_state().items()}
    with torch.no_grad():
        for parameter in generator.trainable_state().values():
            parameter.mul_(0.5)
    save_checkpoint(folder, generator, ema, step=5)
    generator.load_trainable_state(ema)
    return folder


@pytest.fixture
def pictures(generator, tmp_path) -> list[Path]:
    """What a method that reads images is shown."""
    shown = np.random.default_rng(0).integers(0, 256, (2, 40, 32, 3), np.uint8)
    paths = [tmp_path / f"shown{i}.png" for i in range(2 * generator.config.conditioning.reads_images)]
    for path, pixels in zip(paths, shown, strict=False):
        Image.fromarray(pixels).save(path)
    return paths


def drawn(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, pictures: list[Path]) -> np.ndarray:
    """By the command, which is told the folder and nothing of the method."""
    sampler = ["--num-steps", 3, "--solver", "heun", "--guidance-scale", 3, "--guidance-interval", 0.05, 1]
    arguments = ["--checkpoint", folder, "--prompt", PROMPT, "--out", out, "--seed", 4, "--num-images", 2]
    arguments += [word for path in pictures for word in ("--image", path)]
    monkeypatch.setattr(
        sys, "argv", ["generate", *map(str, [*arguments, *sampler, "--scale", 1, "--device", "cpu"])]
    )
    main()
    return np.asarray(Image.open(out))


def test_every_way_to_an_image_gives_the_same_pixels(generator, checkpoint, pictures, tmp_path, monkeypatch):
    decoder, shown = generator.load_decoder(), [Image.open(path) for path in pictures]
    request = Request(PROMPT, tuple(map(np.asarray, shown)))
    made = to_uint8(generate(generator, decoder, [request] * 2, 4, SAMPLER))
    if pictures:
        unseen = to_uint8(generate(generator, decoder, [Request(PROMPT)] * 2, 4, SAMPLER))
        assert (made.astype(int) - unseen).any()  # the pictures count
    assert (made[0].astype(int) - made[1]).any()  # the noise counts
    strip = np.concatenate(list(made), axis=1)
    np.testing.assert_array_equal(drawn(checkpoint, tmp_path / "x.png", monkeypatch, pictures), strip)

    exported = export(checkpoint, tmp_path / "exported")
    np.testing.assert_array_equal(drawn(exported, tmp_path / "y.png", monkeypatch, pictures), strip)
    for folder in (checkpoint, exported):
        pipe = RepFusionPipeline.from_pretrained(folder)
        assert pipe.model.config.conditioning == read_config(checkpoint)[0].conditioning
        images = pipe(
            PROMPT,
            num_inference_steps=3,
            guidance_scale=3,
            solver="heun",
            guidance_interval=(0.05, 1),
            generator=[torch.Generator().manual_seed(4 + i) for i in range(2)],
            num_images_per_prompt=2,
            image=list(shown),
        ).images
        np.testing.assert_array_equal(np.concatenate([np.asarray(image) for image in images], axis=1), strip)


def test_an_evaluation_scores_the_images_of_the_averaged_weights(generator, checkpoint, tmp_path):
    scored: list[torch.Tensor] = []

    def run(work: Callable[[], Any]) -> Any:
        result = work()
        if isinstance(result, torch.Tensor):
            scored.append(result)
        return result

    suites = {"scenes": {"num_prompts": 6}}
    config = EvaluationConfig.model_validate(
        {"suites": suites, "seed": 2, "sampler": SAMPLER, "device": "cpu"}
    )
    evaluation = evaluate_checkpoint(checkpoint, tmp_path / "out", config, run)
    texts = [prompt.text for prompt in draw_prompts(6, 2, True)]
    items = (tmp_path / "out" / "scenes" / "items.jsonl").read_text().splitlines()
    assert [json.loads(item)["prompt"] for item in items] == texts
    requests = [Request(text) for text in texts]
    expected = generate(generator, generator.load_decoder(), requests, 2, SAMPLER)
    assert len(scored) == 1 and torch.equal(scored[0], expected)
    np.testing.assert_array_equal(
        np.load(tmp_path / "out" / "scenes" / "outputs/00000.npy"), to_uint8(expected)
    )
    assert evaluation.step == 5 and evaluation.config.sampler == SAMPLER
