"""Parameters of tests of which the fast suite takes one."""

from collections.abc import Iterable
from typing import Any

import pytest


def all_but_one_slow(values: Iterable[Any], fast: Any) -> list[Any]:
    """The values as parameters, all but `fast` marked slow."""
    return [one if one == fast else pytest.param(one, marks=pytest.mark.slow) for one in values]
