"""YAML file < `key.path=value` overrides -> one validated, frozen configuration; every bad key is named."""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, PrivateAttr, ValidationError
from pydantic_core import CoreSchema, core_schema

from repfusion.display.interpolations import Written, escaped, restored, written_texts
from repfusion.display.redaction import redact, redact_text
from repfusion.weights import cached, url_of

TAGS = ("kind", "method")
"""Fields whose value says which of several classes a section is."""


class Strict(BaseModel):
    """A frozen model that refuses fields it does not know: the base of what is configured and of what is
    written as JSON.
    """

    # what is given may be a secret: `validate` says what it was, without those
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True
    )


S = TypeVar("S", bound="Config")


class Config(Strict, allow_inf_nan=False):
    """A section of a configuration. Defaults live in the class alone, and so do the bounds of its numbers."""

    _written: dict[str, str] = PrivateAttr(default_factory=dict)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """What is printed of a configuration, as where an error shows what a function was given."""
        for name, value in super().__repr_args__():
            yield name, redact({name: value})[name]

    @property
    def written(self) -> Written:
        """Texts of the values that follow from the environment, by dotted key, as the file has them."""
        return self._written

    def with_written(self: S, written: Written) -> S:
        """A section that knows the texts of its values from the environment."""
        copy = self.model_copy()
        copy._written = dict(written)
        return copy

    def as_written(self) -> dict[str, Any]:
        """What may be written of it, to disk or to a tracking store: every field, values from the environment
        as the file has them, no secret.
        """
        return redact(restored(self.model_dump(mode="json"), self._written))


class ConfigError(ValueError):
    """A configuration that does not hold; the message names every bad key and shows no secret."""

    def __init__(self, message: str):
        super().__init__(redact_text(message))


def copy_of(place: Any) -> Any:
    """A URL as the place of its copy on this node; anything else as it is."""
    return str(cached(place)) if isinstance(place, str) and "://" in place else place


def _named(folder: Path | None) -> str | None:
    """A folder as a configuration names it, a copy by its URL."""
    return None if folder is None else url_of(folder) or str(folder)


@dataclass(frozen=True)
class Weights:
    """Marks a field that names a folder of frozen weights, or a URL: then the value is the place of its copy,
    which `pretrained.cache` fetches.
    """

    to_train: bool = True
    """Whether trained weights rely on the folder: then a checkpoint remembers its digest."""
    to_sample: bool = True
    """Whether sampling needs the folder: then an export holds it."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(_named, when_used="json")
        return core_schema.no_info_before_validator_function(copy_of, handler(source), serialization=written)


WeightsFolder = Annotated[Path, Weights()]
"""A folder of frozen weights that a model stands on; `weights_of` finds every one of a configuration."""

C = TypeVar("C", bound=BaseModel)


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Puts the key of the configuration before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


Wanted = Callable[[Weights], bool]
"""Which folders of weights are meant."""


def weights_of(config: BaseModel, prefix: str = "", wanted: Wanted = lambda weights: True) -> dict[str, Path]:
    """Folders of frozen weights that a configuration names, by dotted key; None is left out."""
    found: dict[str, Path] = {}
    for name, info in type(config).model_fields.items():
        value, key = getattr(config, name), f"{prefix}{name}"
        if isinstance(value, Path) and any(map(wanted, weight_marks(info))):
            found[key] = value
        found |= _nested_weights(value, key, wanted)
    return found


def _nested_weights(value: Any, key: str, wanted: Wanted) -> dict[str, Path]:
    match value:
        case BaseModel():
            return weights_of(value, f"{key}.", wanted)
        case dict():
            parts = [_nested_weights(part, f"{key}.{name}", wanted) for name, part in value.items()]
            return {name: folder for part in parts for name, folder in part.items()}
        case _:
            return {}


def weight_marks(info: Any) -> list[Weights]:
    """The marks of a field's type, or of a part of it, that say that it names frozen weights."""
    marks = [*getattr(info, "metadata", ()), *getattr(info, "__metadata__", ())]
    arguments = get_args(getattr(info, "annotation", info))
    below = [mark for argument in arguments for mark in weight_marks(argument)]
    return [*(mark for mark in marks if isinstance(mark, Weights)), *below]


def load_config(
    kind: type[C],
    source: Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    place: str | None = None,
    is_data: bool = False,
) -> C:
    """The configuration of class `kind`: defaults < YAML file (or values) < overrides.

    Args:
        kind: a pydantic model.
        source: a YAML file, or values that were read before.
        overrides: `key.path=value`. What a field of text (or a path) is given is the text as typed; any other
            value is as YAML writes it. `null` empties a field that may be None.
        place: what messages call the source; None is the file's path.
        is_data: the source was found in a folder, not given by whoever runs this: its interpolations stay
            text.

    Raises:
        ConfigError: a missing or unreadable file, a malformed override, an unknown key (with the nearest
            known one), a bad value; one line for each.
    """
    place = place or (str(source) if isinstance(source, Path) else "config")
    if is_data:
        place = f"{place} (found in a folder, so it reads no environment)"
    parsed = [Override.parse(kind, text) for text in overrides]
    tree = _read_tree(source, parsed, is_data)
    config = validate(kind, _resolved(tree, source, parsed), place, parsed)
    return config.with_written(written_texts(tree)) if isinstance(config, Config) else config


