"""A cell of a table or a field of a JSON -> what a sample's JSON can hold."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


class BadEntry(ValueError):
    """An entry of an input that becomes no sample; `reason` is counted, `detail` is for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


class Undecodable:
    """Stands for a value in which some text is not UTF-8."""

    def __init__(self, detail: str):
        self.detail = detail


def json_value(name: str, value: Any) -> Any:
    """The value of the column or field `name`: NaN and infinities, which JSON lacks and by which tables made
    by pandas say that there is none, are null.

    Raises:
        BadEntry: undecodable_metadata, for text that is not UTF-8 and for a value that JSON cannot hold.
    """
    try:
        return _json_value(value)
    except RecursionError as error:
        raise BadEntry("undecodable_metadata", f"{name!r} is nested too deeply") from error
    except ValueError as error:
        raise BadEntry("undecodable_metadata", f"{name!r}: {error}") from error


def _json_value(value: Any) -> Any:
    match value:
        case None | bool() | int():
            return value
        case str():
            value.encode()  # raises for half a surrogate pair, as JSON may spell it
            return value
        case float():
            return value if math.isfinite(value) else None
        case list() | tuple():
            return [_json_value(item) for item in value]
        case dict():
            return {_json_value(key): _json_value(item) for key, item in value.items()}
        case Undecodable():
            raise ValueError(value.detail)
        case bytes():
            raise ValueError("bytes, or text that is not UTF-8")
    raise ValueError(f"a {type(value).__name__}, which JSON cannot hold")


def json_values(record: dict[str, Any]) -> dict[str, Any]:
    """All fields of a record; raises what `json_value` raises."""
    return {json_value("a field's name", name): json_value(name, value) for name, value in record.items()}


def is_text(kind: "pa.DataType") -> bool:
    """Whether a column of this type holds text (or nothing at all)."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return is_text(kind.value_type)
    plain = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return plain or types.is_null(kind)


def is_binary(kind: "pa.DataType") -> bool:
    """Whether a column of this type holds bytes (or nothing at all)."""
    from pyarrow import types

    plain = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return plain or types.is_null(kind)


def is_list(kind: "pa.DataType") -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def fits_json(kind: "pa.DataType") -> bool:
    """Whether JSON holds the values of a column of this type: text, numbers, truth values, lists and structs
    of these.
    """
    from pyarrow import types

    if types.is_struct(kind):
        return all(fits_json(field.type) for field in kind)
    if is_list(kind):
        return fits_json(kind.value_type)
    return is_text(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def cells(column: "pa.ChunkedArray | pa.Array") -> list[Any]:
    """A column's values. Text that is not UTF-8 stays bytes; a list or struct that holds such text is
    Undecodable.
    """
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_cell(value) for value in column]


def _cell(scalar: "pa.Scalar") -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        buffer = getattr(scalar, "as_buffer", None)
        return Undecodable(str(error)) if buffer is None else buffer().to_pybytes()
