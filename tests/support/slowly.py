"""Parameters of tests of which the fast suite takes one."""

from collections.abc import Iterable
from typing import Any

import pytest


def all_but_one_slow(values: Iterable[Any], fast: Any) -> list[Any]:
    """The values as parameters, tuples as several at once; all but `fast` are marked slow."""
    rows = [(one, one if isinstance(one, tuple) else (one,)) for one in values]
    return [one if one == fast else pytest.param(*row, marks=pytest.mark.slow) for one, row in rows]
