"""Nested inputs: tensors are changed wherever they lie, everything else stays."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from repfusion.inputs import empty, map_tensors, pin, to_device
from repfusion.llm.base import Prefix


@dataclass(frozen=True)
class Held:
    tensor: torch.Tensor
    name: str
    parts: tuple[Any, ...] = ()


def nested() -> dict[str, Any]:
    one = torch.ones(2)
    return {
        "tensor": one,
        "list": [one + 1, "text", 3],
        "tuple": (one + 2, None),
        "dict": {"inner": {"deep": one + 3}},
        "dataclass": Held(one + 4, "held", (one + 5, Held(one + 6, "inner"))),
        "class": Held,
        "float": 0.5,
    }


def test_every_tensor_is_changed_and_containers_keep_their_kind():
    found = map_tensors(nested(), lambda tensor: 10 * tensor)
    assert found["tensor"].tolist() == [10, 10]
    assert found["list"][0].tolist() == [20, 20] and found["list"][1:] == ["text", 3]
    assert isinstance(found["tuple"], tuple) and found["tuple"][0].tolist() == [30, 30]
    assert found["dict"]["inner"]["deep"].tolist() == [40, 40]
    held = found["dataclass"]
    assert isinstance(held, Held) and held.tensor.tolist() == [50, 50] and held.name == "held"
    assert held.parts[0].tolist() == [60, 60] and held.parts[1].tensor.tolist() == [70, 70]
    assert found["class"] is Held and found["float"] == 0.5 and found["tuple"][1] is None


def test_what_was_given_stays_as_it_was():
    given = nested()
    map_tensors(given, lambda tensor: 10 * tensor)
    assert given["dataclass"].parts[1].tensor.tolist() == [7, 7] and given["tensor"].tolist() == [1, 1]


def test_everything_moves_to_the_device():
    moved, seen = to_device(nested(), torch.device("meta")), []
    map_tensors(moved, lambda tensor: seen.append(tensor.device.type) or tensor)
    assert seen == ["meta"] * 7


def test_a_prefix_moves_as_a_whole():
    """Its cache, where there is none, stays so."""
    prefix = Prefix(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool))
    moved = to_device({"prefix": prefix}, torch.device("meta"))["prefix"]
    assert isinstance(moved, Prefix) and moved.kept is None
    assert (moved.ids.device.type, moved.mask.device.type) == ("meta", "meta")


def test_without_a_gpu_nothing_is_copied():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    inputs = nested()
    assert pin(inputs) is inputs and empty(2, 3, dtype=torch.float16).dtype == torch.float16


@pytest.mark.gpu
def test_with_a_gpu_everything_lies_in_page_locked_memory():
    pinned, seen = pin(nested()), []
    map_tensors(pinned, lambda tensor: seen.append(tensor.is_pinned()) or tensor)
    assert seen == [True] * 7 and empty(2, 3).is_pinned()
