"""Our blocks against code that we did not write: transformers' LLaVA, Llama and DINOv3, diffusers' PixArt
block, attention, embeddings and schedulers.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.embeddings import get_timestep_embedding
from prompting import prepare
from torch import nn
from transformers import DINOv3ViTConfig, LlamaConfig, LlavaForConditionalGeneration
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTRopePositionEmbedding
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from repfusion.conditioning.base import Condition
from repfusion.diffusion.flow import shift_noise_level
from repfusion.diffusion.sampler import SamplerConfig, noise_levels, sample
from repfusion.latents.load import EncoderConfig
from repfusion.latents.statistics import LatentStatistics
from repfusion.latents.tower import RepresentationEncoder
from repfusion.layers import (
    Attention,
    RMSNorm,
    SwiGLU,
    rotary_grid,
    rotate,
    timestep_embedding,
)
from repfusion.model.blocks.adaln import AdaLNBlock
from repfusion.model.build import build_model
from repfusion.model.config import ModelConfig
from repfusion.model.denoiser import Prefilled
from repfusion.model.dit import DiT, DiTConfig
from repfusion.model.text_to_image import TextToImage
from repfusion.request import Request
from repfusion.weights import WEIGHTS

PROMPTS = ["a red circle", "two blue squares and a green triangle", ""]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def awaken(module: nn.Module) -> nn.Module:
    """Moves every weight, the zeros too."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


# LLaVA: what the frozen MLLM reads


@pytest.fixture(params=["shipped", "made elsewhere"])
def config(request: pytest.FixtureRequest, elsewhere: ModelConfig) -> ModelConfig:
    """The trained LLaVA of the repository; untrained ones of other geometry and with grouped queries."""
    if request.param == "made elsewhere":
        return elsewhere
    return ModelConfig(encoder=EncoderConfig(path=WEIGHTS / "llava"))


@pytest.fixture
def llava(config: ModelConfig) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(config.mllm, dtype=torch.float32).eval()


@pytest.fixture
def generator(config: ModelConfig) -> TextToImage:
    """Untrained: the projector is the LLaVA's own, latents are features, and the embedding of the noise level
    is zero.
    """
    encoder = config.encoder.load()
    shape = (encoder.num_tokens, encoder.feature_dim)
    unit = LatentStatistics(1, torch.zeros(shape).double(), torch.ones(shape).double())
    made = build_model(config, unit).eval()
    assert not made.conditioner.time(torch.tensor([0.0, 0.5, 1.0])).any()
    return made


