"""The workflow's configuration: shipped files parse, overrides apply, mistakes are named."""

from pathlib import Path

import pytest
import yaml

from pipelines.config import ConfigError, load_config, to_yaml, validate

CONFIGS = sorted((Path(__file__).parents[2] / "pipelines" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_parse_and_round_trip(path):
    config = load_config(path)
    assert validate(yaml.safe_load(to_yaml(config))) == config
    assert config.ingest.image_size == config.source.scenes.world.image_size


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "w.yaml"
    path.write_text("root: here\nlatents: {batch_size: 8}\n")
    config = load_config(
        path, ["latents.batch_size=16", "source.scenes.num_samples=5", "ingest.image_size=null"]
    )
    assert (config.latents.batch_size, config.source.scenes.num_samples, config.ingest.image_size) == (
        16,
        5,
        None,
    )
    assert config.train.output_dir == Path("here/train") and config.train.data.images == Path("here/curate")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("latents.bath_size=3", r"unknown key 'latents.bath_size'; did you mean 'latents.batch_size'\?"),
        ("trian.num_steps=3", r"unknown key 'trian'; did you mean 'train'\?"),
        ("source.scenes.image_size=3", r"did you mean 'source.scenes.world.image_size'\?"),
        ("train.model.encoder.leyer=-1", r"did you mean 'train.model.encoder.layer'\?"),
        ("ingest.image_size=big", r"ingest.image_size: Input should be a valid integer.*got 'big'"),
        ("source.kind=urls", r"source: .*source.urls.path has to name"),
        ("no-equals-sign", r"expected key.path=value"),
    ],
)
def test_a_mistake_is_named(tmp_path, override, message):
    path = tmp_path / "w.yaml"
    path.write_text("root: here\n")
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


def test_a_missing_or_broken_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("root: [1\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(tmp_path / "bad.yaml")
