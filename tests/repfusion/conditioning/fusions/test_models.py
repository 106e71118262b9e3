"""Whole models of each fusion: what reaches them of the prompt, and of nothing else."""

import pytest
import torch
from prompting import asked, read_prompts, training_inputs
from tiny_models import save_dc
from tiny_training import tiny_model

from repfusion.diffusion.sampler import SamplerConfig
from repfusion.generate import generate
from repfusion.latents.load import EncoderConfig
from repfusion.latents.statistics import LatentStatistics
from repfusion.model.build import build_model
from repfusion.model.dit import DiTConfig
from repfusion.model.text_to_image import TextToImage

FUSIONS = ["one_layer", "channel_concat", "all_layers", "hidden_injection", "layer_per_block", "key_values"]
PROMPTS = ["a red circle", "two blue square", "a green circle left of a blue square", ""]


@pytest.mark.parametrize("method", FUSIONS)
def test_learns_which_prompt_belongs_to_which_latents(make_generator, method):
    """All samples start from the same pure noise, so that only the prompt can tell them apart."""
    model = make_generator(method, awake=False, dit=DiTConfig(hidden_size=32, depth=2, num_heads=2))
    inputs = training_inputs(model, PROMPTS, range(4), shift=1.0)
    inputs |= {"noise": inputs["noise"][:1].expand(4, -1, -1), "t": torch.ones(4)}
    exchanged = {**inputs, "request": model.conditioner.collate(*asked(PROMPTS[::-1]))}
    optimizer = torch.optim.AdamW(model.trainable_state().values(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(50):
        loss = model(inputs)["velocity"].mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right, wrong = (model(one)["velocity"].mean().item() for one in (inputs, exchanged))
    assert right < 0.5 * losses[0] and wrong > 2 * right


def velocity(model: TextToImage, prompts: list[str], rows: slice) -> torch.Tensor:
    gen = torch.Generator().manual_seed(2)
    z_t = torch.randn(len(PROMPTS), *model.latent_shape, generator=gen)
    t = torch.tensor([0.2, 0.4, 0.6, 0.8])
    with torch.no_grad():
        return model.velocity(z_t[rows], t[rows], read_prompts(model, prompts))


@pytest.mark.parametrize("method", FUSIONS)
def test_padding_and_other_prompts_change_nothing(make_generator, method):
    model = make_generator(method)
    together = velocity(model, PROMPTS, slice(4))
    for row, prompt in enumerate(PROMPTS):
        alone = velocity(model, [prompt], slice(row, row + 1))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    other = velocity(model, ["a blue circle", *PROMPTS[1:]], slice(4))
    assert (other[0] - together[0]).abs().max() > 1e-3
    torch.testing.assert_close(other[1:], together[1:], rtol=1e-4, atol=1e-5)


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
