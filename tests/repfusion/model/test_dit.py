"""The denoiser: one condition token per latent token, zero at first, then what its equations say."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repfusion.conditioning.base import Condition, Context
from repfusion.layers import (
    Attention,
    RMSNorm,
    SwiGLU,
    TimestepEmbedder,
    rotary_grid,
    rotate,
    timestep_embedding,
)
from repfusion.model.denoiser import Prefilled
from repfusion.model.dit import DiT, DiTConfig
from repfusion.model.velocity_head import VelocityHead

GRID, LATENT, CONDITION = (3, 4), 8, 20
TOKENS = 12


def make_dit(interface: str = "adaln", depth: int = 2, awake: bool = True, seed: int = 0) -> DiT:
    torch.manual_seed(seed)
    config = DiTConfig(hidden_size=32, depth=depth, num_heads=2)
    widths = (CONDITION, ()) if interface == "adaln" else (None, (CONDITION,))
    dit = DiT(config, LATENT, GRID, *widths)
    if awake:
        with torch.no_grad():
            for parameter in dit.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return dit


def inputs(condition_tokens: int = TOKENS, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    z_t = torch.randn(batch, TOKENS, LATENT, generator=generator)
    condition = torch.randn(batch, condition_tokens, CONDITION, generator=generator)
    return z_t, torch.rand(batch, generator=generator), condition


def velocity_of(
    dit: DiT, z_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """With condition tokens as the interface that the DiT was built for takes them."""
    if not hasattr(dit.blocks[0], "cross_attention"):
        return dit(z_t, t, Condition(condition), Prefilled())
    return dit(z_t, t, Condition(), dit.prefill((Context(condition, mask),)))


def changed_tokens(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return ((before - after).abs().amax(dim=(0, 2)) > 1e-6).nonzero().flatten().tolist()


@pytest.mark.parametrize("interface", ["adaln", "cross_attention"])
def test_the_first_velocity_is_zero_and_the_first_step_changes_it(interface):
    dit = make_dit(interface, awake=False)
    velocity = velocity_of(dit, *inputs())
    assert torch.equal(velocity, torch.zeros_like(velocity))
    optimizer = torch.optim.SGD(dit.parameters(), lr=1.0)
    (velocity - 1).square().mean().backward()
    optimizer.step()
    assert velocity_of(dit, *inputs()).abs().min() > 0


@pytest.mark.parametrize("interface", ["adaln", "cross_attention"])
def test_every_weight_has_a_gradient_once_awake(interface):
    dit = make_dit(interface)
    velocity_of(dit, *inputs()).square().mean().backward()
    silent = [name for name, p in dit.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []


def test_a_condition_token_reaches_its_own_latent_token_alone_unless_attention_spreads_it():
    dit = make_dit(depth=1)
    z_t, t, condition = inputs()
    other = condition.clone()
    other[:, 5] += 1.0
    assert changed_tokens(velocity_of(dit, z_t, t, condition), velocity_of(dit, z_t, t, other)) == list(
        range(TOKENS)
    )
    nn.init.zeros_(dit.blocks[0].attention.out.weight)
    nn.init.zeros_(dit.blocks[0].attention.out.bias)
    assert changed_tokens(velocity_of(dit, z_t, t, condition), velocity_of(dit, z_t, t, other)) == [5]


def test_adaln_single_follows_its_equation():
    """One block without attention: shared modulation plus the block's table, then the final one."""
    dit = make_dit(depth=1).double()
    z_t, t, condition = (x.double() for x in inputs())
    nn.init.zeros_(dit.blocks[0].attention.out.weight)
    nn.init.zeros_(dit.blocks[0].attention.out.bias)
    block = dit.blocks[0]

    def rms(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    sinusoids = timestep_embedding(t, dit.time.frequency_dim).double()
    signal = F.silu(condition + dit.time.mlp(sinusoids)[:, None])
    parts = dit.modulation(signal).unflatten(-1, (6, 32)) + block.table
    shift, scale, gate = parts[:, :, 3], parts[:, :, 4], parts[:, :, 5]
    x = dit.embed(z_t) + dit.positions
    gate_in, up = block.mlp.gate_up(rms(x) * (1 + scale) + shift).chunk(2, -1)
    x = x + gate * block.mlp.down(F.silu(gate_in) * up)
    final = dit.final_modulation(signal).unflatten(-1, (2, 32)) + dit.final_table
    expected = dit.out(rms(x) * (1 + final[:, :, 1]) + final[:, :, 0])
    dit.time.mlp.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    torch.testing.assert_close(velocity_of(dit, z_t, t, condition), expected, atol=1e-12, rtol=1e-12)


def test_blocks_share_one_modulation_and_own_a_table_each():
    dit = make_dit(depth=3, awake=False)
    assert dit.modulation.weight.shape == (6 * 32, CONDITION)
    assert [
        name for name, _ in dit.blocks[1].named_parameters() if "table" in name or "modulation" in name
    ] == ["table"]


def test_velocity_depends_on_latents_and_noise_level():
    dit = make_dit()
    z_t, t, condition = inputs()
    before = velocity_of(dit, z_t, t, condition)
    assert (velocity_of(dit, z_t, t / 2, condition) - before).abs().max() > 1e-3
    assert (velocity_of(dit, z_t + 0.1, t, condition) - before).abs().max() > 1e-3


def test_samples_of_a_batch_do_not_mix():
    dit = make_dit()
    z_t, t, condition = inputs(batch=3)
    for row in range(3):
        alone = velocity_of(dit, z_t[row : row + 1], t[row : row + 1], condition[row : row + 1])
        torch.testing.assert_close(
            alone, velocity_of(dit, z_t, t, condition)[row : row + 1], atol=1e-5, rtol=1e-5
        )


def test_padding_of_a_cross_attended_condition_is_not_read():
    dit = make_dit("cross_attention")
    z_t, t, condition = inputs(condition_tokens=5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    padded = torch.cat([condition, 100 * torch.ones(2, 3, CONDITION)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    before = velocity_of(dit, z_t, t, condition, mask)
    torch.testing.assert_close(velocity_of(dit, z_t, t, padded, padded_mask), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(velocity_of(dit, z_t, t, condition), before, atol=1e-5, rtol=1e-5)
    assert (velocity_of(dit, z_t, t, padded) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("hidden_size", "num_heads", "message"),
    [
        (12, 1, "hidden_size 12 is below the latent width 16.*at least 16"),
        (24, 5, "hidden_size 24 over 5 heads"),
        (36, 6, "hidden_size 36 over 6 heads"),
    ],
)
def test_widths_that_cannot_work_are_refused_with_both_numbers(hidden_size, num_heads, message):
    with pytest.raises(ValueError, match=message):
        DiT(DiTConfig(hidden_size=hidden_size, num_heads=num_heads), 16, (2, 2), 8)


def test_a_width_equal_to_the_latent_width_is_enough():
    assert DiT(DiTConfig(hidden_size=16, depth=1, num_heads=1), 16, (2, 2), 8).out.out_features == 16


def test_timestep_embedding_values():
    t = torch.tensor([0.0, 0.25, 1.0])
    embedding = timestep_embedding(t, 9)
    frequencies = [10_000 ** (-k / 4) for k in range(4)]
    for row, level in enumerate(t.tolist()):
        angles = torch.tensor([1000 * level * f for f in frequencies], dtype=torch.float64)
        expected = torch.cat([angles.cos(), angles.sin(), torch.zeros(1, dtype=torch.float64)])
        torch.testing.assert_close(embedding[row].double(), expected, atol=1e-4, rtol=0)


def test_zero_initialised_timestep_embedder_can_learn():
    embedder = TimestepEmbedder(6, zero_init=True)
    t = torch.tensor([0.1, 0.9])
    assert torch.equal(embedder(t), torch.zeros(2, 6))
    (embedder(t) - 1).square().mean().backward()
    assert embedder.mlp[2].weight.grad.abs().max() > 0


def test_rotary_scores_depend_on_the_offset_in_rows_and_columns_alone():
    rotary = rotary_grid((5, 6), 16)
    generator = torch.Generator().manual_seed(2)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=generator).expand(2, 1, 1, 30, 16)
    scores = (rotate(query, rotary) @ rotate(key, rotary).mT)[0, 0].reshape(5, 6, 5, 6)
    torch.testing.assert_close(scores[0, 1, 2, 4], scores[2, 2, 4, 5], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores[3, 0, 1, 2], scores[4, 3, 2, 5], atol=1e-5, rtol=0)
    assert (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs() > 1e-3  # a row away is not a column away
    torch.testing.assert_close(rotate(query, rotary).norm(dim=-1), query.norm(dim=-1))


def test_attention_equals_the_written_out_softmax():
    torch.manual_seed(0)
    attention = Attention(16, 2)
    x = torch.randn(2, 5, 16)
    q = attention.query(x).unflatten(-1, (2, 8)).transpose(1, 2)
    k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in attention.key_value(x).chunk(2, -1))
    q, k = (F.rms_norm(part, (8,), eps=1e-6) for part in (q, k))
    expected = attention.out(((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-5)


def test_swiglu_counts_as_an_mlp_of_its_ratio():
    num_weights = sum(p.numel() for name, p in SwiGLU(192, 4.0).named_parameters() if "weight" in name)
    assert num_weights == pytest.approx(2 * 4 * 192**2, rel=0.01)


def test_rms_norm_follows_the_precision_of_its_input():
    norm = RMSNorm(16, eps=1e-6)
    nn.init.normal_(norm.weight)
    x = torch.randn(4, 16)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x.bfloat16()).float(), norm(x), atol=0.03, rtol=0.03)


def test_bfloat16_autocast_stays_near_float32():
    dit = make_dit()
    with torch.autocast("cpu", torch.bfloat16):
        low = velocity_of(dit, *inputs()).float()
    high = velocity_of(dit, *inputs())
    assert (low - high).norm() / high.norm() < 0.03


def test_absolute_positions_tell_where_a_token_stands():
    """Identical tokens under one condition: rotary positions alone leave their velocities the same."""
    config = DiTConfig(hidden_size=32, depth=2, num_heads=2)
    for has_positions in (False, True):
        torch.manual_seed(0)
        dit = DiT(
            config.model_copy(update={"absolute_positions": has_positions}),
            LATENT,
            GRID,
            context_widths=(CONDITION,),
        ).double()
        with torch.no_grad():
            for parameter in dit.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        dit.time.mlp.register_forward_pre_hook(lambda module, args: (args[0].double(),))
        one = torch.randn(1, 1, LATENT, dtype=torch.float64).expand(-1, TOKENS, -1)
        velocity = velocity_of(dit, one, torch.tensor([0.5]).double(), torch.randn(1, 3, CONDITION).double())
        spread = (velocity - velocity[:, :1]).abs().max()
        assert spread > 1e-2 if has_positions else spread < 1e-10


def test_a_context_that_changes_from_step_to_step_reads_like_a_static_one():
    dit = make_dit("cross_attention")
    z_t, t, tokens = inputs(condition_tokens=5)
    context = Context(tokens, torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))
    expected = velocity_of(dit, z_t, t, context.tokens, context.mask)
    assert torch.equal(dit(z_t, t, Condition(contexts=(context,)), Prefilled()), expected)


def test_the_first_rows_of_what_was_prefilled():
    """The same velocities as from fewer rows, and the whole stays as it was."""
    dit = make_dit("cross_attention")
    z_t, t, tokens = inputs(condition_tokens=5, batch=3)
    whole = dit.prefill((Context(tokens, torch.ones(3, 5).bool()),))
    before = dit(z_t, t, Condition(), whole)
    part = dit(z_t[:2], t[:2], Condition(), whole.first(2))
    torch.testing.assert_close(part, velocity_of(dit, z_t[:2], t[:2], tokens[:2]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(part, before[:2], atol=1e-5, rtol=1e-5)
    assert torch.equal(dit(z_t, t, Condition(), whole), before)


@pytest.mark.parametrize(
    ("aligned_width", "context_widths"), [(None, ()), (20, (20,)), (None, (20, 8)), (20, (20, 8))]
)
def test_conditions_that_no_block_takes_are_refused(aligned_width, context_widths):
    message = f"no DiT block takes aligned tokens of width {aligned_width} beside contexts of widths "
    with pytest.raises(
        ValueError, match=message + r".*; expected aligned tokens alone \(AdaLN\) or one context"
    ):
        DiT(DiTConfig(hidden_size=32, num_heads=2), LATENT, GRID, aligned_width, context_widths)


def test_a_velocity_head_refuses_contexts():
    with pytest.raises(ValueError, match="takes aligned tokens alone, got 1 contexts"):
        VelocityHead(CONDITION, LATENT).prefill((Context(torch.zeros(1, 2, CONDITION)),))