@dataclass(frozen=True)
class Override:
    """A value from the command line, in the place of the file's."""

    text: str
    """The whole, as typed."""
    key: str
    value: Any

    @classmethod
    def parse(cls, kind: type[BaseModel], text: str) -> "Override":
        """`key.path=value` for a configuration of class `kind`. Raises ConfigError where it is malformed."""
        key, equals, typed = text.partition("=")
        if not (equals and all(key.split(".")) and key.strip(".[]")):
            raise ConfigError(f"override {redact(text)!r}: expected key.path=value")
        takes = _types_at(kind, key)
        if takes and all(map(_is_text, takes - {NoneType})) and not (typed == "null" and NoneType in takes):
            return cls(text, key, typed)
        try:
            value = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([f"_={typed}"])))["_"]
        except UNREADABLE as error:
            if Any not in takes:
                raise ConfigError(f"{cls(text, key, typed).shown}: not YAML: {_first_line(error)}") from error
            value = typed
        if Any in takes and isinstance(value, str) and typed[:1] not in ("'", '"'):
            value = typed
        return cls(text, key, value)

    @property
    def shown(self) -> str:
        """What messages call it, without a secret."""
        name, typed = self.key.rpartition(".")[2], self.text.partition("=")[2]
        return f"override {f'{self.key}={redact({name: typed})[name]}'!r}"

    def is_about(self, key: str, problem: str) -> bool:
        """Whether pydantic's problem at a dotted key is with this value, or with where it was put."""
        own, key = (".".join(filter(None, re.split(r"[.\[\]]+", one))) for one in (self.key, key))
        inside = f"{key}.".startswith(f"{own}.")
        return inside or (own.startswith(f"{key}.") and problem not in ("value_error", "missing"))

    def clear(self, given: DictConfig) -> None:
        """Empties the section whose `kind` (or `method`) is another one from here on: what the file says
        there is about the other kind.
        """
        section, _, tag = self.key.rpartition(".")
        if tag in TAGS and section:
            found = OmegaConf.select(given, section)
            if isinstance(found, DictConfig) and found.get(tag, self.value) != self.value:
                OmegaConf.update(given, section, {}, merge=False)

    def apply(self, given: DictConfig) -> None:
        """Puts the value into what a file says."""
        OmegaConf.update(given, self.key, self.value, force_add=True)


UNREADABLE = (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError)
"""What OmegaConf and YAML raise over a text that is none of theirs."""


def _first_line(error: BaseException) -> str:
    """What is wrong, without the place in a stream that has no name."""
    if isinstance(error, yaml.MarkedYAMLError):
        return error.problem or error.context or type(error).__name__
    return str(error).partition("\n")[0] or type(error).__name__


def _types_at(kind: type[BaseModel], key: str) -> set[Any]:
    """The types that a dotted key may have, members of unions by themselves; none for an unknown key."""
    here: set[Any] = {kind}
    for part in key.split("."):
        models = [one for one in here if isinstance(one, type) and issubclass(one, BaseModel)]
        fields = [one.model_fields[part].annotation for one in models if part in one.model_fields]
        values = [get_args(one)[-1] for one in here if get_origin(one) is dict]
        here = {leaf for one in [*fields, *values] for leaf in leaves(one)} | ({Any} & here)
    return here


def _is_text(kind: Any) -> bool:
    """Whether a type takes any text, or some words."""
    if get_origin(kind) is Literal:
        return all(isinstance(word, str) for word in get_args(kind))
    return kind in (str, Path)


def read_values(source: Path | Mapping[str, Any], overrides: Sequence[Override] = ()) -> dict[str, Any]:
    """The values of a YAML file, or given ones, with overrides and interpolations resolved, not validated.

    Raises:
        ConfigError: a missing or unreadable file, or an override that has no place in it.
    """
    return _resolved(_read_tree(source, overrides), source, overrides)


def _read_tree(
    source: Path | Mapping[str, Any], overrides: Sequence[Override] = (), is_data: bool = False
) -> DictConfig:
    """A file, or values, with overrides; interpolations as they stand, those of data as plain text."""
    if isinstance(source, Path) and not source.is_file():
        raise ConfigError(f"{source}: no such config file")
    try:
        given = OmegaConf.load(source) if isinstance(source, Path) else OmegaConf.create(dict(source))
        if is_data:
            given = OmegaConf.create(escaped(OmegaConf.to_container(given, resolve=False)))
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source if isinstance(source, Path) else 'config'}: {error}") from error
    if not isinstance(given, DictConfig):
        raise ConfigError(f"{source}: holds a list, expected key: value")
    for change in (Override.clear, Override.apply):
        for override in overrides:
            try:
                change(override, given)
            except UNREADABLE as error:
                raise ConfigError(f"{override.shown}: {_first_line(error)}") from error
    return given


