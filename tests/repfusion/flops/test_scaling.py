"""Step times by hand, and the formulas against what one H200 measured (docs/log.md, 2026-11-26)."""

import pytest

from repfusion.flops import train_flops
from repfusion.flops.activations import activation_bytes
from repfusion.flops.memory import Frozen, rank_memory, sizes
from repfusion.flops.scaling import Links, StepTime, step_time
from repfusion.model.meta import published
from repfusion.training.engine import EngineConfig

PEAK, GIB = 989e12, 2**30


def test_a_step_by_hand():
    links = Links(within_node=100.0, between_nodes=10.0, reached=0.5, gpus_per_node=2)
    given = {"flops_per_sample": 8.0, "samples_per_rank": 5, "flops_per_sec": 4.0, "num_trained": 25.0}
    assert step_time(**given, num_gpus=1, links=links) == StepTime(10.0, 0.0, 0.0)
    # 100 bytes, of which half to a neighbour at 50 a second; three quarters at 5 a second
    assert step_time(**given, num_gpus=2, links=links) == StepTime(10.0, 1.0, 1.0)
    assert step_time(**given, num_gpus=4, links=links) == StepTime(10.0, 15.0, 15.0)
    assert step_time(**given, num_gpus=4, links=links).total == 30.0
    assert step_time(**given, num_gpus=2, links=links).efficiency == pytest.approx(10 / 11)
    assert step_time(**given, num_gpus=2, zero_stage=0, links=links) == StepTime(10.0, 2.0, 0.0)
    for stage, hidden in ((1, 1.0), (2, 3.0)):
        passes = step_time(**given, num_gpus=2, zero_stage=stage, micro_batches=3, links=links)
        assert passes == StepTime(10.0, hidden, 1.0)
    three = step_time(**given, num_gpus=2, zero_stage=3, micro_batches=2, links=links)
    assert three == StepTime(10.0, 6.0, 0.0)


@pytest.fixture(scope="module")
def model():
    return published()[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("micro_batch", "seconds", "mfu"), [(16, 0.909, 0.372), (32, 1.244, 0.545), (64, 4.70, 0.288)]
)
def test_the_measured_rates_follow_from_the_counted_flops(model, micro_batch, seconds, mfu):
    flops = micro_batch * train_flops(model, 0.9 * 32 + 0.1)
    assert flops / seconds / PEAK == pytest.approx(mfu, rel=0.02)


@pytest.mark.slow
def test_the_measured_memory_lies_where_it_is_counted(model):
    """107 GiB at 16 samples eager, 131 at 32 compiled, 60 at 64 with all activations computed again."""
    held = Frozen.of(model, EngineConfig())
    trained = sum(size.num_trainable for size in sizes(model).values())
    state = rank_memory(trained, held, EngineConfig(), world_size=1).device
    counted = activation_bytes(model, 32)
    assert (state + 16 * counted.eager) / GIB == pytest.approx(107, rel=0.1)
    compiled = (131 * GIB - state) / 32
    assert counted.products < compiled < counted.eager
    assert counted.layer_inputs < (60 * GIB - state) / 64 < counted.products
