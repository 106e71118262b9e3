"""Any value becomes one that JSON holds, or is refused by the name of its column."""

import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.lists.values import BadEntry, Undecodable, cells, fits_json, json_value, json_values
from repfusion.files import canonical_json

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.datetimes(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(ANY)
def test_any_value_becomes_json_or_is_refused(value):
    try:
        found = json_value("score", value)
    except BadEntry as error:
        assert error.reason == "undecodable_metadata" and "'score'" in error.detail
    else:
        assert json.loads(canonical_json(found).encode()) == found


def test_nan_is_null_at_any_depth():
    nan, inf = float("nan"), float("-inf")
    record = {"a": nan, "b": [0.5, inf], "c": {"d": nan, "e": "NaN"}, "f": json.loads("1e999")}
    assert json_values(record) == {"a": None, "b": [0.5, None], "c": {"d": None, "e": "NaN"}, "f": None}


def test_names_of_fields_are_text_too():
    with pytest.raises(BadEntry, match="a field's name"):
        json_values(json.loads('{"\\ud800": 1}'))


def test_what_is_nested_too_deeply_is_refused():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(BadEntry, match="nested too deeply"):
        json_values({"a": deep})


def broken_text(values: list[bytes | None], kind: pa.DataType = pa.string()) -> pa.Array:
    """A column of text in which some is not UTF-8, as careless writers leave it."""
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(kind, len(values), binary.buffers())


def test_text_that_is_not_utf8_costs_its_own_cell_alone():
    column = broken_text([b"fine", b"caf\xe9", None, "café".encode()])
    assert cells(column) == ["fine", b"caf\xe9", None, "café"]
    lists = pa.ListArray.from_arrays([0, 1, 2, 4], column)
    first, second, third = cells(lists)
    assert first == ["fine"] and third == [None, "café"] and isinstance(second, Undecodable)


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        (pa.string(), True),
        (pa.dictionary(pa.int8(), pa.string()), True),
        (pa.list_(pa.struct([("a", pa.float32()), ("b", pa.bool_())])), True),
        (pa.binary(), False),
        (pa.timestamp("s"), False),
        (pa.list_(pa.date32()), False),
        (pa.decimal128(5, 2), False),
    ],
)
def test_types_that_json_holds(kind, fits):
    assert fits_json(kind) is fits