def images_for(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels in [0, 1], and as the towers take them."""
    encoder = config.encoder.load()
    shape = (len(PROMPTS), 3, encoder.image_size, encoder.image_size)
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return pixels, (pixels - encoder.mean) / encoder.std


def seen_by_projector(llava: LlavaForConditionalGeneration, normalised: torch.Tensor) -> torch.Tensor:
    """What transformers selects of the tower's hidden states, by the LLaVA's own config."""
    seen: list[torch.Tensor] = []
    projector = llava.model.multi_modal_projector
    hook = projector.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with torch.no_grad():
        llava.model.get_image_features(
            normalised,
            vision_feature_layer=llava.config.vision_feature_layer,
            vision_feature_select_strategy=llava.config.vision_feature_select_strategy,
        )
    hook.remove()
    return seen[0]


@torch.no_grad()
def llavas_hidden_states(
    llava: LlavaForConditionalGeneration, generator: TextToImage, normalised: torch.Tensor
) -> torch.Tensor:
    """LLaVA's own forward on pixels, each prompt by itself, text first and the image's tokens after it; the
    last hidden states at those.
    """
    num_tokens, rows = generator.latent_shape[0], []
    for prompt, image in zip(PROMPTS, normalised.split(1), strict=True):
        prefix = generator.conditioner.llm.tokenise([prompt])
        assert prefix.mask.all()
        image_ids = torch.full((1, num_tokens), llava.config.image_token_index)
        output = llava.model(input_ids=torch.cat([prefix.ids, image_ids], dim=1), pixel_values=image)
        rows.append(output.last_hidden_state[:, -num_tokens:])
    return torch.cat(rows)


@torch.no_grad()
def ours(generator: TextToImage, features: torch.Tensor, reuse: bool) -> torch.Tensor:
    prepared = prepare(generator.conditioner, PROMPTS, reuse)
    return generator.conditioner.condition(prepared, features, torch.zeros(len(PROMPTS))).aligned


@pytest.mark.parametrize("reuse", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_conditioner_reads_features_as_llava_reads_its_own(config, llava, generator, reuse):
    """The same features into both. All prompts at once in ours, padded, whole or after a cache."""
    _, normalised = images_for(config)
    features = seen_by_projector(llava, normalised)
    expected = llavas_hidden_states(llava, generator, normalised)
    torch.testing.assert_close(ours(generator, features, reuse), expected, atol=1e-4, rtol=1e-4)


def test_from_pixels_the_layer_norm_is_the_only_difference_to_llava(config, llava, generator):
    """RAE's latents are features after a LayerNorm without affine, which LLaVA's projector never saw. With
    one put before LLaVA's projector, both agree from the pixels on; without it, they differ.
    """
    pixels, normalised = images_for(config)
    features = config.encoder.load()(pixels)
    as_trained = llavas_hidden_states(llava, generator, normalised)
    llava.model.multi_modal_projector.register_forward_pre_hook(
        lambda module, args: (F.layer_norm(args[0], args[0].shape[-1:]),)
    )
    expected = llavas_hidden_states(llava, generator, normalised)
    torch.testing.assert_close(ours(generator, features, reuse=True), expected, atol=1e-4, rtol=1e-4)
    assert (as_trained - expected).norm() / expected.norm() > 1e-3


def test_features_are_what_llava_selects_layer_normed(config, llava):
    """transformers' `vision_feature_layer=-2, vision_feature_select_strategy="default"`."""
    assert (llava.config.vision_feature_layer, llava.config.vision_feature_select_strategy) == (-2, "default")
    pixels, normalised = images_for(config)
    selected = seen_by_projector(llava, normalised)
    expected = F.layer_norm(selected, selected.shape[-1:])
    encoder = RepresentationEncoder.from_pretrained(config.encoder.path)
    torch.testing.assert_close(encoder(pixels), expected, atol=1e-4, rtol=1e-4)
    assert selected.shape[1] == encoder.num_tokens


# AdaLN-Single: the denoiser's block

GRID, DIM, HEADS = (2, 3), 32, 4
BLOCK = DiTConfig(hidden_size=DIM, num_heads=HEADS)


def block_and_inputs(num_signals: int) -> tuple[AdaLNBlock, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Awake, with two samples and a modulation for each sample or each token."""
    block = awaken(AdaLNBlock(DIM, HEADS, BLOCK.mlp_ratio))
    return block, randn(2, 6, DIM), randn(2, num_signals, 6, DIM, seed=1), rotary_grid(GRID, DIM // HEADS)


@pytest.mark.parametrize("num_signals", [1, 6])
def test_with_zero_table_and_modulation_a_block_is_the_identity(num_signals):
    block, x, modulation, rotary = block_and_inputs(num_signals)
    nn.init.zeros_(block.table)
    assert torch.equal(block(x, torch.zeros_like(modulation), rotary), x)
    assert (block(x, modulation, rotary) - x).abs().max() > 0.1


def test_an_untrained_dit_is_the_identity_up_to_its_output():
    dit = DiT(BLOCK.model_copy(update={"depth": 3}), latent_dim=8, grid=GRID, aligned_width=16)
    into: list[torch.Tensor] = []
    dit.final_norm.register_forward_pre_hook(lambda module, args: into.append(args[0]))
    z = randn(2, 6, 8)
    velocity = dit(z, torch.tensor([0.2, 0.9]), Condition(randn(2, 6, 16, seed=1)), Prefilled())
    assert torch.equal(into[0], dit.embed(z) + dit.positions) and not velocity.any()


@torch.no_grad()
def test_a_block_with_one_signal_is_diffusers_pixart_block():
    """Theirs modulates, gates and adds; norms, attention and MLP are put in from ours: RMSNorm, rotary and
    SwiGLU are not PixArt's.
    """
    block, x, modulation, rotary = block_and_inputs(1)
    theirs = BasicTransformerBlock(DIM, HEADS, DIM // HEADS, norm_type="ada_norm_single")

    class Ours(nn.Module):
        def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return block.attention(hidden_states, rotary)

    theirs.norm1, theirs.norm2, theirs.attn1, theirs.ff = (
        block.attention_norm,
        block.mlp_norm,
        Ours(),
        block.mlp,
    )
    theirs.scale_shift_table.copy_(block.table)
    expected = theirs(x, timestep=modulation.flatten(1))
    torch.testing.assert_close(block(x, modulation, rotary), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_block_with_a_signal_for_each_token_is_the_formula_token_by_token():
    """PixArt-alpha (arXiv 2310.00426, section 2.3) with c~ of each token in the place of the sample's: all in
    loops over tokens, from the weights alone.
    """
    block, x, modulation, rotary = block_and_inputs(6)

    def norm(row: torch.Tensor) -> torch.Tensor:
        return row / (row.square().mean() + 1e-6).sqrt()

    def modulated(row: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return norm(row) * (1 + scale) + shift

    expected = torch.empty_like(x)
    for sample_x, sample_modulation, out in zip(x, modulation, expected, strict=True):
        parts = [signal + block.table for signal in sample_modulation]
        first = torch.stack([modulated(row, p[0], p[1]) for row, p in zip(sample_x, parts, strict=True)])
        attended = block.attention(first[None], rotary)[0]
        for token, p in enumerate(parts):
            row = sample_x[token] + p[2] * attended[token]
            gate, up = (block.mlp.gate_up.weight @ modulated(row, p[3], p[4]) + block.mlp.gate_up.bias).chunk(
                2
            )
            inner = gate * torch.sigmoid(gate) * up
            out[token] = row + p[5] * (block.mlp.down.weight @ inner + block.mlp.down.bias)
    torch.testing.assert_close(block(x, modulation, rotary), expected, atol=1e-5, rtol=1e-5)


# Parts of a block


@torch.no_grad()
@pytest.mark.parametrize("context_dim", [None, 24])
def test_attention_is_diffusers_attention_with_rms_normed_queries_and_keys(context_dim):
    attention = awaken(Attention(DIM, HEADS, context_dim))
    theirs = DiffusersAttention(
        DIM, context_dim, heads=HEADS, dim_head=DIM // HEADS, qk_norm="rms_norm", eps=1e-6
    ).eval()
    theirs.to_q.weight.copy_(attention.query.weight)
    key, value = attention.key_value.weight.chunk(2)
    theirs.to_k.weight.copy_(key)
    theirs.to_v.weight.copy_(value)
    theirs.to_out[0].load_state_dict(attention.out.state_dict())
    theirs.norm_q.weight.copy_(attention.query_norm.weight)
    theirs.norm_k.weight.copy_(attention.key_norm.weight)
    x, context, mask = randn(2, 6, DIM), None, None
    if context_dim is not None:
        context, mask = (
            randn(2, 5, context_dim, seed=1),
            torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool(),
        )
    bias = None if mask is None else torch.zeros(2, 1, 5).masked_fill(~mask[:, None], -math.inf)
    if bias is not None:
        bias = bias.repeat_interleave(HEADS, dim=0)
    expected = theirs(x, encoder_hidden_states=context, attention_mask=bias)
    attended = None if context is None else attention.keys_values(context)
    torch.testing.assert_close(attention(x, None, attended, mask), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rms_norm_is_llamas_and_torchs():
    norm, theirs = awaken(RMSNorm(DIM, eps=1e-6)), LlamaRMSNorm(DIM, eps=1e-6)
    theirs.weight.copy_(norm.weight)
    x = 3 + 2 * randn(2, 5, DIM)
    torch.testing.assert_close(norm(x), theirs(x))
    torch.testing.assert_close(norm(x), F.rms_norm(x, (DIM,), norm.weight, 1e-6))


@torch.no_grad()
def test_swiglu_is_llamas_mlp():
    mlp = awaken(SwiGLU(DIM, mlp_ratio=4.0))
    inner = mlp.down.in_features
    theirs = LlamaMLP(LlamaConfig(hidden_size=DIM, intermediate_size=inner, mlp_bias=True, hidden_act="silu"))
    for ours, part in zip(mlp.gate_up.weight.chunk(2), (theirs.gate_proj, theirs.up_proj), strict=True):
        part.weight.copy_(ours)
    for ours, part in zip(mlp.gate_up.bias.chunk(2), (theirs.gate_proj, theirs.up_proj), strict=True):
        part.bias.copy_(ours)
    theirs.down_proj.load_state_dict(mlp.down.state_dict())
    x = randn(2, 5, DIM)
    torch.testing.assert_close(mlp(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [(2, 3), (4, 4)])
def test_rotation_is_llamas_and_that_of_complex_numbers(grid):
    """Channel i of the first half and channel i of the second are a complex number: it turns by its token's
    row times a frequency for the first half of the pairs, by the column for the second.
    """
    head_dim, (rows, columns) = 16, grid
    quarter = head_dim // 4
    x = randn(2, 3, rows * columns, head_dim)
    rotary = rotary_grid(grid, head_dim)
    turned = rotate(x, rotary)

    cos, sin = (part.repeat(1, 2)[None] for part in rotary.unbind(-1))
    torch.testing.assert_close(turned, apply_rotary_pos_emb(x, x, cos, sin)[0])

    pairs = torch.complex(x[..., : head_dim // 2], x[..., head_dim // 2 :])
    for token in range(rows * columns):
        for i in range(head_dim // 2):
            place = token // columns if i < quarter else token % columns
            pairs[:, :, token, i] *= complex(np.exp(1j * place * 100.0 ** (-(i % quarter) / quarter)))
    torch.testing.assert_close(turned, torch.cat([pairs.real, pairs.imag], dim=-1), atol=1e-5, rtol=1e-5)


def test_rotation_gives_the_scores_of_dinov3s():
    """Scores depend on differences of places alone. DINOv3's run from -1 to 1 times 2 pi over the image; with
    its frequencies scaled so that neighbours differ by 1, ours are the same.
    """
    side, head_dim = 4, 16
    config = DINOv3ViTConfig(
        hidden_size=head_dim * 2, num_attention_heads=2, image_size=side * 4, patch_size=4, rope_theta=100.0
    )
    rope = DINOv3ViTRopePositionEmbedding(config).eval()
    rope.inv_freq.mul_(side / (4 * math.pi))
    cos, sin = rope(torch.zeros(1, 3, side * 4, side * 4))
    q, k = randn(1, 2, side**2, head_dim), randn(1, 2, side**2, head_dim, seed=1)
    theirs = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    rotary = rotary_grid((side, side), head_dim)
    scores = rotate(q, rotary) @ rotate(k, rotary).transpose(-1, -2)
    torch.testing.assert_close(scores, theirs[0] @ theirs[1].transpose(-1, -2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dim", [256, 17])
def test_the_timestep_embedding_is_diffusers(dim):
    t = torch.tensor([0.0, 1e-3, 0.31, 1.0])
    theirs = get_timestep_embedding(1000 * t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, dim), theirs, atol=1e-4, rtol=1e-5)


# Flow: levels and steps


@pytest.mark.parametrize("shift", [0.125, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("num_steps", [1, 5, 30])
def test_levels_and_euler_steps_are_diffusers(make_generator, monkeypatch, shift, num_steps):
    """Its scheduler shifts the sigmas that it is given, as pipelines of SD3 and FLUX give them."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist())
    torch.testing.assert_close(noise_levels(num_steps, shift).float(), scheduler.sigmas, atol=1e-6, rtol=1e-6)
    uniform = torch.linspace(0.01, 1, 50)
    training = FlowMatchEulerDiscreteScheduler(num_train_timesteps=50, shift=shift).sigmas.flip(0)
    torch.testing.assert_close(shift_noise_level(torch.arange(1, 51) / 50, shift), training)
    assert (shift_noise_level(uniform, shift) >= uniform).all() == (shift >= 1)

    generator = make_generator()
    generator.shift = shift
    monkeypatch.setattr(generator, "velocity", lambda z, t, prompts: curved(z, t))
    z = noise = randn(2, *generator.latent_shape)
    for timestep in scheduler.timesteps:
        z = scheduler.step(curved(z, timestep.expand(2) / 1000), timestep, z).prev_sample
    config = SamplerConfig(num_steps=num_steps, guidance_scale=1, precision="fp32")
    torch.testing.assert_close(sample(generator, [Request("a")] * 2, noise, config), z, atol=1e-4, rtol=1e-4)


def curved(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Some velocity that turns with place and level."""
    return torch.sin(2 * z + t[:, None, None]) + t[:, None, None] * z


@pytest.mark.parametrize("num_steps", [2, 7])
def test_heuns_steps_are_diffusers(make_generator, monkeypatch, num_steps):
    """2 n - 1 evaluations in both, the last step Euler's. Its scheduler spaces its own levels otherwise; here
    it is given ours.
    """
    generator = make_generator()
    generator.shift = shift = 3.0
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    levels = noise_levels(num_steps, shift).float()
    assert len(scheduler.sigmas) == 2 * num_steps
    scheduler.sigmas = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
    scheduler.timesteps = 1000 * scheduler.sigmas[:-1]
    scheduler.set_begin_index(0)
    z = noise = randn(2, *generator.latent_shape)
    asked = []
    for evaluated in [levels[0], *(following for _, following in pairwise(levels[:-1]) for _ in range(2))]:
        asked.append(evaluated)
        z = scheduler.step(curved(z, evaluated.expand(2)), 1000 * evaluated, z).prev_sample
    assert len(asked) == 2 * num_steps - 1
    monkeypatch.setattr(generator, "velocity", lambda z, t, prompts: curved(z, t))
    config = SamplerConfig(num_steps=num_steps, solver="heun", guidance_scale=1, precision="fp32")
    torch.testing.assert_close(sample(generator, [Request("a")] * 2, noise, config), z, atol=1e-4, rtol=1e-4)
