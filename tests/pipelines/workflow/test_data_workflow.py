"""Scenes to features on a real local Ray: exact counts, nothing done twice, the same bytes whoever works."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from running import DATA_STAGES, data_files, file_times, found, manifests, ran, run_all, statuses

from pipelines.shards.tars import read_samples
from repfusion.llm.load import load_language_model

pytestmark = pytest.mark.ray
CAPTION_CHARS = "curate.max_caption_chars 1000 -> 60"


def test_counts_columns_and_a_second_run(pool, make_config):
    config = make_config()
    results, _ = run_all(config, pool)
    made = manifests(results)
    assert list(made) == DATA_STAGES
    # nothing lost: every entry of the list is a sample or a counted drop
    assert made["ingest"].drops == {"http_404": 2, "undecodable_image": 2}
    assert made["curate"].drops == {"empty_caption": 2}
    assert [one.samples for one in made.values()] == [40, 36, 36, 34, 34, 34]
    listed = [
        pq.read_table(path).to_pylist() for path in sorted((config.root / "ingest").glob("*.drops.parquet"))
    ]
    assert (
        sorted(row["reason"] for rows in listed for row in rows)
        == ["http_404"] * 2 + ["undecodable_image"] * 2
    )

    check_columns(config, results)

    before = file_times(config.root)
    _, said = run_all(config, pool)
    assert said == [
        "source: fresh, skipped (4 shards, 40 samples)",
        "ingest: fresh, skipped (4 shards, 36 samples, dropped: http_404 2, undecodable_image 2)",
        "judge: fresh, skipped (4 shards, 36 samples)",
        "curate: fresh, skipped (4 shards, 34 samples, dropped: empty_caption 2)",
        "image_features: fresh, skipped (4 shards, 34 samples)",
        "prompt_features: fresh, skipped (4 shards, 34 samples)",
    ]
    assert before == file_times(config.root)


def check_columns(config, results) -> None:
    """Same keys, same order; values are those of the models called directly; statistics are of what is
    stored.
    """
    import torch
    from PIL import Image

    from repfusion.conditioning.text_embed import encode_text
    from repfusion.latents.statistics import LatentStatistics
    from repfusion.latents.tower import RepresentationEncoder

    encoder = RepresentationEncoder.from_pretrained(config.trainings["train"].model.encoder.path)
    mllm = load_language_model(config.trainings["train"].model.mllm)
    stored = []
    for index, name in enumerate(results["curate"].output.shards.names):
        images, latents, features = (
            list(read_samples(output.folder, f"{name}.tar", output.shards[index]))
            for output in (results[stage].output for stage in ("curate", "image_features", "prompt_features"))
        )
        assert [key for key, _ in images] == [key for key, _ in latents] == [key for key, _ in features]
        drawn = dict(read_samples(config.data_folder / "source", f"{name}.images.tar"))
        for (key, members), (_, latent), (_, feature) in zip(images, latents, features, strict=True):
            pixels = np.array(Image.open(io.BytesIO(members["png"])))
            original = Image.open(io.BytesIO(drawn[key]["png"]))
            assert np.array_equal(pixels, np.asarray(original)), key
            row = np.load(io.BytesIO(latent["image_features.npy"]))
            stored.append(row)
            with torch.no_grad():
                expected = encoder(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)[0]
            assert row.dtype == np.float16 and np.abs(row - expected.numpy()).max() < 5e-3
            if (reference := feature.get("prompt_features.ref")) is not None:  # a caption that returns
                home, member = reference.decode().split(".", 1)
                feature = dict(features)[home] | {"prompt_features.npy": dict(features)[home][member]}
            text = np.load(io.BytesIO(feature["prompt_features.npy"]))
            expected = encode_text(mllm, mllm.tokenise([members["txt"].decode()]))[0].numpy()
            assert text.shape == expected.shape and np.abs(text - expected).max() < 5e-3
    statistics = LatentStatistics.load(config.root / "image_features" / "statistics.safetensors")
    values = np.stack(stored).astype(np.float64)
    assert statistics.count == 34
    np.testing.assert_allclose(statistics.mean.numpy(), values.mean(0), atol=1e-12)
    np.testing.assert_allclose(statistics.var.numpy(), values.var(0), atol=1e-12)


@pytest.mark.slow
def test_one_or_two_actors_and_a_restart_give_the_same_bytes(pool, make_config):
    def sections(number: int) -> dict[str, dict]:
        actors = {"actors": {"num_actors": number}}
        columns = dict.fromkeys(("image_features", "prompt_features"), actors)
        return {"source": actors, "ingest": actors, "curate": actors, "columns": columns}

    one, two = make_config("one", **sections(1)), make_config("two", **sections(2))
    run_all(one, pool)
    run_all(two, pool)
    expected = data_files(one.data_folder)
    assert data_files(two.data_folder) == expected

    # as if killed midway: no manifest, a shard without its sidecar, half a shard under a temporary name
    latents = two.root / "image_features"
    (latents / "manifest.json").unlink()
    (latents / "00002.json").unlink()
    (latents / ".00003.x.tmp").mkdir()
    kept = (latents / "00001.tar").stat().st_mtime_ns
    assert found(two)["image_features"].reason == "1 of 4 shards to do: 00002 missing"
    run_all(two, pool)
    assert data_files(two.data_folder) == expected
    assert (latents / "00001.tar").stat().st_mtime_ns == kept
    assert not list(latents.glob(".*.tmp"))


def test_a_changed_field_is_named_and_only_what_follows_is_rebuilt(pool, make_config):
    small = {"source": {"num_samples": 20, "defects": {}}}
    run_all(make_config(**small), pool)
    changed = make_config(**small, curate={"max_caption_chars": 60})
    for name, state in found(changed).items():
        expected = ("fresh", "") if name in ("source", "ingest") else ("stale", CAPTION_CHARS)
        assert (state.status, state.reason) == expected
    results, said = run_all(changed, pool)
    assert f"judge: stale: {CAPTION_CHARS}" in said
    assert ran(results) == ["judge", "curate", "image_features", "prompt_features"]

    fewer = make_config(
        **small
        | {"curate": {"max_caption_chars": 60}, "trainings": {"train": {"model": {"encoder": {"layer": -1}}}}}
    )
    assert found(fewer)["image_features"].reason == "columns.image_features.encoder.layer -2 -> -1"
    assert found(fewer)["prompt_features"].status == "fresh"


def test_other_weights_make_a_column_stale(pool, make_config, models, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    tower = tmp_path / "tower"
    shutil.copytree(models["tower"], tower)
    settings = {
        "source": {"num_samples": 10, "defects": {}},
        "trainings": {"train": {"model": {"encoder": {"path": tower}}}},
        "last_stage": "image_features",
    }
    config = make_config(**settings)
    run_all(config, pool)
    # the same bytes elsewhere are the same encoder
    settings["trainings"] = {"train": {"model": {"encoder": {"path": models["tower"]}}}}
    assert statuses(make_config(**settings))["image_features"] == "fresh"
    tensors = load_file(tower / "model.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, tower / "model.safetensors", metadata={"format": "pt"})
    state = found(config)["image_features"]
    assert state.status == "stale" and state.reason.startswith("columns.image_features.encoder.path ")