def _resolved(
    tree: DictConfig, source: Path | Mapping[str, Any], overrides: Sequence[Override]
) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True))
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "")
        blamed = [one.shown for one in overrides if key and one.key == key]
        where = blamed[-1] if blamed else (source if isinstance(source, Path) else "config")
        raise ConfigError(f"{where}: {_first_line(error)}") from error


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values, those of `above` where both have a key."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(dict(below), dict(above))))


def validate(kind: type[C], values: Any, place: str = "config", overrides: Sequence[Override] = ()) -> C:
    """Raises ConfigError, one line for each bad key, with the override that it is about or else `place`."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            key, section = spell(kind, problem["loc"])
            is_unknown = problem["type"] == "extra_forbidden"
            # what stands at an unknown key may be a secret: its name does not tell
            blamed = [
                "override" if is_unknown else one.shown
                for one in overrides
                if one.is_about(key, problem["type"])
            ]
            where = blamed[-1] if blamed else place
            if is_unknown:
                near = nearest_in(section, key) or nearest_key(kind, key)
                lines.append(f"{where}: unknown key {key!r}" + (f"; did you mean '{near}'?" if near else ""))
            else:
                got = "" if isinstance(problem["input"], dict) else f" (got {_shown(key, problem)!r})"
                lines.append(f"{where}: {key}: {problem['msg']}{got}")
        raise ConfigError("\n".join(lines)) from error


def _shown(key: str, problem: Mapping[str, Any]) -> Any:
    """What stands at a key, unless that is a secret."""
    name = key.rpartition(".")[2]
    return redact({name: problem["input"]})[name]


def to_yaml(config: Config) -> str:
    """The resolved configuration, values from the environment as the file has them; loading it again gives
    the same one, but for secrets that stand in it.
    """
    values = redact(restored(escaped(config.model_dump(mode="json")), config.written))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The configuration classes in a field's type, whatever union, dict or annotation they stand in."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from sections(argument)


def spell(kind: type[BaseModel], loc: Sequence[str | int]) -> tuple[str, list[type[BaseModel]]]:
    """The dotted key of a place in a configuration as a file writes it, and the classes of the section that
    holds its last part. pydantic also names the member of a union that was chosen, such as `scenes`.
    """
    words: list[str] = []
    here: list[Any] = [kind]
    last = here
    for part in loc:
        models = [one for one in here if isinstance(one, type) and issubclass(one, BaseModel)]
        if len(models) > 1 and (chosen := [one for one in models if part in tags_of(one)]):
            here = chosen
            continue
        fields = [one.model_fields[str(part)].annotation for one in models if part in one.model_fields]
        containers = [get_args(one)[-1] for one in here if get_origin(one) in (dict, list, tuple)]
        words.append(str(part))
        last, here = here, [leaf for one in fields or containers for leaf in leaves(one)]
    sections = [one for one in last if isinstance(one, type) and issubclass(one, BaseModel)]
    return ".".join(words) or "the whole", sections


def leaves(annotation: Any) -> Iterator[Any]:
    """The members of a union, annotations left out; any other type is its own."""
    if get_origin(annotation) is Annotated:
        yield from leaves(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for one in get_args(annotation):
            yield from leaves(one)
    else:
        yield annotation


def tags_of(kind: type[BaseModel]) -> set[str]:
    """What a union of sections may call this one."""
    fields = (kind.model_fields[tag].annotation for tag in TAGS if tag in kind.model_fields)
    return {value for field in fields for value in get_args(field)}


def nearest_in(sections: Sequence[type[BaseModel]], key: str) -> str | None:
    """The key of the same section, or of one in it, that looks most like a mistaken one."""
    prefix, dot, _ = key.rpartition(".")
    known = [known for one in sections for known in known_keys(one, prefix + dot)]
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.75)), None)


def known_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that a configuration class takes."""
    for name, info in kind.model_fields.items():
        yield prefix + name
        for section in sections(info.annotation):
            yield from known_keys(section, f"{prefix}{name}.")


def nearest_key(kind: type[BaseModel], key: str) -> str | None:
    """The known key that looks most like a mistaken one: same section first, then the same last word
    anywhere.
    """
    known = list(dict.fromkeys(known_keys(kind)))
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return close[0]
    last = key.rpartition(".")[2]
    same = [other for other in known if other.rpartition(".")[2] == last]
    if same:
        return max(same, key=lambda other: difflib.SequenceMatcher(None, key, other).ratio())
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.5)), None)
