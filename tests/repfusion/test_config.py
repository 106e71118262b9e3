"""One walk over a configuration finds every folder of frozen weights; a typo names the nearest key."""

from pathlib import Path

import pytest

from repfusion.config import Config, ConfigError, WeightsFolder, known_keys, load_config, weights_of


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
