"""Sampling by steps on static buffers, as CUDA graphs run on, is plain sampling to the bit."""

import pytest
import torch
from slowly import all_but_one_slow

from repfusion.diffusion import graphs
from repfusion.diffusion.graphs import StepGraphs
from repfusion.diffusion.sampler import SamplerConfig, sample
from repfusion.request import Request

PROMPTS = ["a red circle", "", "two blue square left of a green circle and a red square"]
BETWEEN = {"num_steps": 4, "solver": "heun", "guidance_scale": 2.5, "guidance_interval": (0.1, 0.6)}


def noise_of(model, num: int = 3) -> torch.Tensor:
    return torch.randn(num, *model.latent_shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "conditioning",
    all_but_one_slow(["noisy_latents", "text_embed_in_context", "queries", "unifusion"], "unifusion"),
)
def test_every_batch_is_drawn_as_it_was(make_generator, conditioning):
    model = make_generator(conditioning)
    config = SamplerConfig(precision="fp32", **BETWEEN)
    batches = [[Request(one) for one in order] for order in (PROMPTS, PROMPTS[::-1], PROMPTS)]
    expected = [sample(model, batch, noise_of(model), config) for batch in batches]
    model.graphs = StepGraphs(model._step)
    for batch, plain in zip(batches, expected, strict=True):
        assert torch.equal(sample(model, batch, noise_of(model), config), plain)
    assert len(model.graphs.captured) == 2, "guided and unguided steps"


def test_the_sizes_used_last_are_kept(make_generator, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    model = make_generator()
    config = SamplerConfig(precision="fp32", num_steps=2, guidance_scale=1.0)
    model.graphs = StepGraphs(model._step)
    for num in (1, 2, 1, 3, 1):
        sample(model, [Request("a red circle")] * num, noise_of(model, num), config)
    rows = [key[1][0][0] for key in model.graphs.captured]
    assert rows == [3, 1]


def test_a_model_made_fast_draws_the_same_to_the_bit_under_autocast(make_generator):
    """Weights held in bfloat16 are what autocast makes of them; prompts of a bucket are new to rounding."""
    plain, fast = make_generator(), make_generator()
    config = SamplerConfig(num_steps=4, guidance_scale=2.5, precision="bf16")
    requests = [Request(one) for one in PROMPTS]
    fast.speed_up_sampling("bf16", compiles=False)
    fast.conditioner.llm.bucket = 1
    expected = sample(plain, requests, noise_of(plain), config)
    assert torch.equal(sample(fast, requests, noise_of(fast), config), expected)
    assert fast.denoiser.out.weight.dtype == torch.bfloat16
    fast.conditioner.llm.bucket = 32
    bucketed = sample(fast, requests, noise_of(fast), config)
    assert (bucketed - expected).norm() < 0.02 * expected.norm()


def test_training_does_not_go_through_the_buffers(make_generator):
    model = make_generator()
    model.graphs = StepGraphs(model._step)
    prompted = model.read([Request("a red circle")], ["full"])
    made = model.velocity(noise_of(model, 1), torch.tensor([0.5]), prompted)
    assert made.requires_grad and not model.graphs.captured
