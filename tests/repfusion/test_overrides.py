"""What is typed on the command line arrives as it was typed, and what is wrong with it is said of it."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field

from repfusion.config import Config, ConfigError, Override, load_config


class Part(Config):
    kind: Literal["part"] = "part"
    name: str = "a"


class Other(Config):
    kind: Literal["other"] = "other"
    number: int | float = 1


class All(Config):
    text: str = "of the file"
    maybe: str | None = None
    place: Path = Path("here")
    word: Literal["yes", "no"] = "no"
    parts: dict[str, Part] = {}
    one: Annotated[Part | Other, Field(discriminator="kind")] = Part()
    number: int | None = 3
    flag: bool = False
    names: tuple[str, ...] = ()
    options: dict[str, Any] = {}


TYPED = st.text().filter(lambda text: "${" not in text)
"""Anything without an interpolation."""


@given(TYPED)
@example("runs/lora #1/x")
@example("*.tar")
@example("[0-9]*.tar")
@example("{000..999}.tar")
@example("yes")
@example("5")
@example("???")
@example("'quoted'")
@example("\\back\\")
@example("")
@settings(max_examples=300, deadline=None)
def test_text_arrives_as_typed(text: str):
    given = {"text": "of the file", "parts": {"p": {"name": "x"}}}
    config = load_config(
        All, given, ["one.kind=part", f"text={text}", f"parts.p.name={text}", f"one.name={text}"]
    )
    assert (config.text, config.parts["p"].name, config.one) == (text, text, Part(name=text))
    assert load_config(All, {}, [f"place=/{text}"]).place == Path(f"/{text}")
    if text != "null":
        assert load_config(All, {}, [f"maybe={text}"]).maybe == text


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_for_anything_else_is_read_or_refused(text: str):
    """Nothing but a ConfigError, of one line that begins with the override."""
    for key in ("number", "flag", "names", "one", "one.number", "options", "options.x", "", text):
        override = f"{key}={text}"
        try:
            load_config(All, {}, [override])
        except ConfigError as error:
            # its key at least: the value may be hidden
            named = ("override '", 'override "') if key == text else (f"override '{key}", f'override "{key}')
            named = (*named, "override: unknown key ")
            assert all(line.startswith(named) for line in str(error).split("\n"))


def test_numbers_lists_and_truth_values_are_read():
    typed = [
        "number=null",
        "flag=yes",
        "names=[a, b]",
        "maybe=null",
        "word=yes",
        "one={kind: other, number: 1e-3}",
    ]
    config = load_config(All, {"maybe": "x"}, typed)
    assert (config.number, config.flag, config.names, config.maybe) == (None, True, ("a", "b"), None)
    assert (config.word, config.one) == ("yes", Other(number=1e-3))


def test_options_are_read_where_they_are_more_than_text():
    typed = ["n=5", "b=true", "secret=*abc", "note=a #b", "text='5'", "list=[1, 2]", "yaml=a: b: c"]
    config = load_config(All, {}, [f"options.{one}" for one in typed])
    assert config.options == {
        "n": 5, "b": True, "secret": "*abc", "note": "a #b", "text": "5", "list": [1, 2], "yaml": "a: b: c",
    }  # fmt: skip


def test_interpolations_are_resolved():
    config = load_config(All, {"text": "x", "place": "${text}/file"}, ["text=over", "maybe=${place}/below"])
    assert (config.place, config.maybe) == (Path("over/file"), "over/file/below")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("number=*x", r"^override 'number=\*x': not YAML: found undefined alias$"),
        ("one={kind: x", r"^override 'one=\{kind: x': not YAML: .*expected"),
        ("number=big", r"^override 'number=big': number: .*valid integer.*got 'big'"),
        ("text=${none}", r"^override 'text=\$\{none\}': Interpolation key 'none' not found$"),
        ("txt=x", r"^override: unknown key 'txt'; did you mean 'text'\?$"),
        ("text.x=5", r"^override 'text\.x=5': text: .*valid string"),
        (
            "parts.p.nane=5",
            r"^override: unknown key 'parts\.p\.nane'; did you mean '.*name'\?$",
        ),
        ("=x", r"^override '=x': expected key\.path=value$"),
        (".=x", r"^override '.=x': expected key\.path=value$"),
    ],
)
def test_an_error_names_the_override_and_not_the_file(tmp_path: Path, override: str, message: str):
    path = tmp_path / "file.yaml"
    path.write_text("number: 4\n")
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(All, path, ["flag=true", override])
    assert "file.yaml" not in str(caught.value)


def test_an_error_of_the_file_names_the_file(tmp_path: Path):
    path = tmp_path / "file.yaml"
    path.write_text("text: ${none}\n")
    with pytest.raises(ConfigError, match=r"^.*file\.yaml: Interpolation key 'none'"):
        load_config(All, path, ["flag=true"])
    path.write_text("[a, b]\n")
    with pytest.raises(ConfigError, match=r"file\.yaml: holds a list"):
        load_config(All, path)


def test_what_is_unknown_is_yaml():
    assert Override.parse(All, "nothing.of.it=[1]") == Override("nothing.of.it=[1]", "nothing.of.it", [1])


@pytest.mark.parametrize("typed", [["one.kind=other", "one.number=2"], ["one.number=2", "one.kind=other"]])
def test_another_kind_takes_the_place_of_the_files_wherever_it_stands(typed):
    assert load_config(All, {"one": {"kind": "part", "name": "x"}}, typed).one == Other(number=2)
