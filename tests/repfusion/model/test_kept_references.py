"""References that the denoiser computes once: what they see, what sees them, that nothing else changes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from repfusion.conditioning.base import Condition, Context
from repfusion.conditioning.unifusion import UniFusionConfig
from repfusion.diffusion.sampler import SamplerConfig, sample
from repfusion.layers import rotate
from repfusion.llm.chats.eyes import beside, in_rows
from repfusion.model.dit import DiTConfig
from repfusion.model.in_context import InContextDiT, ReferencesDiT
from repfusion.model.text_to_image import Prompted, TextToImage
from repfusion.request import Request

CONFIG = DiTConfig(hidden_size=32, depth=3, num_heads=2)
GRID, WIDTH = (2, 3), 24
TEXT = torch.arange(4)[:, None].expand(-1, 2)[None]
IMAGES = beside([in_rows(2, 2), in_rows(1, 3)])[None]


@torch.no_grad()
def awake(dit: InContextDiT) -> InContextDiT:
    torch.manual_seed(0)
    for parameter in dit.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return dit.eval()


@pytest.fixture
def dit() -> ReferencesDiT:
    dit = awake(ReferencesDiT(CONFIG, 16, GRID, None, (WIDTH, WIDTH)))
    assert isinstance(dit, ReferencesDiT)
    return dit


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given(rows: int = 2) -> tuple[Context, Context]:
    """Four text tokens and seven of two images."""
    text = Context(drawn(rows, 4, WIDTH), None, TEXT.expand(rows, -1, -1))
    return text, Context(drawn(rows, 7, WIDTH, seed=2), None, IMAGES.expand(rows, -1, -1))


@torch.no_grad()
def velocity(dit: InContextDiT, contexts: tuple[Context, ...], seed: int = 3) -> Tensor:
    rows = len(contexts[0].tokens)
    z_t, t = drawn(rows, 6, 16, seed=seed), torch.linspace(0.3, 0.9, rows)
    return dit(z_t, t, Condition(), dit.prefill(contexts))


@torch.no_grad()
def in_one_sequence(dit: ReferencesDiT, z_t: Tensor, t: Tensor, text: Context, images: Context) -> Tensor:
    """The same in one sequence and float64: a mask keeps references to themselves, and each token has a
    modulation of its own.
    """
    signal, still = (torch.nn.functional.silu(dit.time(one)).double() for one in (t, torch.zeros_like(t)))
    dit = dit.double()
    num_images, num_rest = images.tokens.shape[1], z_t.shape[1] + text.tokens.shape[1]
    tokens = torch.cat([text.tokens, images.tokens], 1).double()
    x = torch.cat([dit.embed(z_t.double()) + dit.positions, dit.context_embed(tokens)], dim=1)
    places = [dit.rotary.expand(len(z_t), -1, -1, -1), dit.rotary_of(text), dit.rotary_of(images)]
    rotary = torch.cat([one.double() for one in places], dim=1)
    seen = torch.ones(num_rest + num_images, num_rest + num_images, dtype=torch.bool)
    seen[num_rest:, :num_rest] = False
    signals = torch.cat(
        [signal[:, None].expand(-1, num_rest, -1), still[:, None].expand(-1, num_images, -1)], 1
    )
    modulation = dit.modulation(signals).unflatten(-1, (6, -1))
    for block in dit.blocks:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (modulation + block.table).unbind(2)
        h = block.attention_norm(x) * (1 + scale_a) + shift_a
        q = block.attention.query(h).unflatten(-1, (2, -1)).transpose(1, 2)
        q = rotate(block.attention.query_norm(q), rotary)
        k, v = block.attention.keys_values(h)
        scores = q @ rotate(k, rotary).transpose(-1, -2) / q.shape[-1] ** 0.5
        mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        x = x + gate_a * block.attention.out(mixed.transpose(1, 2).flatten(2))
        x = x + gate_m * block.mlp(block.mlp_norm(x) * (1 + scale_m) + shift_m)
    return dit.velocity_of(x[:, : z_t.shape[1]], signal[:, None])


def test_two_streams_are_one_sequence_under_a_mask(dit):
    text, images = given()
    found = velocity(dit, (text, images))
    z_t, t = drawn(2, 6, 16, seed=3), torch.linspace(0.3, 0.9, 2)
    torch.testing.assert_close(
        found.double(), in_one_sequence(dit, z_t, t, text, images), rtol=1e-4, atol=1e-5
    )


def test_what_is_kept_follows_from_the_references_alone(dit):
    text, images = given()
    with torch.no_grad():
        kept, others = (
            dit.prefill((one, images)).keys_values for one in (text, replace(text, tokens=-text.tokens))
        )
        moved = dit.prefill((text, replace(images, positions=images.positions - 1))).keys_values
    pairs = zip(kept[0], others[0], strict=True)
    assert all(torch.equal(*both) for one, other in pairs for both in zip(one, other, strict=True))
    assert len(kept[0]) == CONFIG.depth and not torch.allclose(kept[0][1][0], moved[0][1][0])


def test_every_reference_counts(dit):
    text, images = given(1)
    before = velocity(dit, (text, images))
    for place in range(7):
        tokens = images.tokens.clone()
        tokens[0, place] += 1
        assert (velocity(dit, (text, replace(images, tokens=tokens))) - before).abs().max() > 1e-4


def test_rows_without_references_have_the_velocities_of_the_plain_denoiser(dit):
    """Of the same weights; whatever stands in the padding."""
    plain = awake(InContextDiT(CONFIG, 16, GRID, None, (WIDTH,)))
    plain.load_state_dict(dit.state_dict())
    text, images = given()
    nothing = replace(images, mask=torch.zeros(2, 7, dtype=torch.bool))
    torch.testing.assert_close(velocity(dit, (text, nothing)), velocity(plain, (text,)))
    second = replace(images, mask=torch.tensor([[False] * 7, [True] * 7]))
    mixed = velocity(dit, (text, second))
    torch.testing.assert_close(mixed[0], velocity(plain, (text,))[0])
    torch.testing.assert_close(mixed[1], velocity(dit, (text, images))[1])


def test_gradients_reach_the_references(dit):
    text, images = given()
    tokens = images.tokens.requires_grad_()
    static = dit.prefill((text, replace(images, tokens=tokens)))
    dit(drawn(2, 6, 16), torch.tensor([0.2, 0.7]), Condition(), static).square().sum().backward()
    assert tokens.grad is not None and (tokens.grad.abs().amax(dim=2) > 0).all()
    assert all(parameter.grad is not None for parameter in dit.parameters())


@pytest.mark.parametrize(("aligned", "contexts"), [(24, ()), (None, (24,)), (None, (24, 32))])
def test_other_conditions_are_refused(aligned, contexts):
    with pytest.raises(ValueError, match="two contexts of one width"):
        ReferencesDiT(CONFIG, 16, GRID, aligned, contexts)


def test_only_a_sequence_has_references_to_keep():
    with pytest.raises(ValueError, match=r"cross_attention, which keeps all keys.*set interface: in_context"):
        UniFusionConfig(kept_references=True, interface="cross_attention")


@pytest.fixture
def model(make_generator) -> TextToImage:
    return make_generator("unifusion_references")


def test_sampling_with_what_was_kept_is_sampling_that_computes_it_anew(model, monkeypatch):
    """To the last bit: one request with two images, one with one, one without."""
    shown = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    requests = [Request("a red circle", (*shown[:2],)), Request("two blue square", (shown[2],)), Request("a")]
    noise = drawn(3, *model.latent_shape)
    config = SamplerConfig(num_steps=3, guidance_scale=2, image_guidance_scale=1.5, precision="fp32")
    once = sample(model, requests, noise, config)
    without = sample(model, [replace(one, images=()) for one in requests], noise, config)
    assert (once - without).abs().amax(dim=(1, 2)).tolist()[:2] > [1e-3, 1e-3]
    torch.testing.assert_close(once[2], without[2])

    calls, velocity = [], model.velocity

    def anew(z_t: Tensor, t: Tensor, prompted: Prompted) -> Tensor:
        calls.append(len(z_t))
        static = model.denoiser.prefill(prompted.prepared.static)
        return velocity(z_t, t, Prompted(prompted.prepared, static))

    monkeypatch.setattr(model, "velocity", anew)
    assert torch.equal(sample(model, requests, noise, config), once) and calls == [9, 9, 9]


def test_a_request_does_not_depend_on_the_others(model):
    shown = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    requests = [
        Request("a red circle", (*shown,)),
        Request("two blue square left of a green circle"),
        Request(""),
    ]
    z_t, t = drawn(3, *model.latent_shape), torch.tensor([0.2, 0.5, 0.8])
    with torch.no_grad():
        together = model.velocity(z_t, t, model.read(requests, ["full"] * 3))
        for row, request in enumerate(requests):
            alone = model.velocity(z_t[row : row + 1], t[row : row + 1], model.read([request], ["full"]))
            torch.testing.assert_close(alone[0], together[row])
