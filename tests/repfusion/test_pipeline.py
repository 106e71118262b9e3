"""The pipeline is called as diffusers' are, and draws what `repfusion.generate` draws, bit for bit."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from slowly import all_but_one_slow

from repfusion.diffusion.sampler import SamplerConfig
from repfusion.export import export
from repfusion.generate import generate, main, to_uint8
from repfusion.pipeline import RepFusionPipeline
from repfusion.request import Request
from repfusion.runs.checkpoint import load_checkpoint
from repfusion.weights import WEIGHTS

PROMPT = "a red circle left of a blue square"
STEPS = 4


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that was moved after it was made."""
    made = export(WEIGHTS / "base", tmp_path_factory.mktemp("made") / "base")
    return Path(shutil.move(made, tmp_path_factory.mktemp("moved") / "elsewhere"))


@pytest.fixture(scope="module")
def pipe(exported) -> RepFusionPipeline:
    return RepFusionPipeline.from_pretrained(exported)


def reference(prompts: list[str], seed: int, **sampler) -> torch.Tensor:
    base = load_checkpoint(WEIGHTS / "base")
    requests = [Request(prompt) for prompt in prompts]
    return generate(base, base.load_decoder(), requests, seed, SamplerConfig(num_steps=STEPS, **sampler))


@pytest.mark.parametrize("seed", all_but_one_slow([0, 12345], 12345))
def test_it_draws_the_very_image_of_the_command(pipe, tmp_path, monkeypatch, seed):
    """With all its defaults: 30 steps, guidance 4."""
    out = tmp_path / "x.png"
    arguments = ["--prompt", PROMPT, "--out", out, "--seed", seed, "--scale", 1, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    main()
    image = pipe(PROMPT, generator=seeded(seed)).images[0]
    assert isinstance(image, Image.Image)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(out)))


def test_generators_of_consecutive_seeds_draw_the_batch_of_generate(pipe):
    prompts = [PROMPT, "two green triangles", ""]
    generators = [seeded(9 + i) for i in range(3)]
    made = pipe(prompts, STEPS, generator=generators, output_type="pt").images
    assert torch.equal(made, reference(prompts, 9))


def test_one_generator_draws_the_images_one_after_the_other(pipe):
    """As one draw of the whole batch, which is what diffusers makes of it; the first is the image alone."""
    generator = seeded(3)
    made = pipe(PROMPT, STEPS, generator=generator, num_images_per_prompt=3, output_type="pt").images
    shape = pipe.model.latent_shape
    noise = torch.randn((3, *shape), generator=seeded(3))
    assert torch.equal(pipe([PROMPT] * 3, STEPS, latents=noise, output_type="pt").images, made)
    torch.testing.assert_close(made[:1], reference([PROMPT], 3), atol=1e-2, rtol=0)
    assert (made[0] - made[1]).abs().max() > 0.05
    # The generator goes on from where it is.
    after = pipe(PROMPT, STEPS, generator=generator, output_type="pt").images
    ahead = seeded(3)
    torch.randn((3, *shape), generator=ahead)
    fourth = torch.randn((1, *shape), generator=ahead)
    assert torch.equal(after, pipe(PROMPT, STEPS, latents=fourth, output_type="pt").images)


def test_without_a_generator_torchs_own_decides(pipe):
    torch.manual_seed(4)
    made = pipe(PROMPT, STEPS, output_type="pt").images
    assert torch.equal(made, pipe(PROMPT, STEPS, generator=seeded(4), output_type="pt").images)
    assert not torch.equal(made, pipe(PROMPT, STEPS, output_type="pt").images)


def test_the_images_of_a_prompt_lie_beside_each_other(pipe):
    prompts = ["a red circle", "a blue square"]
    generators = [seeded(i) for i in range(4)]
    made = pipe(prompts, STEPS, generator=generators, num_images_per_prompt=2, output_type="pt").images
    assert torch.equal(made, reference([prompts[0], prompts[0], prompts[1], prompts[1]], 0))


def test_the_output_types_show_the_same_images(pipe):
    def made(output_type: str):
        return pipe(PROMPT, STEPS, generator=seeded(1), output_type=output_type).images

    pixels, array, images, latents = made("pt"), made("np"), made("pil"), made("latent")
    assert pixels.shape == (1, 3, 64, 64) and array.shape == (1, 64, 64, 3) and array.dtype == np.float32
    np.testing.assert_array_equal(array, pixels.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(images[0]), to_uint8(pixels)[0])
    assert latents.shape == (1, *pipe.model.latent_shape)
    with torch.no_grad():
        decoded = pipe.decoder(pipe.model.denormalise(latents)).clamp(0, 1)
    assert torch.equal(decoded, pixels)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_steps_and_guidance_reach_the_sampler(pipe, guidance_scale):
    made = pipe(PROMPT, STEPS, guidance_scale, generator=seeded(6), output_type="pt").images
    assert torch.equal(made, reference([PROMPT], 6, guidance_scale=guidance_scale))


