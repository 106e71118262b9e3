"""Denoisers with a context for each block, against loops over tokens in float64."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from slow_layers import keys_values, modulated, rms
from torch import Tensor, nn

from repfusion.conditioning.base import Condition, Context
from repfusion.model.dit import DiT, DiTConfig
from repfusion.model.per_block import InjectedDiT, JointKeysDiT

CONFIG = DiTConfig(hidden_size=32, depth=3, num_heads=2, mlp_ratio=2.0)
GRID, LATENT, WIDTH = (2, 3), 8, 24
PLACES = list(product(range(2), range(3)))
LENGTHS = (4, 1)


class Given(nn.Module):
    """An embedder of the noise level that is exact in float64."""

    def __init__(self, width: int):
        super().__init__()
        self.vector = nn.Parameter(torch.randn(width))

    def forward(self, t: Tensor) -> Tensor:
        return t[:, None] * self.vector


def build(kind: type[DiT]) -> DiT:
    torch.manual_seed(0)
    dit = kind(CONFIG, LATENT, GRID, None, (WIDTH,) * CONFIG.depth)
    dit.time = Given(WIDTH)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return dit.double().eval()


def drawn() -> tuple[Tensor, Tensor, tuple[Context, ...]]:
    torch.manual_seed(1)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    contexts = tuple(
        Context(torch.randn(2, max(LENGTHS), WIDTH, dtype=torch.float64), mask) for _ in range(CONFIG.depth)
    )
    return torch.randn(2, 6, LATENT, dtype=torch.float64), torch.tensor([0.3, 0.8]).double(), contexts


def velocity(dit: DiT, z_t: Tensor, t: Tensor, contexts: tuple[Context, ...]) -> Tensor:
    with torch.no_grad():
        return dit(z_t, t, Condition(), dit.prefill(contexts))


def begun(dit: DiT, z_t: Tensor) -> list[Tensor]:
    return [dit.embed.weight @ z + dit.embed.bias + dit.positions[i] for i, z in enumerate(z_t)]


def ended(dit: DiT, tokens: list[Tensor], signal: Tensor) -> Tensor:
    shift, scale = (dit.final_modulation.weight @ signal + dit.final_modulation.bias).reshape(
        2, -1
    ) + dit.final_table
    return torch.stack([dit.out.weight @ (rms(x) * (1 + scale) + shift) + dit.out.bias for x in tokens])


def modulation_of(dit: DiT, signal: Tensor) -> Tensor:
    return (dit.modulation.weight @ signal + dit.modulation.bias).reshape(6, -1)


def slow_joint(dit: JointKeysDiT, z_t: Tensor, t: Tensor, states: list[list[Tensor]]) -> Tensor:
    """One sample: each block's latents attend to each other and to its own context, from the diagonal on."""
    signal, tokens = F.silu(t * dit.time.vector), begun(dit, z_t)
    for block, context in zip(dit.blocks, states, strict=True):
        gain, heads = block.context_key_norm.weight, block.attention.num_heads
        beside = [
            keys_values(block.context_key_value.weight @ x, gain, heads, (3 + place, 3 + place))
            for place, x in enumerate(context)
        ]
        tokens = modulated(block, tokens, modulation_of(dit, signal), PLACES, beside)
    return ended(dit, tokens, signal)


def slow_injected(dit: InjectedDiT, z_t: Tensor, t: Tensor, states: list[list[Tensor]]) -> Tensor:
    """One sample: condition tokens follow the latents; before each later block its own are added to them."""
    signal = F.silu(t * dit.time.vector)
    norm, first, _, second = dit.context_embed
    text = [
        second.weight @ F.gelu(first.weight @ rms(x, norm.weight) + first.bias) + second.bias
        for x in states[0]
    ]
    places = PLACES + [(3 + place, 3 + place) for place in range(len(text))]
    tokens = begun(dit, z_t) + text
    for number, block in enumerate(dit.blocks):
        if number:
            added = [dit.injections[number - 1].weight @ x for x in states[number]]
            tokens = tokens[:6] + [x + y for x, y in zip(tokens[6:], added, strict=True)]
        tokens = modulated(block, tokens, modulation_of(dit, signal), places)
    return ended(dit, tokens[:6], signal)


@pytest.mark.parametrize(("kind", "slow"), [(JointKeysDiT, slow_joint), (InjectedDiT, slow_injected)])
def test_the_velocity_is_that_of_a_slow_reference_without_padding(kind, slow):
    dit, (z_t, t, contexts) = build(kind), drawn()
    found = velocity(dit, z_t, t, contexts)
    with torch.no_grad():
        for row, length in enumerate(LENGTHS):
            states = [list(context.tokens[row, :length]) for context in contexts]
            torch.testing.assert_close(found[row], slow(dit, z_t[row], t[row], states), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [JointKeysDiT, InjectedDiT])
def test_each_block_sees_its_own_context_and_no_padding(kind):
    dit, (z_t, t, contexts) = build(kind), drawn()
    before = velocity(dit, z_t, t, contexts)
    seen: list[Tensor] = []
    for block in dit.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out[:, :6]))
    velocity(dit, z_t, t, contexts)
    plain, number = list(seen), 1
    changed = [*contexts]
    changed[number] = Context(contexts[number].tokens + 1, contexts[number].mask)
    seen.clear()
    velocity(dit, z_t, t, tuple(changed))
    moved = [bool((one - other).abs().max() > 1e-4) for one, other in zip(seen, plain, strict=True)]
    assert moved == [False, True, True]
    garbage = tuple(
        Context(torch.where(one.mask[..., None], one.tokens, 100.0), one.mask) for one in contexts
    )
    torch.testing.assert_close(velocity(dit, z_t, t, garbage), before)


@pytest.mark.parametrize("kind", [JointKeysDiT, InjectedDiT])
@pytest.mark.parametrize(("aligned", "contexts"), [(WIDTH, ()), (None, (WIDTH,)), (None, (WIDTH, WIDTH, 8))])
def test_other_conditions_are_refused(kind, aligned, contexts):
    with pytest.raises(ValueError, match="each of 3 blocks takes a context of one width"):
        kind(CONFIG, LATENT, GRID, aligned, contexts)
