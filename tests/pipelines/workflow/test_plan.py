"""What a plan says before a run, and what the run then writes."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hostile_server import running, shows
from PIL import Image
from running import DATA_STAGES, found, manifests, run_all

from pipelines.build import data_stages, probe_stages, source_entries
from pipelines.commands import print_plan
from pipelines.workflow.plan import StagePlan, plan, table

pytestmark = pytest.mark.ray
TOLERANCE = 0.1
SMALL_BYTES = 100_000
"""A stage that is smaller is judged as part of the whole alone."""


def planned(config, **options) -> dict[str, StagePlan]:
    plans = plan(data_stages(config), lambda: source_entries(config), probe_stages(config), **options)
    return {one.name: one for one in plans}


def check(plans: dict[str, StagePlan], results) -> None:
    """Within 10%, in all and for every stage that is not small."""
    actual = {name: manifest.bytes for name, manifest in manifests(results).items()}
    errors = {name: plans[name].bytes / size - 1 for name, size in actual.items()}
    total = sum(one.bytes for one in plans.values()) / sum(actual.values()) - 1
    print(
        {name: f"{100 * error:+.1f}% of {actual[name]:,}" for name, error in errors.items()}, f"{total:+.3f}"
    )
    assert abs(total) < TOLERANCE, errors
    for name, error in errors.items():
        assert actual[name] < SMALL_BYTES or abs(error) < TOLERANCE, (name, error)
    for name, manifest in manifests(results).items():
        assert plans[name].num_shards == manifest.num_shards
        assert plans[name].samples == pytest.approx(manifest.samples, rel=0.05, abs=3)


@pytest.mark.slow
def test_scenes_are_planned_within_a_tenth(pool, make_config):
    config = make_config(
        source={
            "shard_size": 250,
            "num_samples": 2000,
            "defects": {"missing": 20, "undecodable": 20, "empty_caption": 40},
        },
    )
    plans = planned(config)
    assert {one.status for one in plans.values()} == {"missing"}
    assert (
        plans["image_features"].num_todo == 8
        and plans["image_features"].bytes == plans["image_features"].bytes_todo
    )
    results, _ = run_all(config, pool)
    check(plans, results)


def photo(rng: np.random.Generator) -> bytes:
    """A JPEG of 200 to 400 px a side: a gradient under noise of a strength of its own."""
    width, height = (int(side) for side in rng.integers(200, 401, 2))
    corners = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    base = Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.normal(0, rng.uniform(0, 40), (height, width, 3))
    pixels = (np.asarray(base) + noise).clip(0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=int(rng.integers(60, 95)))
    return stream.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [None, 64])
def test_photos_of_all_sizes_are_planned_within_a_tenth(pool, configure, tmp_path, image_size):
    number = 600
    rng = np.random.default_rng(1)
    with running() as server, (tmp_path / "list.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["url", "caption"])
        for index in range(number):
            if index % 50:
                server.pages[f"{index}.jpg"] = shows(photo(rng))
            words = " ".join(["a red circle"] * int(rng.integers(1, 8)))
            writer.writerow([f"{server.address}{index}.jpg", words])
        stream.flush()
        config = configure(
            tmp_path / "run",
            source={"kind": "urls", "path": stream.name, "shard_size": 100},
            ingest={
                "allow_private_addresses": True,
                "encode": "jpg",
                "quality": 90,
                "image_size": image_size,
                "retries": 0,
            },
        )
        plans = planned(config)
        assert sum(server.requests.values()) < number / 2
        results, _ = run_all(config, pool)
    check(plans, results)


def test_what_is_complete_is_taken_as_it_is(run_copy, configure):
    plans = planned(run_copy)
    for name, state in found(run_copy).items():
        manifest = state.output.manifest
        one = plans[name]
        assert (one.status, one.samples, one.bytes) == ("fresh", manifest.samples, manifest.bytes)
        assert (one.num_shards, one.num_todo, one.bytes_todo, one.seconds_todo) == (4, 0, 0, 0.0)
    text = table(list(plans.values()))
    assert [line.split()[0] for line in text.splitlines()] == ["stage", *DATA_STAGES, "total"]


def test_what_is_partial_counts_what_is_there(run_copy):
    complete = planned(run_copy)
    (run_copy.root / "image_features" / "00001.json").unlink()
    plans = planned(run_copy, num_samples=16)
    latents = plans["image_features"]
    assert (latents.status, latents.num_shards, latents.num_todo) == ("partial", 4, 1)
    assert latents.bytes_todo < latents.bytes / 2 and latents.seconds_todo > 0
    assert latents.bytes == pytest.approx(complete["image_features"].bytes, rel=TOLERANCE)
    assert plans["prompt_features"].status == "fresh" and plans["prompt_features"].num_todo == 0


def test_a_given_rate_takes_the_place_of_the_probes(make_config, capsys):
    config = make_config()
    plans = planned(config, num_samples=8, samples_per_sec={"image_features": 0.5})
    assert plans["image_features"].seconds_todo == pytest.approx(plans["curate"].samples / 0.5, rel=0.01)
    assert plans["prompt_features"].seconds_todo < plans["image_features"].seconds_todo
    with pytest.raises(ValueError, match=r"--rate latent=3: expected STAGE=SAMPLES_PER_SEC"):
        print_plan(config, 8, ["latent=3"])
    for rate in (
        "image_features=0",
        "image_features=-1",
        "image_features=fast",
        "image_features=nan",
        "image_features=inf",
        "image_features",
    ):
        with pytest.raises(ValueError, match=f"--rate {rate}: expected"):
            print_plan(config, 8, [rate])
    assert not config.root.exists() or not any(config.root.glob("*/stage.json"))


def test_a_probe_that_fails_says_why(make_config, tmp_path):
    small = make_config(ingest={"image_size": 16})
    with pytest.raises(
        ValueError, match=r"image is 16 x 16 px, smaller than the 32 x 32.*ingest.image_size=32"
    ):
        planned(small, num_samples=8)
    missing = make_config(trainings={"train": {"model": {"encoder": {"path": tmp_path / "none"}}}})
    with pytest.raises(ValueError, match=r"trainings.train.model.encoder.path: .*none is no folder"):
        planned(missing, num_samples=8)


def test_a_source_that_gives_nothing_is_an_error(configure, tmp_path):
    """All downloads fail: sizes of nothing would be no plan."""
    (tmp_path / "list.csv").write_text("url,caption\n" + "http://127.0.0.1:9/a.png,a circle\n" * 40)
    config = configure(
        tmp_path / "run",
        source={"kind": "urls", "path": str(tmp_path / "list.csv"), "shard_size": 10},
        ingest={"allow_private_addresses": True, "retries": 0, "timeout_sec": 1},
    )
    with pytest.raises(ValueError, match=r"stage ingest: of the probe's \d+ samples none is left \(.+ \d+\)"):
        planned(config, num_samples=8)


def test_a_plan_leaves_nothing_behind(make_config, tmp_path: Path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    planned(make_config(last_stage="curate"), num_samples=8)
    assert list((tmp_path / "scratch").iterdir()) == []
