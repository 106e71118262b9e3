"""Scenes to features on a real local Ray: exact counts, nothing done twice, the same bytes whoever works."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines import store
from pipelines.stages import build_stages
from pipelines.store import Manifest
from pipelines.workflow import run, states

pytestmark = pytest.mark.ray
DATA_STAGES = ["source", "ingest", "curate", "latents", "features"]


def run_all(config, pool) -> tuple[dict[str, Manifest], list[str]]:
    said: list[str] = []
    config.root.mkdir(exist_ok=True)
    results = run(build_stages(config), config.root, config.ray, said.append, pool)
    return {result.name: result.manifest for result in results}, said


def data_bytes(root: Path) -> dict[str, bytes]:
    """Every data file, by its path under the root."""
    kinds = {".tar", ".parquet", ".safetensors"}
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.suffix in kinds
    }


def test_counts_columns_and_a_second_run(pool, make_config):
    config = make_config()
    manifests, said = run_all(config, pool)
    assert list(manifests) == DATA_STAGES
    assert manifests["source"].samples == 40
    # nothing lost: every entry of the list is a sample or a counted drop
    assert manifests["ingest"].drops == {"http_404": 2, "undecodable_image": 2}
    assert manifests["ingest"].samples == 36
    assert manifests["curate"].drops == {"empty_caption": 2}
    assert manifests["curate"].samples == manifests["latents"].samples == manifests["features"].samples == 34
    listed = [
        pq.read_table(path).to_pylist() for path in sorted((config.root / "ingest").glob("*.drops.parquet"))
    ]
    assert (
        sorted(row["reason"] for rows in listed for row in rows)
        == ["http_404"] * 2 + ["undecodable_image"] * 2
    )

    check_columns(config, manifests)

    before = {path: path.stat().st_mtime_ns for path in config.root.rglob("*") if path.is_file()}
    _, said = run_all(config, pool)
    assert said == [
        "source: fresh, skipped (4 shards, 40 samples)",
        "ingest: fresh, skipped (4 shards, 36 samples, dropped: http_404 2, undecodable_image 2)",
        "curate: fresh, skipped (4 shards, 34 samples, dropped: empty_caption 2)",
        "latents: fresh, skipped (4 shards, 34 samples)",
        "features: fresh, skipped (4 shards, 34 samples)",
    ]
    assert before == {path: path.stat().st_mtime_ns for path in config.root.rglob("*") if path.is_file()}


def check_columns(config, manifests: dict[str, Manifest]) -> None:
    """Same keys, same order; values are those of the models called directly; statistics are of what is
    stored.
    """
    import io

    import torch
    from PIL import Image

    from repfusion.conditioning.text_embed import encode_text
    from repfusion.mllm import MLLM
    from repfusion.rae.encoder import RepresentationEncoder
    from repfusion.rae.statistics import LatentStatistics

    encoder = RepresentationEncoder.from_pretrained(config.train.model.encoder.path)
    mllm = MLLM.from_pretrained(config.train.model.mllm)
    stored = []
    for shard in manifests["curate"].shards:
        images, latents, features = (
            list(
                store.read_samples(
                    config.root / stage / f"{shard.name}.tar", manifests[stage].shards[int(shard.name)]
                )
            )
            for stage in ("curate", "latents", "features")
        )
        assert [key for key, _ in images] == [key for key, _ in latents] == [key for key, _ in features]
        for (key, members), (_, latent), (_, feature) in zip(images, latents, features, strict=True):
            pixels = np.array(Image.open(io.BytesIO(members["png"])))
            original = Image.open(config.root / "source" / "images" / shard.name / f"{key}.png")
            assert np.array_equal(pixels, np.asarray(original)), key
            row = np.load(io.BytesIO(latent["features.npy"]))
            stored.append(row)
            with torch.no_grad():
                expected = encoder(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)[0]
            assert row.dtype == np.float16 and np.abs(row - expected.numpy()).max() < 5e-3
            text = np.load(io.BytesIO(feature["text.npy"]))
            expected = encode_text(mllm, [members["txt"].decode()])[0].numpy()
            assert text.shape == expected.shape and np.abs(text - expected).max() < 5e-3
    statistics = LatentStatistics.load(config.root / "latents" / "statistics.safetensors")
    values = np.stack(stored).astype(np.float64)
    assert statistics.count == 34
    np.testing.assert_allclose(statistics.mean.numpy(), values.mean(0), atol=1e-12)
    np.testing.assert_allclose(statistics.var.numpy(), values.var(0), atol=1e-12)


def test_one_or_two_actors_and_a_restart_give_the_same_bytes(pool, make_config):
    actors = {stage: {"actors": {"num_actors": 1}} for stage in DATA_STAGES}
    one = make_config("one", **actors)
    two = make_config("two", **{stage: {"actors": {"num_actors": 2}} for stage in DATA_STAGES})
    digests = {name: manifest.digest for name, manifest in run_all(one, pool)[0].items()}
    assert {name: manifest.digest for name, manifest in run_all(two, pool)[0].items()} == digests
    expected = data_bytes(one.root)
    assert data_bytes(two.root) == expected

    # as if killed midway: no manifest, a shard without its sidecar, half a shard under a temporary name
    latents = two.root / "latents"
    (latents / "manifest.json").unlink()
    (latents / "00002.json").unlink()
    (latents / ".00003.x.tmpdir").mkdir()
    kept = (latents / "00001.tar").stat().st_mtime_ns
    assert states(build_stages(two), two.root)["latents"].reason == "1 of 4 shards to do: 00002 missing"
    run_all(two, pool)
    assert data_bytes(two.root) == expected
    assert (latents / "00001.tar").stat().st_mtime_ns == kept
    assert not list(latents.glob(".*.tmp*"))

    # other numbers of actors and batch sizes are no other data
    assert {state.status for state in states(build_stages(two), two.root).values()} == {"fresh"}
    more = make_config(
        "two", latents={"batch_size": 7, "actors": {"num_actors": 3}}, ingest={"num_threads": 2}
    )
    assert {state.status for state in states(build_stages(more), two.root).values()} == {"fresh"}


def test_a_changed_field_is_named_and_only_what_follows_is_rebuilt(pool, make_config):
    small = {"source": {"scenes": {"num_samples": 20, "defects": {}}}}
    run_all(make_config(**small), pool)
    changed = make_config(**small, curate={"max_caption_chars": 60})
    found = states(build_stages(changed), changed.root)
    assert [found[name].status for name in DATA_STAGES] == ["fresh", "fresh", "stale", "stale", "stale"]
    for name in ("curate", "latents", "features"):
        assert found[name].reason == "curate.max_caption_chars 1000 -> 60"
    _, said = run_all(changed, pool)
    assert "curate: stale: curate.max_caption_chars 1000 -> 60" in said
    assert [line.split(":")[0] for line in said if "skipped" in line] == ["source", "ingest"]

    fewer = make_config(
        **small | {"curate": {"max_caption_chars": 60}, "train": {"model": {"encoder": {"layer": -1}}}}
    )
    found = states(build_stages(fewer), fewer.root)
    assert found["latents"].reason == "train.model.encoder.layer -2 -> -1"
    assert found["features"].status == "fresh"


def test_other_weights_make_a_column_stale(pool, make_config, models, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    tower = tmp_path / "tower"
    shutil.copytree(models["tower"], tower)
    settings = {
        "source": {"scenes": {"num_samples": 10, "defects": {}}},
        "train": {"model": {"encoder": {"path": tower}}},
        "last_stage": "latents",
    }
    config = make_config(**settings)
    run_all(config, pool)
    # the same bytes elsewhere are the same encoder
    settings["train"] = {"model": {"encoder": {"path": models["tower"]}}}
    assert states(build_stages(make_config(**settings)), config.root)["latents"].status == "fresh"
    tensors = load_file(tower / "model.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, tower / "model.safetensors", metadata={"format": "pt"})
    state = states(build_stages(config), config.root)["latents"]
    assert state.status == "stale" and state.reason.startswith("train.model.encoder.path ")
