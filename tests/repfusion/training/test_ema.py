"""The moving average: its formula, its ramp, its precision."""

import pytest
import torch

from repfusion.training.ema import EMA


def test_the_average_follows_its_formula():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3, 4))
    ema = EMA([weight], decay=0.9, ramp=False)
    expected = weight.detach().double().clone()
    for step in range(20):
        with torch.no_grad():
            weight.add_(torch.randn(3, 4))
        ema.update(step)
        expected = 0.9 * expected + 0.1 * weight.detach().double()
    torch.testing.assert_close(ema.averages[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_ramp_starts_low_and_ends_at_the_decay():
    ema = EMA([torch.zeros(1)], decay=0.95)
    assert ema.decay_at(0) == pytest.approx(0.1)
    assert ema.decay_at(8) == pytest.approx(0.5)
    assert ema.decay_at(10_000) == 0.95


def test_the_average_is_float32_whatever_the_weights_are():
    weight = torch.zeros(4, dtype=torch.bfloat16)
    ema = EMA([weight], decay=0.999, ramp=False)
    weight.fill_(1.0)
    for step in range(10):
        ema.update(step)
    # in bfloat16 an increment of 0.001 would soon be rounded away
    assert ema.averages[0].dtype == torch.float32
    torch.testing.assert_close(ema.averages[0], torch.full((4,), 1 - 0.999**10))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(decay: float):
    with pytest.raises(ValueError, match="ema_decay"):
        EMA([], decay)
