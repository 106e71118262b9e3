"""Prompt files of published suites: JSON lines, JSON and CSV, each row checked against what its version of
the file holds.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from repfusion.config import Strict, validate

T = TypeVar("T", bound=Strict)


def read_text(path: Path) -> str:
    """The text of a prompt file. Raises ValueError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt file {path}: {error}") from error


def read_json_lines(path: Path, kind: type[T]) -> list[T]:
    """The rows of a file of JSON lines; empty lines are passed over.

    Raises:
        ValueError: a line is no JSON, lacks a field or has one of another version, with its number.
    """
    numbered = [(number, line) for number, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    rows = []
    for number, line in numbered:
        rows.append(row_of(kind, _json(line, f"{path}:{number}"), f"{path}:{number}"))
    return _some(rows, path)


def read_json_value(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError where it is none."""
    return _json(read_text(path), str(path))


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: no JSON ({error}); copy the suite's file again") from error


def row_of(kind: type[T], values: Any, place: str) -> T:
    """A row as its class. Raises ValueError that names each field that is missing, unknown or of another
    type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{place}: holds a {type(values).__name__}, expected fields")
    try:
        return validate(kind, dict(values), place)
    except ValueError as error:
        fields = ", ".join(kind.model_fields)
        raise ValueError(
            f"{error}\n{place}: not the version of the file that this suite reads, whose fields are {fields}"
        ) from error


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and named columns of each row.

    Raises:
        ValueError: the file lacks a column, holds no row, or a row is cut short.
    """
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""))
    present = [name.strip() for name in rows.fieldnames or ()]
    if missing := [name for name in columns if name not in present]:
        raise ValueError(
            f"prompt file {path}: lacks the columns {', '.join(missing)}; it has {', '.join(present)}: "
            "another version of the file, or another file"
        )
    rows.fieldnames = present
    number = 0
    for number, row in enumerate(rows, 1):
        if empty := [name for name in columns if row[name] is None]:
            raise ValueError(f"prompt file {path}: data row {number} is cut short before {empty[0]}")
        yield f"{path}: data row {number}", {name: row[name] for name in columns}
    if not number:
        raise ValueError(f"prompt file {path}: holds no row")


def _some(rows: list[T], path: Path) -> list[T]:
    if not rows:
        raise ValueError(f"prompt file {path}: holds no row")
    return rows


def check_number(path: Path | str, found: int, expected: Sequence[int], what: str = "prompts") -> None:
    """Raises ValueError where an official score would be of another number of prompts than papers report."""
    if found not in expected:
        wanted = " or ".join(map(str, expected))
        raise ValueError(
            f"prompt file {path}: {found} {what}, the official file has {wanted}: another version, or a "
            "part; take the whole file, or leave out `official`"
        )
