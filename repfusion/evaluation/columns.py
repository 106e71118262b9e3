"""Outputs, answers and scores of a suite on disk: each file beside the identity of what decided it. Outputs
and answers lie in parts (parts.py).

evaluations/step_00000500/scenes/  items.jsonl
                                   outputs/00000.npy    00000.identity.json
                                   answers/00000.jsonl  00000.identity.json
                                   scores.json          scores.identity.json
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import UInt8

from repfusion.evaluation.suites.base import Answer, Image, Item, Scores
from repfusion.files import (
    atomic_path,
    bytes_sha256,
    digest_of,
    file_sha256,
    json_bytes,
    write_json,
    write_text,
)

T = TypeVar("T")
OUTPUTS, ANSWERS = "outputs", "answers"
ITEMS = "items.jsonl"


@dataclass(frozen=True)
class ColumnFile(Generic[T]):
    """A file that is made again only when what decides it changes."""

    path: Path
    write: Callable[[Path, T], None]
    """Writes a value to a temporary path."""
    read: Callable[[Path], T]

    @property
    def identity_path(self) -> Path:
        return self.path.with_suffix(".identity.json")

    def digest(self) -> str:
        """sha256 of the file that `get` found whole or wrote, by what lies beside it."""
        return json.loads(self.identity_path.read_text())["sha256"]

    def get(self, identity: Mapping[str, Any], make: Callable[[], T]) -> T:
        """The value that this identity decides: read where it lies whole on disk, otherwise made and written,
        its identity last.
        """
        if self._holds(identity):
            return self.read(self.path)
        value = make()
        with atomic_path(self.path) as temporary:
            self.write(temporary, value)
        digest = file_sha256(self.path)
        write_json(self.identity_path, {"identity": dict(identity), "sha256": digest})
        return value

    def _holds(self, identity: Mapping[str, Any]) -> bool:
        try:
            known = json.loads(self.identity_path.read_text())
        except (FileNotFoundError, ValueError):
            return False
        # a file written since, by one that was killed before it wrote the identity, has another digest
        if not self.path.is_file() or not isinstance(known, dict) or known.get("identity") != dict(identity):
            return False
        return known == {"identity": dict(identity), "sha256": file_sha256(self.path)}


def outputs_column(folder: Path, part: int) -> ColumnFile[UInt8[np.ndarray, "n h w 3"]]:
    """Images of a part, item by item, an item's outputs beside each other."""

    def write(path: Path, images: np.ndarray) -> None:
        with path.open("wb") as stream:
            np.save(stream, images)

    return ColumnFile(folder / OUTPUTS / f"{part:05d}.npy", write, np.load)


def answers_column(folder: Path, part: int) -> ColumnFile[list[Answer]]:
    """One line of JSON for each item of a part."""
    return ColumnFile(folder / ANSWERS / f"{part:05d}.jsonl", _write_lines, _read_lines)


def scores_column(folder: Path) -> ColumnFile[Scores]:
    def write(path: Path, scores: Scores) -> None:
        path.write_bytes(json_bytes(scores.model_dump(mode="json")))

    return ColumnFile(
        folder / "scores.json", write, lambda path: Scores.model_validate_json(path.read_text())
    )


def asked(items: Sequence[Item]) -> list[dict[str, Any]]:
    """What a model is asked for: all of the items that decides their outputs; images by their digests."""
    return [
        {"key": item.key, "prompt": item.request.prompt, "num_outputs": item.num_outputs}
        | ({"images": [_digest(image) for image in item.request.images]} if item.request.images else {})
        | ({"rewrite": item.request.rewrite} if item.request.rewrite is not None else {})
        for item in items
    ]


def _digest(image: Image) -> str:
    return digest_of([list(image.shape), bytes_sha256(image.tobytes())])


def known(items: Sequence[Item]) -> list[dict[str, Any]]:
    """What decides judge and rule: what was asked for, and what is true of it."""
    return [{**one, "truth": dict(item.truth)} for one, item in zip(asked(items), items, strict=True)]


def write_items(folder: Path, items: Sequence[Item]) -> None:
    """Writes `items.jsonl`, for whoever reads the other columns."""
    write_text(folder / ITEMS, _lines(known(items)))


def _lines(values: Sequence[Any]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values)


def _write_lines(path: Path, values: list[Any]) -> None:
    path.write_text(_lines(values))


def _read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]
