"""Values of a configuration that a file takes from the environment, `${oc.env:NAME}`: which they are, so that
they are written as the file has them and only the living process holds them.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

Written = Mapping[str, str]
"""The text of every value that follows from the environment, by dotted key."""
MARKS = ("marked-one", "marked-two")
"""What the environment says in two readings; what differs between them follows from it."""


def written_texts(tree: Any) -> dict[str, str]:
    """The texts of a tree's values that follow from the environment, through other interpolations or not."""
    plain = OmegaConf.to_container(tree, resolve=False)
    if "${" not in str(plain):
        return {}
    try:
        readings = [_read_with(tree, mark) for mark in MARKS]
    except OmegaConfBaseException:
        # a mark is no number or key, where one is needed: all that is interpolated counts
        found = [path for path, text in _texts(plain) if "${" in text]
    else:
        found = list(_differing(*readings))
    return {_key(path): _text_at(plain, path) for path in found}


def restored(value: Any, written: Written, key: str = "") -> Any:
    """Nested values with the texts in the places of what they stood for."""
    if key in written:
        return written[key]
    prefix = f"{key}." if key else ""
    match value:
        case dict():
            return {name: restored(part, written, f"{prefix}{name}") for name, part in value.items()}
        case list() | tuple():
            return [restored(part, written, f"{prefix}{index}") for index, part in enumerate(value)]
        case _:
            return value


def below(written: Written, key: str) -> dict[str, str]:
    """The texts of a section, by the keys within it."""
    prefix = f"{key}."
    return {name.removeprefix(prefix): text for name, text in written.items() if name.startswith(prefix)}


Path = tuple[str | int, ...]


def _key(path: Path) -> str:
    return ".".join(map(str, path))


@contextmanager
def _environment_of(text: str) -> Iterator[None]:
    """Every variable of the environment is this text, for OmegaConf."""
    OmegaConf.register_resolver("oc.env", lambda *names: text, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_resolver("oc.env", oc.env, replace=True)


def _read_with(tree: Any, mark: str) -> Any:
    with _environment_of(mark):
        return OmegaConf.to_container(tree, resolve=True)


def _texts(value: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    match value:
        case str():
            yield path, value
        case dict():
            for name, part in value.items():
                yield from _texts(part, (*path, name))
        case list():
            for index, part in enumerate(value):
                yield from _texts(part, (*path, index))


def _differing(one: Any, other: Any, path: Path = ()) -> Iterator[Path]:
    match one, other:
        case dict(), dict() if one.keys() == other.keys():
            for name in one:
                yield from _differing(one[name], other[name], (*path, name))
        case list(), list() if len(one) == len(other):
            for index, pair in enumerate(zip(one, other, strict=True)):
                yield from _differing(*pair, (*path, index))
        case _:
            if one != other:
                yield path


def _text_at(plain: Any, path: Path) -> str:
    """What the file says at a path; below a section that one interpolation stands for, the interpolation of
    that part of it.
    """
    for depth, part in enumerate(path):
        if isinstance(plain, str):
            inner = plain.removeprefix("${").removesuffix("}")
            return f"${{{inner}.{_key(path[depth:])}}}" if inner.replace(".", "").isidentifier() else plain
        plain = plain[part]
    return str(plain)


def escaped(value: Any) -> Any:
    """Nested values whose `${` is a text like any other to whoever resolves interpolations."""
    match value:
        case str():
            return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
        case dict():
            return {name: escaped(part) for name, part in value.items()}
        case list():
            return [escaped(part) for part in value]
        case _:
            return value
