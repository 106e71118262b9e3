"""The in-context denoiser: what its tokens see of each other, and where they stand."""

import pytest
import torch

from repfusion.conditioning.base import Condition, Context
from repfusion.layers import rotary_at
from repfusion.llm.chats.eyes import beside, in_rows
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


def velocity(
    dit: InContextDiT,
    tokens: torch.Tensor,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    row: int = 0,
) -> torch.Tensor:
    """Of the noisy latents from `row` on."""
    generator = torch.Generator().manual_seed(1)
    z_t = torch.randn(3, 6, 16, generator=generator)[row : row + len(tokens)]
    static = dit.prefill((Context(tokens, mask, positions),))
    with torch.no_grad():
        return dit(z_t, torch.full((len(tokens),), 0.6), Condition(), static)


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


TEXT = torch.arange(5)[:, None].expand(-1, 2)
IMAGES = beside([in_rows(3, 2), in_rows(2, 4)])


@pytest.mark.parametrize("positions", [None, torch.cat([TEXT, IMAGES])[None]])
def test_no_two_tokens_stand_at_one_place(dit, positions):
    num = 5 if positions is None else positions.shape[1]
    (rotary,) = dit.rotary_of(Context(torch.zeros(1, num, 24), positions=positions))
    rotary = torch.cat([dit.rotary, rotary]).flatten(1)
    distances = torch.cdist(rotary, rotary) + torch.eye(len(rotary))
    assert rotary.shape[0] == 6 + num and distances.min() > 1e-2


def test_images_lie_beside_each_other_left_of_the_latents_and_text_after_them(dit):
    """Image 1's last column is the latents' first but one, image 2 ends where it begins; rows are the
    latents' own.
    """
    first, second = IMAGES.split([6, 8])
    assert first.tolist() == [[0, -2], [0, -1], [1, -2], [1, -1], [2, -2], [2, -1]]
    assert second[:, 0].tolist() == [0] * 4 + [1] * 4
    assert second[:, 1].tolist() == [-6, -5, -4, -3] * 2
    (rotary,) = dit.rotary_of(Context(torch.zeros(1, 19, 24), positions=torch.cat([TEXT, IMAGES])[None]))
    places = [[3 + k, 3 + k] for k in range(5)] + IMAGES.tolist()  # the grid's longer side is 3
    torch.testing.assert_close(rotary, rotary_at(torch.tensor(places), 16))


def test_text_without_positions_stands_where_text_with_them_does(dit):
    tokens = torch.randn(2, 5, 24)
    assert torch.equal(velocity(dit, tokens), velocity(dit, tokens, positions=TEXT.expand(2, -1, -1)))


def test_a_condition_is_a_set_of_tokens_at_places(dit):
    """Images that change their order in the sequence with their places change nothing; without, they do."""
    tokens, positions = torch.randn(1, 19, 24), torch.cat([TEXT, IMAGES])[None]
    swapped = [*range(5), *range(11, 19), *range(5, 11)]
    found = velocity(dit, tokens, positions=positions)
    same = velocity(dit, tokens[:, swapped], positions=positions[:, swapped])
    torch.testing.assert_close(same, found, rtol=1e-4, atol=1e-5)
    assert (velocity(dit, tokens[:, swapped], positions=positions) - found).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_no_position(dit, side):
    """Rows of 5, 11 and 19 tokens, padded on either side with garbage at any place."""
    tokens, positions = torch.randn(3, 19, 24), torch.cat([TEXT, IMAGES]).expand(3, -1, -1)
    lengths = (5, 11, 19)
    rows = [
        velocity(dit, tokens[i : i + 1, :n], None, positions[i : i + 1, :n], row=i)
        for i, n in enumerate(lengths)
    ]
    padded, places, mask = torch.full((3, 19, 24), 50.0), torch.full((3, 19, 2), -7), torch.zeros(3, 19) > 0
    for i, n in enumerate(lengths):
        where = slice(0, n) if side == "right" else slice(19 - n, 19)
        padded[i, where], places[i, where], mask[i, where] = tokens[i, :n], positions[i, :n], True
    found = velocity(dit, padded, mask, places)
    torch.testing.assert_close(found, torch.cat(rows), rtol=1e-4, atol=1e-5)


def test_a_context_of_each_step_serves_as_well(dit):
    context, z_t, t = Context(torch.randn(2, 3, 24)), torch.randn(2, 6, 16), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        static = dit(z_t, t, Condition(), dit.prefill((context,)))
        torch.testing.assert_close(dit(z_t, t, Condition(contexts=(context,)), dit.prefill(())), static)


@pytest.mark.parametrize(("aligned", "contexts"), [(24, ()), (24, (24,)), (None, (24, 24))])
def test_other_conditions_are_refused(aligned, contexts):
    with pytest.raises(ValueError, match="in context stands one context"):
        InContextDiT(CONFIG, 16, (2, 2), aligned, contexts)
