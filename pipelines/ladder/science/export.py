"""OUT -> a folder of small files: plan, results, table, and weights in half precision.

A larger safetensors file is split by its tensors into NAME-00001-of-00003.safetensors, with the index that
transformers and diffusers read. A row's checkpoint that had to be split lacks its `complete.json`: its parts
are to be joined before anything here reads it.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.ladder.plans.repfusion import REPFUSION
from pipelines.ladder.science.bench import FOLDERS
from pipelines.ladder.science.plan import FILE as PLAN
from pipelines.ladder.science.results import FILE as RESULTS
from repfusion.foundation.__main__ import RECORD
from repfusion.runs.folder import COMPLETE

MOST_BYTES = 15_500_000
"""Largest file: an upload often takes less than 16 MB."""


def export(
    out: Path, to: Path, rows: Sequence[str], seeds: Sequence[int] | None, most_bytes: int = MOST_BYTES
) -> Path:
    """Copies what there is; returns the folder.

    Raises:
        ValueError: a file that is too large and cannot be split.
    """
    for name in (PLAN, RESULTS, "table.md", *(path.name for path in out.glob("*.svg"))):
        if (out / name).is_file():
            copy_file(out / name, to / name, most_bytes)
    if (out / "foundation" / RECORD).is_file():
        copy_file(out / "foundation" / RECORD, to / "foundation" / RECORD, most_bytes)
    folders = [Path("foundation") / name for name in FOLDERS]
    folders += [Path("rows") / f"{row}-{seed}" for row, seed in REPFUSION.in_order(rows, seeds)]
    for folder in folders:
        if (out / folder).is_dir():
            copy_folder(out / folder, to / folder, most_bytes)
    return to


def copy_folder(source: Path, target: Path, most_bytes: int) -> None:
    """All files of a folder, the large ones in parts; what was there before goes."""
    shutil.rmtree(target, ignore_errors=True)
    paths = sorted(path for path in source.iterdir() if path.is_file())
    is_split = any(path.stat().st_size > most_bytes for path in paths)
    for path in paths:
        if not (is_split and path.name == COMPLETE):
            copy_file(path, target / path.name, most_bytes)


def copy_file(source: Path, target: Path, most_bytes: int) -> None:
    """One file, or the parts of a larger safetensors file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_size <= most_bytes:
        shutil.copyfile(source, target)
    elif source.suffix == ".safetensors":
        split(source, target.parent, most_bytes)
    else:
        raise ValueError(f"{source}: {source.stat().st_size} bytes; only safetensors files can be split")


def split(source: Path, folder: Path, most_bytes: int) -> None:
    """Writes the tensors of a file into parts, in their order, and the index of who lies where.

    Raises:
        ValueError: a single tensor is too large.
    """
    parts: list[dict[str, Tensor]] = [{}]
    # a header takes about 150 bytes a tensor
    size, whole = 0, 0
    for name, tensor in load_file(str(source)).items():
        num_bytes = tensor.numel() * tensor.element_size() + 150 + len(name)
        if num_bytes > most_bytes:
            raise ValueError(f"{source}: tensor {name} alone takes {num_bytes} bytes, at most {most_bytes}")
        if size + num_bytes > most_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size, whole = size + num_bytes, whole + tensor.numel() * tensor.element_size()
    names = [f"{source.stem}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for name, tensors in zip(names, parts, strict=True):
        save_file(tensors, str(folder / name), {"format": "pt"})
    where = {key: name for name, tensors in zip(names, parts, strict=True) for key in tensors}
    index = {"metadata": {"total_size": whole}, "weight_map": where}
    (folder / f"{source.name}.index.json").write_text(json.dumps(index, indent=2) + "\n")