def test_solver_and_guidance_interval_reach_the_sampler(pipe):
    changes = {"solver": "heun", "guidance_interval": (0.3, 1)}
    made = pipe(PROMPT, STEPS, generator=seeded(6), output_type="pt", **changes).images
    assert torch.equal(made, reference([PROMPT], 6, **changes))
    plain = pipe(PROMPT, STEPS, generator=seeded(6), output_type="pt").images
    assert (made - plain).abs().max() > 0.01


def test_the_callback_sees_every_step_and_may_change_the_latents(pipe):
    seen: list[tuple[int, float]] = []

    def watch(pipeline, step, level, tensors):
        assert pipeline is pipe and tensors["latents"].shape == (1, *pipe.model.latent_shape)
        seen.append((step, level))

    made = pipe(PROMPT, STEPS, generator=seeded(1), output_type="pt", callback_on_step_end=watch).images
    assert [step for step, _ in seen] == list(range(STEPS))
    levels = [level for _, level in seen]
    assert levels[0] == 1.0 and levels == sorted(levels, reverse=True) and levels[-1] > 0
    assert torch.equal(made, pipe(PROMPT, STEPS, generator=seeded(1), output_type="pt").images)

    def stop(pipeline, step, level, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else tensors

    cut = pipe(PROMPT, STEPS, generator=seeded(1), output_type="latent", callback_on_step_end=stop).images
    assert not cut.any()


def test_float32_holds_and_computes_everything_in_float32(exported):
    pipe = RepFusionPipeline.from_pretrained(exported, torch_dtype=torch.float32)
    assert {p.dtype for p in pipe.model.parameters()} == {torch.float32}
    made = pipe(PROMPT, STEPS, generator=seeded(2), output_type="pt").images
    assert torch.equal(made, reference([PROMPT], 2, precision="fp32"))


def test_bfloat16_halves_the_weights_and_draws_nearly_the_same(exported, pipe):
    half = RepFusionPipeline.from_pretrained(exported, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    rotary = half.model.conditioner.llm.language_model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32
    made = half(PROMPT, STEPS, generator=seeded(2), output_type="pt").images
    expected = pipe(PROMPT, STEPS, generator=seeded(2), output_type="pt").images
    assert (made - expected).abs().mean() < 0.02


def test_a_checkpoint_serves_as_well(pipe):
    own = RepFusionPipeline.from_pretrained(WEIGHTS / "base")
    made, expected = (one(PROMPT, STEPS, generator=seeded(8), output_type="pt").images for one in (own, pipe))
    assert torch.equal(made, expected)


def test_to_moves_it_and_returns_it(pipe):
    assert pipe.to("cpu") is pipe and pipe.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "0 prompts"),
        ({"num_images_per_prompt": 0}, "0 images of each"),
        ({"generator": [seeded(0), seeded(1)]}, "2 generators for 1 images"),
        ({"latents": torch.zeros(2, 16, 96)}, "expected .1, 16, 96. for 1 requests"),
        ({"output_type": "jpeg"}, "'pil', 'np', 'pt' or 'latent'"),
        ({"num_inference_steps": 0}, "num_steps"),
        ({"image_guidance_scale": 0.5}, "guidance_scale"),
        ({"guidance_interval": (0.5, 0.2)}, "expected noise levels 0 <= low <= high <= 1"),
        ({"prompt": "red " * 90}, "the context takes"),
    ],
)
def test_a_wrong_argument_is_named(pipe, changes, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": PROMPT, **changes})


def test_another_dtype_is_refused(exported):
    with pytest.raises(ValueError, match=r"torch.float16: expected torch.float32 or torch.bfloat16"):
        RepFusionPipeline.from_pretrained(exported, torch_dtype=torch.float16)


@pytest.mark.gpu
def test_the_noise_is_the_same_on_a_gpu(exported):
    pipe = RepFusionPipeline.from_pretrained(exported, torch_dtype=torch.float32)
    expected = pipe(PROMPT, STEPS, generator=seeded(2), output_type="pt").images
    made = pipe.to("cuda")(PROMPT, STEPS, generator=seeded(2), output_type="pt").images
    torch.testing.assert_close(made, expected, atol=2e-2, rtol=0)
    pipe(PROMPT, STEPS, generator=torch.Generator("cuda").manual_seed(0))
