"""Bytes of a rank by formula against what a real Engine holds, on one rank and on two."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from programs import torchrun

from repfusion.flops.memory import Frozen, column_bytes, rank_memory, sizes
from repfusion.model.meta import meta_from_config
from repfusion.training.engine import EngineConfig

HOLDER = Path(__file__).parents[2] / "support" / "held_bytes.py"
NUM_TRAINED, NUM_FROZEN = 21 * (64 * 64 + 64), 300 * 64


def held(world_size: int, changes: dict) -> list[int]:
    """Most bytes of tensors that `held_bytes.py` found at a moment of a training, on each rank."""
    said = torchrun(world_size, HOLDER, json.dumps(changes))
    found = [int(one) for one in re.findall(r"held (\d+)", said)]
    assert len(found) == world_size
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"zero_stage": 0}),
        (2, {"zero_stage": 1}),
        (2, {"zero_stage": 2}),
        (2, {"zero_stage": 3}),
        (2, {"zero_stage": 3, "frozen": "sharded"}),
    ],
    ids=str,
)
def test_a_rank_holds_what_the_formula_says(world_size, changes):
    config = EngineConfig(precision="fp32", **changes)
    said = rank_memory(NUM_TRAINED, Frozen(NUM_FROZEN, 4), config, world_size, on_gpu=False)
    assert held(world_size, changes) == pytest.approx([said.device] * world_size, rel=0.01)


def test_the_bytes_of_a_stage_by_hand():
    trained, frozen, gb = 2 * 10**9, Frozen(7 * 10**9, 2), 1e9
    found = [rank_memory(trained, frozen, EngineConfig(zero_stage=stage), 8) for stage in range(4)]
    bucket = 4 * 100_000_000 / gb
    assert [one.device / gb for one in found] == pytest.approx(
        [
            14 + 8 + 8 + 16 + 8,
            14 + 8 + 8 + (8 + 16 + 8) / 8 + 2 * bucket,
            14 + 8 + (8 + 8 + 16 + 8) / 8 + 2 * bucket,
            14 + 4 + (8 + 8 + 8 + 16 + 8) / 8 + bucket,
        ]
    )
    sharded = rank_memory(trained, frozen, EngineConfig(zero_stage=3, frozen="sharded"), 8)
    assert sharded.frozen == 14 * gb / 8
    assert sharded.gathered == pytest.approx((8 + 14) * gb / 9)
    offloaded = rank_memory(trained, frozen, EngineConfig(offload_optimizer=True), 8)
    assert offloaded.offloaded == pytest.approx((8 + 8 + 16 + 8) / 8 * gb)
    assert offloaded.device + offloaded.offloaded == pytest.approx(found[2].device)


def test_one_rank_runs_stage_2_as_0():
    one = [rank_memory(1000, Frozen(0, 4), EngineConfig(zero_stage=stage), 1) for stage in (0, 2)]
    assert one[0] == one[1] and one[0].buckets == 0


@pytest.mark.parametrize("method", ["noisy_latents", "transfusion"])
def test_frozen_weights_are_bfloat16_on_a_gpu(make_generator, method):
    generator = make_generator(method)
    num = sum(size.num_parameters - size.num_trainable for size in sizes(generator).values())
    assert (num == 0) == (method == "transfusion")
    assert Frozen.of(generator, EngineConfig()) == Frozen(num, 2)
    assert Frozen.of(generator, EngineConfig(precision="fp32")) == Frozen(num, 4)
    assert Frozen.of(generator, EngineConfig(), on_gpu=False) == Frozen(num, 4)
    if num:
        half = meta_from_config(generator.config.model_copy(update={"mllm_dtype": "bfloat16"}))
        assert Frozen.of(half, EngineConfig(precision="fp32")) == Frozen(num, 2)


def test_bytes_of_a_sample_are_those_of_its_columns(make_generator, columns):
    with tarfile.open(min((columns / "image_features").glob("*.tar"))) as archive:
        member = next(one for one in archive if one.name.endswith("image_features.npy"))
        file = archive.extractfile(member)
        assert file is not None
        stored = np.load(io.BytesIO(file.read()))
    assert column_bytes(make_generator(), 9) == {"latents": stored.nbytes}
    generator = make_generator("text_embed")
    assert column_bytes(generator, 9)["text features"] == 9 * 2 * generator.conditioner.llm.width
