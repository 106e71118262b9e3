"""Rows of a table that are in memory, whatever they were read from."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.lists.values import BadEntry, cells, is_text, json_value

if TYPE_CHECKING:
    import pyarrow as pa

ODD_TEXT = r"^\x{FEFF}|[\x00-\x08\x0B\x0C\x0E-\x1F\x7F-\x{9F}]"
"""A byte order mark or a control character: what `captions.clean` changes or refuses, as RE2 writes it."""


class BadColumn(ValueError):
    """A column that is none, as its values differ in type within their own lists or structs."""


class Block(ABC):
    """Some rows of a table."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, rows: range) -> "Block":
        """The rows at some positions."""

    @abstractmethod
    def where(self, name: str, wanted: Collection[str]) -> "Block":
        """The rows whose value of a column, text or a whole number, is one of some, given as text."""

    @abstractmethod
    def cells(self, name: str) -> list[Any]:
        """A column's values, as `values.cells` gives them."""

    def plain_text(self, name: str) -> "pa.ChunkedArray | None":
        """A column as text, never null, where `captions.one_text` would leave every cell as it is; None
        where that is not known without a look at each.
        """
        return None

    @abstractmethod
    def column(self, name: str) -> "tuple[pa.Array | pa.ChunkedArray, dict[int, BadEntry]]":
        """A column as JSON can hold it, and the rows whose value it cannot; there it is null."""


@dataclass(frozen=True)
class ArrowBlock(Block):
    """Rows of a file in which a column has one type."""

    table: "pa.Table"

    def __len__(self) -> int:
        return len(self.table)

    def take(self, rows: range) -> "ArrowBlock":
        if rows.step == 1:
            return ArrowBlock(self.table.slice(rows.start, len(rows)))
        return ArrowBlock(self.table.take(list(rows)))

    def where(self, name: str, wanted: Collection[str]) -> "ArrowBlock":
        import pyarrow as pa
        import pyarrow.compute as pc

        kind = self.table[name].type
        values = pa.array(keys_in_type(wanted, kind), kind)
        return ArrowBlock(self.table.filter(pc.is_in(self.table[name], value_set=values)))

    def cells(self, name: str) -> list[Any]:
        return cells(self.table[name])

    def plain_text(self, name: str) -> "pa.ChunkedArray | None":
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.table[name]
        if not is_text(column.type):
            return None
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            return None
        column = column.cast(pa.string()).fill_null("")
        return None if pc.any(pc.match_substring_regex(column, ODD_TEXT)).as_py() else column

    def column(self, name: str) -> "tuple[pa.ChunkedArray, dict[int, BadEntry]]":
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.table[name]
        if pa.types.is_floating(column.type):
            return pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type)), {}
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            values, bad = _json_cells(name, cells(column))
            return pa.chunked_array([pa.array(values, column.type)]), bad
        return column, {}


@dataclass(frozen=True)
class RecordBlock(Block):
    """Rows of a file in which every row may have other types."""

    records: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.records)

    def take(self, rows: range) -> "RecordBlock":
        return RecordBlock([self.records[row] for row in rows])

    def where(self, name: str, wanted: Collection[str]) -> "RecordBlock":
        return RecordBlock([one for one in self.records if key_text(one.get(name)) in wanted])

    def cells(self, name: str) -> list[Any]:
        return [record.get(name) for record in self.records]

    def column(self, name: str) -> "tuple[pa.Array, dict[int, BadEntry]]":
        import pyarrow as pa

        values, bad = _json_cells(name, self.cells(name))
        kinds = Counter(_kind(value) for value in values if value is not None)
        usual = max(kinds, key=lambda kind: kinds[kind], default=float)
        for row, value in enumerate(values):
            if value is not None and _kind(value) is not usual:
                values[row], odd = None, type(value).__name__
                detail = f"{name!r} is a {odd} among values of type {usual.__name__}"
                bad[row] = BadEntry("undecodable_metadata", detail)
        try:
            return pa.array(values), bad
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise BadColumn(f"column {name!r} has values of several types: {error}") from error


def key_text(value: Any) -> str | None:
    """A key, text or a whole number, as text; None for any other value."""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def keys_in_type(keys: Collection[str], kind: "pa.DataType") -> list[Any]:
    """Keys in the type of a column of text or whole numbers, in order; those that have none there are left
    out.
    """
    from pyarrow import types

    if not types.is_integer(kind):
        return sorted(keys)
    bits = kind.bit_width
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if types.is_signed_integer(kind) else (0, 1 << bits)
    numbers = (int(key) for key in keys if re.fullmatch(r"-?(0|[1-9][0-9]*)", key))
    return sorted(number for number in numbers if low <= number < high)


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)


def _json_cells(name: str, values: list[Any]) -> tuple[list[Any], dict[int, BadEntry]]:
    kept, bad = [], {}
    for row, value in enumerate(values):
        try:
            # text that stayed bytes is not UTF-8
            kept.append(json_value(name, value))
        except BadEntry as error:
            kept.append(None)
            bad[row] = error
    return kept, bad
