"""Rectified flow: t is the noise level, the shift moves it to noise, a draw belongs to a sample."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from repfusion.flow import FlowConfig, draw, interpolate, shift_factor, shift_noise_level, velocity


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


def test_a_draw_does_not_depend_on_the_batch_it_is_made_in():
    together = draw(3, list(range(40, 52)), (4, 6), shift=2.0, dropout=0.3)
    for split in ([4, 4, 4], [1] * 12, [7, 5]):
        start = 40
        parts = []
        for size in split:
            parts.append(draw(3, list(range(start, start + size)), (4, 6), shift=2.0, dropout=0.3))
            start += size
        for field in ("t", "noise", "dropped"):
            assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(together, field))
    order = [51, 40, 47]
    shuffled = draw(3, order, (4, 6), shift=2.0, dropout=0.3)
    assert torch.equal(shuffled.noise, together.noise[[position - 40 for position in order]])
    assert torch.equal(shuffled.t, together.t[[position - 40 for position in order]])


def test_draws_differ_by_position_and_seed_and_leave_the_global_state_alone():
    state = torch.random.get_rng_state()
    one, other = draw(0, list(range(500)), (2, 3), 1.0), draw(1, list(range(500)), (2, 3), 1.0)
    assert torch.equal(torch.random.get_rng_state(), state)
    firsts = torch.cat([one.noise, other.noise])[:, 0, 0]
    assert len(firsts.unique()) == 1000


def test_dropout_and_shift_do_not_change_the_noise():
    plain, changed = draw(5, [1, 2, 3], (2, 2), 1.0, 0.0), draw(5, [1, 2, 3], (2, 2), 12.0, 1.0)
    assert torch.equal(plain.noise, changed.noise)
    torch.testing.assert_close(changed.t, shift_noise_level(plain.t, 12.0))
    assert not plain.dropped.any() and changed.dropped.all()


def test_noise_levels_are_uniform_before_the_shift_and_noise_is_normal():
    made = draw(7, list(range(4000)), (2, 4), shift=12.0, dropout=0.1)
    unshifted = shift_noise_level(made.t.double(), 1 / 12)
    assert kstest(unshifted.numpy(), "uniform").pvalue > 0.01
    assert kstest(made.noise.flatten().numpy(), "norm").pvalue > 0.01
    assert made.dropped.double().mean().item() == pytest.approx(0.1, abs=0.02)
    assert abs(np.corrcoef(made.t.numpy(), made.dropped.numpy())[0, 1]) < 0.05
