"""Folders of models that judge: how a configuration names one, what version it is, its image processor."""

from functools import cache
from pathlib import Path
from typing import Annotated, Any

from repfusion.config import Weights
from repfusion.files import weights_digest
from repfusion.pretrained.config import processor_fields, read_config, said_of

JudgeFolder = Annotated[Path, Weights(to_train=False, to_sample=False)]
"""A folder written by save_pretrained, or a URL of one; neither training nor sampling needs it."""
DIGITS = 12
"""Characters of a digest that a version names."""


@cache
def version_of(folder: Path) -> str:
    """The start of the digest of a folder's weights, which are read once a process.

    Raises:
        ValueError: the folder holds no safetensors.
    """
    return weights_digest(folder)[:DIGITS]


def model_type_of(folder: Path, what: str) -> str:
    """transformers' `model_type` of a folder. Raises ValueError where it has no config.json."""
    return str(read_config(folder, what).get("model_type"))


def processor_of(processor_class: Any, folder: Path, what: str) -> Any:
    """An image processor of transformers with what a folder says of it.

    Raises:
        ValueError: the folder says nothing of an image processor, or what no such processor takes.
    """
    fields, name = processor_fields(folder, what)
    if not fields:
        raise ValueError(
            f"{what} folder {folder}: no {name}; copy it from where the model is from, or save_pretrained "
            "its processor there"
        )
    with said_of(f"{what} folder {folder}", f"by its {name}"):
        return processor_class.from_dict(fields)
