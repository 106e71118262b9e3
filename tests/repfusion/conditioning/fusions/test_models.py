"""Whole models of each fusion: what reaches them of the prompt, and of nothing else."""

import pytest
import torch
from prompting import asked, training_inputs
from slowly import all_but_one_slow
from tiny_models import save_dc
from tiny_training import tiny_model
from whole_models import PROMPTS, check_others_change_nothing, check_prompts_are_learned

from repfusion.diffusion.sampler import SamplerConfig
from repfusion.generate import generate
from repfusion.latents.load import EncoderConfig
from repfusion.latents.statistics import LatentStatistics
from repfusion.model.build import build_model
from repfusion.model.dit import DiTConfig

FUSIONS = ["one_layer", "channel_concat", "all_layers", "hidden_injection", "layer_per_block", "key_values"]


@pytest.mark.parametrize("method", all_but_one_slow(FUSIONS, "key_values"))
def test_learns_which_prompt_belongs_to_which_latents(make_generator, method):
    model = make_generator(method, awake=False, dit=DiTConfig(hidden_size=32, depth=2, num_heads=2))
    check_prompts_are_learned(model, num_steps=50, lr=1e-2)


@pytest.mark.parametrize("method", FUSIONS)
def test_padding_and_other_prompts_change_nothing(make_generator, method):
    check_others_change_nothing(make_generator(method))


@pytest.mark.parametrize("method", ["lap", "all_layers", "hidden_injection", "layer_per_block"])
def test_latents_of_a_vae_are_denoised_as_those_of_a_tower(foundation, tmp_path, method):
    """Four channels a token, and images by the VAE's own decoder."""
    save_dc(tmp_path / "vae")
    encoder = EncoderConfig(path=tmp_path / "vae", image_size=8)
    config = tiny_model(foundation, method).model_copy(
        update={"encoder": encoder, "decoder": tmp_path / "vae"}
    )
    tower = encoder.load()
    statistics = LatentStatistics.empty(tower.num_tokens, tower.feature_dim)
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    statistics.update(tower(pixels))
    model = build_model(config, statistics)
    inputs = training_inputs(model, PROMPTS, range(4), shift=1.0) | {"features": tower(pixels)}
    model(inputs)["velocity"].mean().backward()
    assert all(p.grad is None for p in model.conditioner.llm.parameters())
    made = generate(model, model.load_decoder(), asked(PROMPTS)[0], 0, SamplerConfig(num_steps=2))
    assert made.shape == pixels.shape and bool(made.isfinite().all())
