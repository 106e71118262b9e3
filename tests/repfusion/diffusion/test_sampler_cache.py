"""Prompts read once and reused at every step give what reading them anew at every step gives."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from prompting import read_prompts
from tiny_training import METHODS

from repfusion.diffusion.sampler import SamplerConfig, noise_levels, num_evaluations, sample
from repfusion.request import Request

BENCHMARK = Path(__file__).resolve().parents[3] / "benchmarks" / "prefix_cache.py"
PROMPTS = ["a red circle", "", "two blue square left of a green circle and a red square"]
REQUESTS = [Request(prompt) for prompt in PROMPTS]


def noise_of(generator) -> torch.Tensor:
    shape = (len(PROMPTS), *generator.latent_shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def alone_and_uncached(generator, config: SamplerConfig, noise: torch.Tensor) -> torch.Tensor:
    """Each image by itself, its prompt and the empty one read anew and apart at every evaluation: nothing is
    padded, batched or kept.
    """
    levels = noise_levels(config.num_steps, generator.shift).tolist()

    def velocity(z: torch.Tensor, level: float, prompt: str) -> torch.Tensor:
        def of(text: str) -> torch.Tensor:
            return generator.velocity(z, torch.tensor([level]), read_prompts(generator, [text])).float()

        if not config.guides(level):
            return of(prompt)
        return of("") + config.guidance_scale * (of(prompt) - of(""))

    made = []
    for prompt, z in zip(PROMPTS, noise.split(1), strict=True):
        for level, following in pairwise(levels):
            v = velocity(z, level, prompt)
            if config.solver == "heun" and following > 0:
                v = (v + velocity(z + (following - level) * v, following, prompt)) / 2
            z = z + (following - level) * v
        made.append(z)
    return torch.cat(made)


BETWEEN = "heun, guided between"
SAMPLERS = {
    "plain": {"guidance_scale": 1},
    "guided": {"guidance_scale": 2.5},
    "guided early": {"guidance_scale": 2.5, "guidance_interval": (0.2, 1.0)},
    "guided late": {"guidance_scale": 2.5, "guidance_interval": (0.0, 0.3)},
    BETWEEN: {"solver": "heun", "guidance_scale": 2.5, "guidance_interval": (0.1, 0.5)},
}


@pytest.mark.parametrize(
    ("conditioning", "name"),
    [
        ("noisy_latents", "guided"),
        ("transfusion", BETWEEN),
        ("unifusion", BETWEEN),
        *(
            pytest.param("noisy_latents", name, marks=pytest.mark.slow)
            for name in SAMPLERS
            if name != "guided"
        ),
        *(
            pytest.param(method, BETWEEN, marks=pytest.mark.slow)
            for method in METHODS
            if method not in ("noisy_latents", "transfusion", "unifusion")
        ),
    ],
)
def test_the_cache_changes_nothing_in_float32(make_generator, conditioning, name):
    """Prompts of 1 to 13 tokens beside each other, both branches, guided and unguided steps in turn."""
    generator = make_generator(conditioning)
    config = SamplerConfig(num_steps=5, precision="fp32", **SAMPLERS[name])
    guided, unguided = num_evaluations(config, generator.shift)
    assert (unguided > 0) == (name != "guided") and (guided > 0) == (name != "plain")
    noise = noise_of(generator)
    expected = alone_and_uncached(generator, config, noise)
    made = sample(generator, REQUESTS, noise, config)
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["guided", BETWEEN])
def test_the_cache_changes_only_rounding_in_bfloat16(make_generator, name):
    """As near to the uncached result in bfloat16 as that is to float32, up to a factor of two."""
    generator = make_generator()
    noise = noise_of(generator)
    low, high = (
        SamplerConfig(num_steps=5, precision=precision, **SAMPLERS[name]) for precision in ("bf16", "fp32")
    )
    exact = sample(generator, REQUESTS, noise, high)
    cached = sample(generator, REQUESTS, noise, low)
    with torch.autocast("cpu", torch.bfloat16):
        uncached = alone_and_uncached(generator, low, noise)

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return ((a - b).norm() / exact.norm()).item()

    assert 0 < distance(uncached, exact) < 0.1
    assert distance(cached, uncached) < 2 * distance(uncached, exact)


def test_the_prompt_is_read_once_and_every_step_reads_only_the_latents(make_generator):
    """Rows and tokens that pass through the language model: 3 + 3 prompts once, then 4 tokens a row and step,
    of 6 rows where guided and of 3 elsewhere.
    """
    generator = make_generator()
    seen: list[tuple[int, int]] = []
    layer = generator.conditioner.llm.language_model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    config = SamplerConfig(num_steps=5, guidance_interval=(0.2, 1.0), precision="fp32")
    sample(generator, REQUESTS, noise_of(generator), config)
    guided, unguided = num_evaluations(config, generator.shift)
    longest = 1 + max(len(prompt.split()) for prompt in PROMPTS)
    num_tokens = generator.latent_shape[0]
    assert guided and unguided
    assert seen == [(6, longest), *[(6, num_tokens)] * guided, *[(3, num_tokens)] * unguided]


def test_an_earlier_call_leaves_nothing_behind(make_generator):
    generator = make_generator()
    noise = noise_of(generator)
    config = SamplerConfig(num_steps=3, guidance_interval=(0.2, 1.0), precision="fp32")
    first = sample(generator, REQUESTS, noise, config)
    sample(generator, REQUESTS[::-1], noise, config)
    assert torch.equal(sample(generator, REQUESTS, noise, config), first)


@pytest.mark.slow
def test_at_256_prompt_tokens_it_is_faster_by_a_third():
    """On a CPU: measured 2 to 6 times; both ways take turns in one process."""
    arguments = ("--text-tokens", "256", "--batch", "1", "--num-steps", "4", "--repeats", "3")
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["text_tokens"] == 256 and said["latent_tokens"] == 64
    assert said["ratio"] >= 1.3
    assert said["relative_difference"] < 1e-4
