"""Rectified flow: t is the noise level, the shift moves it to noise, a draw belongs to a sample."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from repfusion.data.order import sample_seed
from repfusion.diffusion.flow import (
    DROPPED,
    FlowConfig,
    draw,
    interpolate,
    shift_factor,
    shift_noise_level,
    uniforms,
    velocity,
)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64)
    return latents, noise


def test_noise_level_zero_is_data_and_one_is_noise(pair):
    latents, noise = pair
    assert torch.equal(interpolate(latents, noise, torch.zeros(5, dtype=torch.float64)), latents)
    assert torch.equal(interpolate(latents, noise, torch.ones(5, dtype=torch.float64)), noise)


def test_velocity_leads_back_to_both_ends(pair):
    latents, noise = pair
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    z_t, v = interpolate(latents, noise, t), velocity(latents, noise)
    level = t[:, None, None]
    torch.testing.assert_close(z_t - level * v, latents, atol=1e-14, rtol=0)
    torch.testing.assert_close(z_t + (1 - level) * v, noise, atol=1e-14, rtol=0)


def test_velocity_is_the_slope_along_the_noise_level(pair):
    latents, noise = pair
    t = torch.full((5,), 0.3, dtype=torch.float64)
    slope = (interpolate(latents, noise, t + 0.25) - interpolate(latents, noise, t)) / 0.25
    torch.testing.assert_close(slope, velocity(latents, noise), atol=1e-13, rtol=0)


def test_each_sample_has_its_own_noise_level(pair):
    latents, noise = pair
    z_t = interpolate(latents, noise, torch.tensor([0.0, 1.0, 0.5, 0.25, 0.75], dtype=torch.float64))
    assert torch.equal(z_t[0], latents[0])
    assert torch.equal(z_t[1], noise[1])
    torch.testing.assert_close(z_t[3], 0.75 * latents[3] + 0.25 * noise[3])


def test_the_papers_latents_are_shifted_by_twelve():
    assert shift_factor(576, 1024, FlowConfig().base_dim) == 12
    assert shift_factor(256, 16) == 1
    assert shift_noise_level(torch.tensor([0.5], dtype=torch.float64), 12.0).item() == pytest.approx(12 / 13)


@pytest.mark.parametrize("shift", [12.0, 3.3, 1.0, 1 / 3, 0.1768, 0.0884])
def test_the_shift_keeps_the_ends_and_the_order(shift: float):
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)
    s = shift_noise_level(u, shift)
    assert s[0] == 0 and s[-1] == 1
    assert bool((s.diff() > 0).all())
    middle = s[1:-1] - u[1:-1]
    assert bool((middle * (shift - 1) > 0).all()) or shift == 1  # above 1: towards noise
    torch.testing.assert_close(shift_noise_level(s, 1 / shift), u, atol=1e-14, rtol=0)


def drawn(seeds: list[int], shift: float) -> dict[str, torch.Tensor]:
    """All that a sample's seed decides here."""
    t, noise = draw(seeds, (4, 6), shift)
    return {"t": t, "noise": noise, "uniforms": uniforms(seeds)}


def test_a_draw_does_not_depend_on_the_batch_it_is_made_in():
    seeds = [5, 2**64 - 1, *range(40, 50)]
    together = drawn(seeds, shift=2.0)
    for split in ([4, 4, 4], [1] * 12, [7, 5]):
        start, parts = 0, []
        for size in split:
            parts.append(drawn(seeds[start : start + size], shift=2.0))
            start += size
        for field, whole in together.items():
            assert torch.equal(torch.cat([part[field] for part in parts]), whole)
    order = [11, 0, 7]
    shuffled = drawn([seeds[i] for i in order], shift=2.0)
    assert all(torch.equal(shuffled[field], whole[order]) for field, whole in together.items())


@pytest.mark.parametrize("shape", [(1, 3), (4, 6), (16, 64)])
def test_the_noise_is_what_a_generator_of_the_seed_draws_first(shape: tuple[int, int]):
    _, made = draw([3, 2**63 + 5], shape, 12.0)
    for seed, noise in zip([3, 2**63 + 5], made, strict=True):
        assert torch.equal(noise, torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def test_draws_differ_by_seed_and_leave_the_global_state_alone():
    state = torch.random.get_rng_state()
    t, noise = draw(range(1000), (2, 3), 1.0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(noise[:, 0, 0].unique()) == 1000 and len(t.unique()) > 990


def test_all_bits_of_a_seed_decide_the_noise_level():
    t, _ = draw([1 << bit for bit in range(64)], (1, 1), 1.0)
    assert len(t.unique()) == 64


def test_the_shift_changes_the_noise_level_alone():
    plain, changed = draw([1, 2, 3], (2, 2), 1.0), draw([1, 2, 3], (2, 2), 12.0)
    assert torch.equal(plain[1], changed[1])
    torch.testing.assert_close(changed[0], shift_noise_level(plain[0], 12.0))


@pytest.mark.parametrize("hashed", [False, True])
def test_noise_levels_are_uniform_before_the_shift_and_noise_is_normal(hashed: bool):
    seeds = [sample_seed(7, "main", 0, str(i)) if hashed else i for i in range(4000)]
    t, noise = draw(seeds, (2, 4), shift=12.0)
    dropped = uniforms(seeds)[:, DROPPED] < 0.1
    unshifted = shift_noise_level(t.double(), 1 / 12)
    assert kstest(unshifted.numpy(), "uniform").pvalue > 0.01
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    assert dropped.double().mean().item() == pytest.approx(0.1, abs=0.02)
    for other in (dropped.numpy(), noise[:, 0, 0].numpy()):
        assert abs(np.corrcoef(unshifted.numpy(), other)[0, 1]) < 0.05


def test_noise_levels_are_below_one_and_can_be_zero():
    t, _ = draw(range(100_000), (1, 1), 1.0)
    assert 0 <= t.min() < 1e-4 and 1 - 1e-4 < t.max() < 1
