"""Data sets -> a mixture: what has to agree, and what names the data."""

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from tiny_columns import READERS, add_captions
from tiny_training import make_columns, npy, write_tar

from repfusion.data.columns import manifest_digest, scan_tar, shard_names
from repfusion.data.config import DataConfig
from repfusion.data.mixture import Mixture

TEXT = "prompt_features"


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, Path]:
    return {
        name: make_columns(tmp_path / name, 10, seed=i) for i, name in enumerate(("main", "photos", "art"))
    }


def folders(root: Path, **changes) -> dict:
    columns = {"image_features": root / "image_features", **changes.pop("columns", {})}
    return {"images": root / "curate", "columns": columns, **changes}


def open_mix(roots: dict[str, Path], main: dict | None = None, **mix: dict) -> Mixture:
    parts = {name: folders(roots[name], **changes) for name, changes in mix.items()}
    return Mixture.open(DataConfig(**folders(roots["main"], **(main or {})), mix=parts), READERS)


def say_made_with(column: Path, **fields) -> None:
    (column / "manifest.json").write_text(json.dumps({"fields": fields, "seconds": 1.5}))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"file": sorted(path.name for path in column.glob("*.tar"))}), column / "shards.parquet"
    )


def test_a_mixture_says_what_it_holds(roots: dict[str, Path]):
    say_made_with(roots["photos"] / "image_features", **{"train.model.encoder.layer": -2})
    mixture = open_mix(roots, {"weight": 2.0}, photos={"weight": 0.5})
    assert (len(mixture), mixture.num_samples) == (20, {"main": 10, "photos": 10})
    assert mixture.forms == {"image_features": ((4, 16), np.dtype("float16"))}
    assert mixture.folders["photos"] == {
        "images": roots["photos"] / "curate",
        "image_features": roots["photos"] / "image_features",
    }
    digest = manifest_digest(roots["photos"] / "image_features")
    assert digest is not None and mixture.identity == {
        name: {
            "num_samples": 10,
            "digests": {"images": None, "image_features": named},
            "weight": weight,
            "caption_weights": {"txt": 1.0},
        }
        for name, named, weight in (("main", None, 2.0), ("photos", digest, 0.5))
    }
    assert json.loads(json.dumps(mixture.identity)) == mixture.identity
    assert (mixture.label("main", "7"), mixture.label("photos", "7")) == ("7", "photos/7")


def test_the_cache_is_shared_by_weight(roots: dict[str, Path]):
    mixture = open_mix(roots, {"weight": 3.0, "cache_bytes": 1000}, photos={"weight": 1.0})
    assert {name: dataset.cache_bytes for name, dataset in mixture.datasets.items()} == {
        "main": 750,
        "photos": 250,
    }


@pytest.mark.parametrize(("width", "dtype"), [(8, np.float16), (16, np.float32)])
def test_features_of_another_shape_or_dtype_are_refused(roots: dict[str, Path], width: int, dtype: type):
    column = roots["photos"] / "image_features"
    for name in shard_names(column):
        keys = [member.split(".")[0] for member in scan_tar(column / name)]
        write_tar(
            column / name, [(key, {"image_features.npy": npy(np.zeros((4, width), dtype))}) for key in keys]
        )
    with pytest.raises(
        ValueError,
        match=rf"data set 'photos': image_features in {column} are \(4, {width}\) float.., those of 'main' "
        r"in .*main/image_features are \(4, 16\) float16; mix columns of one model and size: re-run the ",
    ):
        open_mix(roots, art={}, photos={})


def test_features_of_another_encoder_are_refused_by_their_manifests(roots: dict[str, Path]):
    for name, layer in (("main", -2), ("art", -2), ("photos", -1)):
        fields = {"train.model.encoder.layer": layer, "train.model.mllm_dtype": name, "latents.other": name}
        say_made_with(roots[name] / "image_features", **fields)
    open_mix(roots, art={}).close()
    with pytest.raises(
        ValueError,
        match=r"'photos': .*photos/image_features was made with encoder\.layer -1, .* with -2",
    ):
        open_mix(roots, art={}, photos={})


def test_text_features_are_those_of_all_or_of_none(roots: dict[str, Path]):
    both = {
        name: {"columns": {"prompt_features": roots[name] / "prompt_features"}} for name in ("main", "photos")
    }
    assert open_mix(roots, both["main"], photos=both["photos"]).datasets["photos"].widths == {
        "prompt_features": 32
    }
    with pytest.raises(ValueError, match="data set 'photos' has no column prompt_features, 'main' has; give"):
        open_mix(roots, both["main"], photos={})
    with pytest.raises(ValueError, match="data set 'main' has no column prompt_features, 'photos' has"):
        open_mix(roots, photos=both["photos"])
    column = roots["photos"] / "prompt_features"
    for name in shard_names(column):
        keys = [member.split(".")[0] for member in scan_tar(column / name)]
        write_tar(
            column / name, [(key, {"prompt_features.npy": npy(np.zeros((4, 8), np.float16))}) for key in keys]
        )
    with pytest.raises(ValueError, match="'photos': prompt_features are 8 wide, those of 'main' 32; mix"):
        open_mix(roots, both["main"], photos=both["photos"])


def test_each_data_set_has_captions_of_its_own(tmp_path: Path):
    captioned = add_captions(make_columns(tmp_path / "photos"))
    roots = {"main": make_columns(tmp_path / "main"), "photos": captioned}
    photos = {
        "columns": {"captions": captioned / "captions"},
        "caption_weights": {"txt": 1.0, "long.txt": 2.0},
    }
    mixture = open_mix(roots, photos=photos)
    assert mixture.datasets["main"].weights == {"txt": 1.0}
    assert mixture.identity["photos"]["caption_weights"] == {"long.txt": 2.0, "txt": 1.0}


@pytest.mark.parametrize(
    ("main", "mix", "message"),
    [
        ({}, {"main": {}}, "mix: 'main' cannot name a data set"),
        ({}, {"a/b": {}}, "mix: 'a/b' cannot name a data set; expected letters"),
        (
            {"weight": 2000.0},
            {"photos": {}},
            "data set 'photos' has weight 1, less than 1/1024 of the sum 2001",
        ),
        ({}, {"photos": {"weight": 0.0}}, "data set 'photos' has weight 0.0; expected a number above 0"),
        ({}, {"photos": {"wieght": 1.0}}, r"mix\.photos\.wieght\n.*[Ee]xtra"),
        ({}, {"photos": {"caption_weights": {"x": 1.0}}}, "'x' names no caption"),
    ],
)
def test_configurations_that_do_not_hold(main: dict, mix: dict[str, dict], message: str):
    parts = {name: folders(Path("b"), **changes) for name, changes in mix.items()}
    with pytest.raises(ValidationError, match=message):
        DataConfig(**folders(Path("a"), **main), mix=parts)
