"""Each number of a configuration has bounds in its class, or a reason why they stand elsewhere."""

import importlib
import pkgutil
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import ValidationError

import cluster
import pipelines
import repfusion
from repfusion.config import Config
from repfusion.data.config import DatasetConfig
from repfusion.latents.load import EncoderConfig
from repfusion.model.dit import DiTConfig
from repfusion.training.engine import EngineConfig

LAYERS = "counts the language model's layers: checked against them where it is built"
ELSEWHERE = {
    "ChannelConcatConfig.taps": LAYERS,
    "PerBlockConfig.taps": LAYERS,
    "OneLayerConfig.layer": LAYERS,
    "LapSettings.taps": LAYERS,
    "LiDitConfig.layer": LAYERS,
    "EvaluationConfig.dropped_taps": LAYERS,
    "EncoderConfig.layer": "counts the tower's layers, from the end where negative: checked where it is read",
    "DatasetConfig.caption_weights": "a validator: 0 or more, one above",
    "DatasetConfig.weight": "a validator: a share of all weights",
    "TrainingConfig.num_workers": "a validator: 1 <= least <= most, each dividing the batch",
    "SamplerConfig.guidance_interval": "a validator: 0 <= low <= high <= 1",
    "WorldConfig.sizes": "a validator: between 0 and the gap",
    "EditsConfig.kinds": "a validator: weights of 0 or more, one above",
    "SciencePlan.rates": "measured, not given",
}
"""Fields whose bounds are not in their types, and where they are."""
BOUNDS = ("ge", "gt", "le", "lt")


def is_bounded(marks: Any) -> bool:
    """Whether a bound is among the marks of a type, as pydantic keeps them."""
    return any(
        getattr(one, name, None) is not None or is_bounded(getattr(one, "metadata", ()))
        for one in marks
        for name in BOUNDS
    )


def is_free(annotation: Any, marks: tuple[Any, ...] = ()) -> bool:
    """Whether a type holds a number without bounds, at any depth of it."""
    kind = get_origin(annotation)
    if annotation in (int, float):
        return not is_bounded(marks)
    if kind is Annotated:
        inner, *own = get_args(annotation)
        return is_free(inner, (*marks, *own))
    if kind in (Union, UnionType):
        return any(is_free(one, marks) for one in get_args(annotation))
    return kind is not Literal and any(map(is_free, get_args(annotation)))


def configs() -> Iterator[type[Config]]:
    """All configuration classes of the three packages."""
    for package in (repfusion, pipelines, cluster):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    below = [Config]
    while below:
        found = below.pop().__subclasses__()
        below += found
        yield from (
            one for one in found if one.__module__.split(".")[0] in ("repfusion", "pipelines", "cluster")
        )


def test_each_number_has_bounds_or_a_reason():
    fields = {
        f"{kind.__name__}.{name}": info
        for kind in configs()
        for name, info in kind.model_fields.items()
        if name in kind.__annotations__
    }
    assert len(fields) > 250
    free = {name for name, info in fields.items() if is_free(info.annotation, tuple(info.metadata))}
    assert free == ELSEWHERE.keys()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (EngineConfig, {"lr": 0}),
        (EngineConfig, {"lr": float("nan")}),
        (EngineConfig, {"lr": float("inf")}),
        (EngineConfig, {"betas": (0.9, 1.0)}),
        (EngineConfig, {"weight_decay": -0.1}),
        (EngineConfig, {"grad_clip": 0}),
        (EngineConfig, {"warmup_steps": -1}),
        (EngineConfig, {"micro_batch_size": 0}),
        (DiTConfig, {"depth": 0}),
        (EncoderConfig, {"image_size": 0}),
        (DatasetConfig, {"images": "x", "caption_weights": {"txt": -1}}),
    ],
)
def test_what_no_training_could_mean_is_refused(kind, fields):
    with pytest.raises(ValidationError):
        kind(**fields)
