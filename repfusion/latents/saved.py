"""A decoder's folder <-> the decoder: config.json and model.safetensors, which hold all of it."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from repfusion.config import Config
from repfusion.pretrained.config import read_config
from repfusion.pretrained.weights import read_headers, refuse_misfits, refuse_not_finite, weight_files

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
    place = f"decoder folder {folder}"
    values = _validated(config, read_config(folder, "decoder", writer), place, writer)
    headers = read_headers(weight_files(folder, "decoder"), "decoder")
    with torch.device("meta"):
        decoder = make(values)
    _refuse_others(place, decoder.state_dict(), headers, writer)
    if not on_meta:
        decoder = make(values)
        for file in weight_files(folder, "decoder"):
            decoder.load_state_dict(load_file(str(file)), strict=False)
        refuse_not_finite(decoder, place)
    return decoder.float().eval().requires_grad_(False)


def _validated(config: type[Config], fields: dict[str, Any], place: str, writer: str) -> Config:
    try:
        return config.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(
            f"{place}: config.json: {problem['loc'][0] if problem['loc'] else 'the whole'}: "
            f"{problem['msg']}; expected a folder written by {writer}, or a VAE's"
        ) from error


def _refuse_others(place: str, own: dict[str, Tensor], headers: dict[str, Tensor], writer: str) -> None:
    """Raises ValueError where a folder's weights have other names or shapes than the decoder's own."""
    misshapen = [
        (name, headers[name].shape, own[name].shape)
        for name in own.keys() & headers.keys()
        if headers[name].shape != own[name].shape
    ]
    refuse_misfits(place, own.keys() - headers.keys(), headers.keys() - own.keys(), misshapen, writer)
