"""The in-context denoiser: what its tokens see of each other, and where they stand."""

import pytest
import torch

from repfusion.conditioning.base import Condition, Context
from repfusion.model.dit import DiTConfig
from repfusion.model.in_context import InContextDiT

CONFIG = DiTConfig(hidden_size=32, depth=2, num_heads=2)


@pytest.fixture
def dit() -> InContextDiT:
    torch.manual_seed(0)
    dit = InContextDiT(CONFIG, 16, (2, 3), None, (24,))
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return dit.eval()


def velocity(dit: InContextDiT, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    z_t = torch.randn(len(tokens), 6, 16, generator=generator)
    with torch.no_grad():
        return dit(z_t, torch.full((len(tokens),), 0.6), Condition(), dit.prefill((Context(tokens, mask),)))


def test_padding_is_not_seen(dit):
    tokens = torch.randn(2, 5, 24)
    mask = torch.arange(5) < torch.tensor([[3], [5]])
    found = velocity(dit, tokens, mask)
    garbage = torch.where(mask[..., None], tokens, 100.0)
    torch.testing.assert_close(velocity(dit, garbage, mask), found)
    torch.testing.assert_close(velocity(dit, tokens[:, :3])[0], found[0], rtol=1e-4, atol=1e-5)


def test_every_token_counts_and_so_does_its_place(dit):
    tokens = torch.randn(1, 4, 24)
    before = velocity(dit, tokens)
    for place in range(4):
        changed = tokens.clone()
        changed[0, place] += 1
        assert (velocity(dit, changed) - before).abs().max() > 1e-3
    assert (velocity(dit, tokens.flip(1)) - before).abs().max() > 1e-3


def test_condition_tokens_change_with_the_latents(dit):
    """What leaves the last block differs with z_t: they are part of the stream, not a fixed context."""
    seen = []
    dit.blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out[:, 6:]))
    static = dit.prefill((Context(torch.randn(1, 4, 24)),))
    with torch.no_grad():
        for z_t in (torch.zeros(1, 6, 16), torch.ones(1, 6, 16)):
            dit(z_t, torch.tensor([0.5]), Condition(), static)
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_no_two_tokens_stand_at_one_place(dit):
    rotary = dit.rotary_of(5).flatten(1)
    distances = torch.cdist(rotary, rotary) + torch.eye(len(rotary))
    assert rotary.shape[0] == 11 and distances.min() > 1e-3


def test_a_context_of_each_step_serves_as_well(dit):
    context, z_t, t = Context(torch.randn(2, 3, 24)), torch.randn(2, 6, 16), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        static = dit(z_t, t, Condition(), dit.prefill((context,)))
        torch.testing.assert_close(dit(z_t, t, Condition(contexts=(context,)), dit.prefill(())), static)


@pytest.mark.parametrize(("aligned", "contexts"), [(24, ()), (24, (24,)), (None, (24, 24))])
def test_other_conditions_are_refused(aligned, contexts):
    with pytest.raises(ValueError, match="in context stands one context"):
        InContextDiT(CONFIG, 16, (2, 2), aligned, contexts)
