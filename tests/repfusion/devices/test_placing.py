"""Precisions by where work is done, devices that are not what was asked for, batches that do not fit."""

import itertools
import logging

import pytest
import torch

from repfusion.devices import placing
from repfusion.devices.placing import (
    BatchRoom,
    autocast_of,
    find_device,
    is_out_of_memory,
    precision_of,
)

CPU = torch.device("cpu")


def test_the_precision_follows_from_the_configuration_alone():
    assert [precision_of("auto", on_gpu) for on_gpu in (False, True)] == ["float32", "bfloat16"]
    assert precision_of("float32", on_gpu=True) == "float32"
    assert precision_of("float16", on_gpu=False) == "float16"


def test_auto_is_what_the_device_multiplies_in(monkeypatch):
    for has in (False, True):
        monkeypatch.setattr(placing, "multiplies_bf16", lambda _, has=has: has)
        assert autocast_of("auto", CPU) == ("bf16" if has else "fp32")
        assert [autocast_of(asked, CPU) for asked in ("fp32", "bf16")] == ["fp32", "bf16"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_worker_with_a_gpu_that_torch_does_not_see_says_what_to_compare():
    assert find_device(False, "bfloat16", "columns.a.encoder_dtype") == CPU
    with pytest.raises(ValueError, match=rf"torch {torch.__version__.partition('+')[0]}.*sees no GPU.*CUDA"):
        find_device(True, "bfloat16", "columns.a.encoder_dtype")


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error, is_memory):
    assert is_out_of_memory(error) == is_memory


@pytest.mark.parametrize(("room", "then"), [(8, 8), (5, 4), (4, 4), (3, 2), (1, 1)])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_batch_that_does_not_fit_is_done_in_halves(room, then, as_tensor, caplog):
    sizes: list[int] = []

    def work(batch):
        if len(batch) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch))
        return [int(one) for one in batch]

    fitting = BatchRoom(8, CPU, "columns.a.batch_size")
    items = torch.arange(8) if as_tensor else list(range(8))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert list(itertools.chain(*fitting(work, items))) == list(range(8))
    assert fitting.most == then == max(sizes)
    said = [record.getMessage() for record in caplog.records]
    assert (not said) == (room == 8)
    assert not said or said[-1].endswith(f"{then} are taken from now on; set columns.a.batch_size={then}")


def test_an_item_that_does_not_fit_is_an_error_and_others_pass_as_they_are():
    def none(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MemoryError, match=r"columns\.a\.batch_size: not even one item"):
        BatchRoom(4, CPU, "columns.a.batch_size")(none, [1, 2, 3, 4])

    def wrong(batch):
        raise RuntimeError("another error")

    with pytest.raises(RuntimeError, match="another error"):
        BatchRoom(4, CPU, "columns.a.batch_size")(wrong, [1, 2, 3, 4])
