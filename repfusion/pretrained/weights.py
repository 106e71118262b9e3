"""The weights of a folder -> a model whose every weight comes from there, or a ValueError that names what
does not fit; or the model without memory, by the headers of the weights alone.

Nothing is unpickled.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from repfusion.pretrained.config import CONVERT_LLAVA, OWN_FILES_ALONE, read_json, said_of

M = TypeVar("M", bound=nn.Module)
SHOWN = 4
"""Names that a message gives of those that do not fit."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
"""Weights that are not read: unpickling them can run any code."""


def weight_files(folder: Path, what: str, stem: str = "model") -> list[Path]:
    """The safetensors files that hold a folder's weights: STEM.safetensors, or those that its index names.

    Raises:
        ValueError: there are none, or one that the index names is gone.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        found = (
            f"; {', '.join(pickles[:SHOWN])} {'is' if len(pickles) == 1 else 'are'} not read, as unpickling "
            "can run any code: where you trust the folder, load it with transformers (use_safetensors=False) "
            "and save_pretrained again, which writes safetensors"
            if pickles
            else "; expected a folder written by save_pretrained"
        )
        raise ValueError(f"{what} folder {folder}: no {single.name} and no {index.name}{found}")
    named = read_json(index, what).get("weight_map")
    names = sorted(set(named.values())) if isinstance(named, dict) else []
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{what} folder {folder}: {index.name} names no files of the folder; copy it again")
    if gone := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(
            f"{what} folder {folder}: {', '.join(gone[:SHOWN])} of {len(names)} files that {index.name} "
            f"names {'is' if len(gone) == 1 else 'are'} gone; copy the folder again"
        )
    return [folder / name for name in names]


def read_headers(files: Collection[Path], what: str) -> dict[str, Tensor]:
    """The tensors of safetensors files by name, without memory (on torch's meta device): headers alone are
    read.

    Raises:
        ValueError: a file is damaged.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stream:
                for name in stream.keys():
                    part = stream.get_slice(name)
                    found[name] = torch.empty(part.get_shape(), device="meta")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{what} folder {file.parent}: {file.name} is not readable ({error}); copy it again"
            ) from error
    return found


def refuse_misfits(
    place: str,
    missing: Collection[str],
    unexpected: Collection[str],
    misshapen: Collection[tuple[str, Collection[int], Collection[int]]] = (),
    writer: str = "save_pretrained",
) -> None:
    """Raises ValueError where weights are missing, left over, or of another shape (name, got, expected).

    Args:
        place: whose weights they are, such as `encoder folder F`.
        missing, unexpected, misshapen: what does not fit.
        writer: what writes a folder that does.
    """
    shapes = [f"{name} {tuple(got)}, expected {tuple(wanted)}" for name, got, wanted in sorted(misshapen)]
    kinds = {"missing": sorted(missing), "unexpected": sorted(unexpected), "of another shape": shapes}
    wrong = [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if not wrong:
        return
    remedy = (
        f"expected the names and shapes that {writer} writes: load it where it does load, and save it again"
    )
    if any("mm_projector" in name for name in unexpected):
        remedy = CONVERT_LLAVA
    raise ValueError(f"{place}: weights do not fit config.json, {'; '.join(wrong)}; {remedy}")


def _some(names: list[str]) -> str:
    total = f" ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + total


def refuse_not_finite(model: nn.Module, place: str) -> None:
    """Raises ValueError, naming the first, where a weight holds NaN or infinity: one pass over all of
    them.
    """
    for name, weight in model.named_parameters():
        if (
            weight.is_floating_point()
            and weight.numel()
            and not torch.stack(weight.aminmax()).isfinite().all()
        ):
            raise ValueError(f"{place}: {name} holds values that are not finite; copy the folder again")


def load_own(make: Callable[[], M], folder: Path, what: str, writer: str, on_meta: bool = False) -> M:
    """A module of ours, every weight of it from the folder; in float32, frozen and in eval mode.

    Args:
        make: builds it, of the sizes that config.json says.
        folder: written by `writer`.
        what: how messages call it.
        writer: what writes such a folder.
        on_meta: shapes without memory: the weights' headers alone are read.

    Raises:
        ValueError: the folder has no safetensors, or weights are missing, left over, of another shape or not
            finite.
    """
    place, files = f"{what} folder {folder}", weight_files(folder, what)
    headers = read_headers(files, what)
    with torch.device("meta"):
        module = make()
    own = module.state_dict()
    misshapen = [
        (name, headers[name].shape, own[name].shape)
        for name in own.keys() & headers.keys()
        if headers[name].shape != own[name].shape
    ]
    missing, left_over = own.keys() - headers.keys(), headers.keys() - own.keys()
    refuse_misfits(place, missing, left_over, misshapen, writer)
    if not on_meta:
        module = make()
        for file in files:
            module.load_state_dict(load_file(str(file)), strict=False)
        refuse_not_finite(module, place)
    return module.float().eval().requires_grad_(False)


def load_transformers(
    model_class: Any,
    folder: Path,
    what: str,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    beside: str | None = None,
    on_meta: bool = False,
    unused: str | None = None,
) -> Any:
    """A model of transformers, every weight of it from the folder, in eval mode.

    Args:
        model_class: transformers' own class.
        folder: written by save_pretrained; its config.json was read by `read_config`.
        what: how messages call it.
        dtype: precision in which the weights are held; `auto` is that of the folder.
        beside: pattern of the names that may lie beside the model's, such as a CLIP's text tower.
        on_meta: shapes without memory: the weights' headers alone are read.
        unused: pattern of the names that the folder may lack, of a part that the caller takes away.

    Raises:
        ValueError: weights are missing, left over, of another shape or not finite, or not in safetensors.
    """
    place, headers = f"{what} folder {folder}", read_headers(weight_files(folder, what), what)
    with said_of(place, f"as a {model_class.__name__}"):
        config = model_class.config_class.from_pretrained(folder, **OWN_FILES_ALONE)
        model, report = _onto_meta(model_class, config, headers, dtype)
    _refuse_report(place, report, beside, unused)
    if on_meta:
        return model
    with said_of(place, f"as a {model_class.__name__}"), quiet():
        model, report = model_class.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **OWN_FILES_ALONE
        )
    _refuse_report(place, report, beside, unused)
    refuse_not_finite(model, place)
    return model


def _refuse_report(place: str, report: Mapping[str, Any], beside: str | None, unused: str | None) -> None:
    def all_but(names: Collection[str], pattern: str | None) -> list[str]:
        return [name for name in names if pattern is None or re.match(pattern, name) is None]

    missing, left_over = (
        all_but(report["missing_keys"], unused),
        all_but(report["unexpected_keys"], beside),
    )
    refuse_misfits(place, missing, left_over, report["mismatched_keys"])


def _onto_meta(
    model_class: Any, config: Any, headers: Mapping[str, Tensor], dtype: torch.dtype | Literal["auto"]
) -> tuple[Any, dict[str, Any]]:
    """What from_pretrained does with a checkpoint, names of older versions and tied weights included, with
    tensors that have no memory: the model and the report.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    with quiet(), torch.device("meta"):
        model = model_class(config)
        if dtype != "auto":
            model = model.to(dtype)
        mapping = get_model_conversion_mapping(model)
        reading = LoadStateDictConfig(device_map={"": "meta"}, dtype=model.dtype, weight_mapping=mapping)
        report, _ = convert_and_load_state_dict_in_model(model, dict(headers), reading)
        model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(report)
    return model.eval(), report.to_dict()


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' own reports and bars from the terminal: what is wrong is raised."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
