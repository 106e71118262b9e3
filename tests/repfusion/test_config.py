"""One walk over a configuration finds every folder of frozen weights; a typo names the nearest key; what
comes from the environment is written as the file has it.
"""

import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from repfusion.config import (
    Config,
    ConfigError,
    WeightsFolder,
    known_keys,
    load_config,
    to_yaml,
    validate,
    weights_of,
)


class Tower(Config):
    path: WeightsFolder = Path("tower")
    size: int = 3


class Whole(Config):
    folder: Path = Path("plain")
    base: WeightsFolder | None = None
    tower: Tower = Tower()
    others: dict[str, Tower] = {}


def test_weights_are_found_in_sections_dicts_and_unions():
    config = Whole(base=Path("b"), others={"one": Tower(path=Path("c"))})
    assert weights_of(config) == {
        "base": Path("b"),
        "tower.path": Path("tower"),
        "others.one.path": Path("c"),
    }
    assert weights_of(Whole()) == {"tower.path": Path("tower")}


def test_every_bad_key_has_a_line_and_the_nearest_known_one():
    with pytest.raises(ConfigError) as caught:
        load_config(Whole, {"towr": {}, "tower": {"size": "x"}}, ["others.one.siez=2"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "config: unknown key 'towr'; did you mean 'tower'?" in lines
    assert any("tower.size: Input should be a valid integer" in line and "got 'x'" in line for line in lines)
    assert any("unknown key 'others.one.siez'" in line for line in lines)
    assert {"tower.size", "others.size", "base"} <= set(known_keys(Whole))


def test_overrides_are_key_equals_value(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"override 'tower': expected key\.path=value"):
        load_config(Whole, {}, ["tower"])
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(Whole, tmp_path / "none.yaml")


class Store(Config):
    uri: str | None = None
    token: str | None = None
    ports: list[int] = []


class Run(Config):
    name: str = "run"
    steps: int = 1
    store: Store = Store()
    copy_of: Store = Store()
    options: dict[str, Any] = {}


FILE = """
name: ${oc.env:RUN_NAME}-1
steps: ${oc.decode:${oc.env:STEPS}}
store: {uri: "${oc.env:STORE_URI}", token: "${oc.env:TOKEN,none}", ports: [1, "${oc.env:PORT}"]}
copy_of: ${store}
options: {same: "${store.uri}", steps: "${options.fixed}", fixed: 7, price: '\\${5}'}
"""
SAID = {"RUN_NAME": "mine", "STEPS": "5", "STORE_URI": "postgresql://me:Zq7secret@host/db", "PORT": "2"}


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in SAID.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run.yaml").write_text(FILE)
    return tmp_path / "run.yaml"


def test_what_the_environment_says_lives_in_the_process_alone(run_file: Path):
    config = load_config(Run, run_file)
    assert (config.name, config.steps, config.store.ports) == ("mine-1", 5, [1, 2])
    assert config.store.uri == config.copy_of.uri == config.options["same"] == SAID["STORE_URI"]
    written = yaml.safe_load(to_yaml(config))
    assert written["name"] == "${oc.env:RUN_NAME}-1" and written["steps"] == "${oc.decode:${oc.env:STEPS}}"
    assert written["store"]["uri"] == "${oc.env:STORE_URI}" and written["store"]["ports"] == [
        1,
        "${oc.env:PORT}",
    ]
    assert written["copy_of"]["uri"] == "${store.uri}"
    assert written["options"] == {"same": "${store.uri}", "steps": 7, "fixed": 7, "price": "\\${5}"}
    assert pickle.loads(pickle.dumps(config)).as_written() == config.as_written()


def test_what_was_written_loads_as_the_same(run_file: Path, tmp_path: Path):
    config = load_config(Run, run_file, ["options.more=5"])
    (tmp_path / "written.yaml").write_text(to_yaml(config))
    again = load_config(Run, tmp_path / "written.yaml")
    assert again.model_dump() == config.model_dump() and to_yaml(again) == to_yaml(config)


def test_overrides_may_ask_the_environment_too(run_file: Path):
    config = load_config(Run, {}, ["store.uri=${oc.env:STORE_URI}"])
    assert (
        config.store.uri == SAID["STORE_URI"] and config.as_written()["store"]["uri"] == "${oc.env:STORE_URI}"
    )


def test_a_file_that_was_found_asks_nothing(tmp_path: Path, run_file: Path):
    """Whatever its spelling; an override, which the user gave, still does."""
    (tmp_path / "found.yaml").write_text(
        'name: "${oc.env:RUN_NAME}"\n'
        'store: {uri: "http://them/${ oc.${options.name}:STORE_URI }", token: a}\n'
        "options: {name: env, more: '\\${oc.env:RUN_NAME} \\\\${oc.env:RUN_NAME}'}\n"
    )
    found = load_config(Run, tmp_path / "found.yaml", ["store.token=${oc.env:PORT}"], is_data=True)
    assert found.name == "${oc.env:RUN_NAME}" and found.store.token == "2"
    assert found.store.uri == "http://them/${ oc.${options.name}:STORE_URI }"
    assert "mine" not in found.options["more"]
    with pytest.raises(
        ConfigError, match=r"found in a folder, so it reads no environment\): steps: .*oc.env:STEPS"
    ):
        load_config(Run, run_file, is_data=True)


PARTS = ["\\", "${", "}", "oc.env:", "HOME", "oc.", ":", ".", "'", '"', "$", "{", " ", ",", "${oc.env:HOME}"]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(PARTS), max_size=9).map("".join))
def test_whatever_text_was_found_stays_as_it_is(text):
    with suppress(ConfigError):  # some are no interpolations that OmegaConf could read
        found = load_config(Run, {"name": text, "options": {"a": [text]}}, is_data=True)
        assert (found.name, found.options["a"]) == (text, [text])


def test_literal_secrets_are_not_written():
    config = validate(
        Run, {"store": {"uri": SAID["STORE_URI"], "token": "Zq7secret"}, "options": {"key": "Zq7secret"}}
    )
    assert "Zq7secret" not in to_yaml(config)
    assert config.as_written()["store"] == {"uri": "postgresql://me:***@host/db", "token": "***", "ports": []}


def test_what_is_printed_of_a_configuration_holds_no_secret():
    config = Run(
        store=Store(uri="postgresql://me:Zq7secret@host/db", token="Zq7secret"), options={"key": "Zq7secret"}
    )
    assert (
        "Zq7secret" not in repr(config) and "Zq7secret" not in str(config) and "me:***@host" in repr(config)
    )


def test_no_error_shows_a_secret(run_file: Path):
    values = {"store": {"token": ["Zq7secret"], "uri": ["http://me:Zq7secret@host"], "ports": "Zq7secret"}}
    with pytest.raises(ConfigError) as caught:
        load_config(Run, values, ["store.passwrd=Zq7secret"])
    lines = str(caught.value).splitlines()
    assert any("store.token: Input should be a valid string (got '***')" in line for line in lines)
    assert any(
        "store.uri: Input should be a valid string (got ['http://me:***@host'])" in line for line in lines
    )
    assert "unknown key 'store.passwrd'" in str(caught.value)
    assert "Zq7secret" not in str(caught.value).replace("got 'Zq7secret'", "")  # of ports, which is none
    with pytest.raises(ValidationError) as raw:
        Store(token=["Zq7secret"])  # pyright: ignore[reportArgumentType]
    assert "Zq7secret" not in str(raw.value)
    with pytest.raises(ConfigError) as unreadable:
        load_config(Run, run_file, ["store.ports=[http://me:Zq7secret@host"])
    assert "Zq7secret" not in str(unreadable.value)
