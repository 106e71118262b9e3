"""Which columns of a table are asked for, and whether it has them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.lists.values import fits_json, is_binary, is_list, is_text

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Needed:
    """A column that is asked for."""

    name: str
    key: str
    """Where the configuration names it."""
    fits: "Callable[[pa.DataType], bool]"
    expected: str
    """What `fits` takes, for people."""


def text_column(name: str, key: str) -> Needed:
    return Needed(name, key, lambda kind: is_text(kind) or is_binary(kind), "text")


def caption_column(name: str, key: str, remedy: str | None) -> Needed:
    """One of captions: text or bytes of it. Lists of these too, unless there is a remedy to name."""

    def fits(kind: "pa.DataType") -> bool:
        plain = is_text(kind) or is_binary(kind)
        return plain or (remedy is None and is_list(kind) and fits(kind.value_type))

    return Needed(name, key, fits, "text" + (f" (for lists, set {remedy})" if remedy else ""))


def key_column(name: str, key: str) -> Needed:
    def fits(kind: "pa.DataType") -> bool:
        from pyarrow import types

        return types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind)

    return Needed(name, key, fits, "text or whole numbers")


def json_column(name: str, key: str) -> Needed:
    return Needed(name, key, fits_json, "text, numbers, truth values, lists or structs of these")


def check_columns(
    needed: Sequence[Needed],
    names: Sequence[str],
    place: str,
    kind_of: "Callable[[str], pa.DataType] | None",
    advice: str = "",
) -> None:
    """Raises ValueError where a column is not there once, or of an unfit type; `kind_of` is None where a type
    says nothing.
    """
    for one in needed:
        times = names.count(one.name)
        if times > 1:
            raise ValueError(f"{place} has {times} columns {one.name!r} ({one.key}); rename all but one")
        if not times:
            raise ValueError(f"{place} has no column {one.name!r} ({one.key}); it has {list(names)}{advice}")
        if kind_of is not None and not one.fits(kind := kind_of(one.name)):
            raise ValueError(f"{place}: column {one.name!r} ({one.key}) is {kind}; expected {one.expected}")
