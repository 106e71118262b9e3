"""A decoder's folder <-> the decoder: config.json and model.safetensors, which hold all of it."""

from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from repfusion.config import Config
from repfusion.pretrained.config import read_config, validated_config
from repfusion.pretrained.weights import load_own

M = TypeVar("M", bound=nn.Module)


def save_decoder(decoder: nn.Module, config: Config, folder: str | Path, dtype: torch.dtype) -> None:
    """Writes a folder; weights in this precision."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "config.json").write_text(config.model_dump_json(indent=2) + "\n")
    weights = {name: one.to(dtype).contiguous() for name, one in decoder.state_dict().items()}
    save_file(weights, str(Path(folder) / "model.safetensors"))


def read_decoder(make: type[M], config: type[Config], folder: str | Path, on_meta: bool) -> M:
    """The decoder of a folder, strictly, in float32, frozen and in eval mode.

    Args:
        make: the decoder's class.
        config: the class of its configuration.
        folder: as `save_decoder` writes it.
        on_meta: shapes without memory: of the weights the headers alone are read.

    Raises:
        ValueError: the folder lacks a file, or weights are missing, left over, of another shape or not
            finite.
    """
    folder, writer = Path(folder), f"{make.__name__}.save_pretrained"
    place, fields = f"decoder folder {folder}", read_config(folder, "decoder", writer)
    values = validated_config(config, fields, place, f"{writer}, or a VAE's")
    return load_own(lambda: make(values), folder, "decoder", writer, on_meta)
