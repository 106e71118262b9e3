"""A list of addresses with a known number of bad entries of every kind, through the whole data workflow: each
entry ends as a sample in every column or as a counted drop with its reason.
"""

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_server import Handler, Server, hangs, never_ends, running
from PIL import Image
from running import manifests, run_all

from pipelines.shards.store import sample_key
from pipelines.shards.tars import read_samples

pytestmark = pytest.mark.ray

NUM_HEALTHY = 40
BAD = {
    "http_404": 3,
    "http_500": 2,
    "robots_disallowed": 1,
    "timeout": 1,
    "too_many_bytes": 1,
    "too_many_pixels": 1,
    "undecodable_image": 5,
    "image_too_small": 2,
    "bad_aspect": 3,
    "empty_caption": 4,
    "caption_too_short": 2,
    "caption_too_long": 1,
    "exact_duplicate": 3,
    "near_duplicate": 2,
}
"""Entries by the reason for which they have to go."""
IN_INGEST = set(list(BAD)[:7])


@dataclass
class Entry:
    path: str
    caption: str = "a red circle"
    reason: str | None = None
    duplicate_of: str = ""
    """Path of the entry that it repeats."""


def blobs(seed: int, size: tuple[int, int] = (48, 48), kind: str = "PNG") -> bytes:
    """Pictures that are nothing like each other, also to a perceptual hash."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


def add_page(server: Server, reason: str | None, number: int) -> Entry:
    """Serves one more entry, which has to go for the reason."""
    seed = len(server.pages) + 1000
    entry = Entry(f"{reason}-{number}.png", reason=reason)
    data, headers, status = blobs(seed), {}, 200
    match reason:
        case "http_404":
            return entry
        case "timeout":
            server.pages[entry.path] = hangs
            return entry
        case "too_many_bytes":
            server.pages[entry.path] = never_ends
            return entry
        case "http_500":
            status = 500
        case "robots_disallowed":
            headers = {"X-Robots-Tag": "noai"}
        case "too_many_pixels":
            data = blobs(seed, (400, 300))
        case "undecodable_image":
            data = [b"<html>gone</html>", b"", data[: len(data) // 2], b"GIF89a", bytes(500)][number]
        case "image_too_small":
            data = blobs(seed, (12, 20))
        case "bad_aspect":
            data = blobs(seed, (100, 20))
        case "empty_caption":
            entry.caption = ["", "  ", "\n", "\t"][number]
        case "caption_too_short":
            entry.caption = "ab"
        case "caption_too_long":
            entry.caption = "a red circle " * 20
        case "exact_duplicate" | "near_duplicate":
            entry.duplicate_of = f"None-{number}.png"
            entry.caption = "another caption"
            exact = reason == "exact_duplicate"
            data = blobs(number, kind="PNG" if exact else "WEBP")

    def page(handler: Handler) -> None:
        handler.reply(data, status, **headers)

    server.pages[entry.path] = page
    return entry


def add_all(server: Server) -> list[Entry]:
    """Every entry of the list; what repeats another comes after it, in whichever shard."""
    entries = [Entry(f"None-{number}.png") for number in range(NUM_HEALTHY)]
    for number, entry in enumerate(entries):
        data = blobs(number)
        server.pages[entry.path] = lambda handler, data=data: handler.reply(data)
    entries += [add_page(server, reason, number) for reason, times in BAD.items() for number in range(times)]
    order = np.random.default_rng(0).permutation(len(entries))
    mixed = [entries[index] for index in order]
    return sorted(mixed, key=lambda entry: bool(entry.duplicate_of))


def test_every_entry_is_a_sample_or_a_drop_with_its_reason(pool, make_config, tmp_path):
    with running() as server:
        entries = add_all(server)
        listed = {
            "url": [server.address + entry.path for entry in entries],
            "caption": [entry.caption for entry in entries],
        }
        pq.write_table(pa.table(listed), tmp_path / "list.parquet")
        config = make_config(
            source={"kind": "urls", "path": str(tmp_path / "list.parquet"), "shard_size": 13},
            ingest={
                "allow_private_addresses": True,
                "timeout_sec": 5,
                "retries": 0,
                "max_pixels": 100_000,
                "max_download_bytes": 1 << 20,
                "max_drop_fraction": 0.9,
            },
            curate={
                "max_aspect": 3,
                "min_caption_chars": 3,
                "max_caption_chars": 200,
                "duplicates": "near",
                "max_drop_fraction": 0.9,
            },
        )
        results, _ = run_all(config, pool)
    made = manifests(results)
    assert made["source"].samples == len(entries) == NUM_HEALTHY + sum(BAD.values())
    assert made["ingest"].drops == {reason: BAD[reason] for reason in IN_INGEST}
    raw = len(entries) - sum(BAD[reason] for reason in IN_INGEST)
    assert made["ingest"].samples == made["judge"].samples == raw
    assert made["curate"].drops == {reason: BAD[reason] for reason in BAD.keys() - IN_INGEST}

    keys = {entry.path: sample_key(index) for index, entry in enumerate(entries)}
    dropped = {}
    for stage in ("ingest", "curate"):
        for path in (config.root / stage).glob("*.drops.parquet"):
            dropped |= {row["key"]: (row["reason"], row["detail"]) for row in pq.read_table(path).to_pylist()}
    assert {key: reason for key, (reason, _) in dropped.items()} == {
        keys[entry.path]: entry.reason for entry in entries if entry.reason is not None
    }
    for entry in entries:
        if entry.duplicate_of:
            assert dropped[keys[entry.path]][1] == f"duplicate of {keys[entry.duplicate_of]}"
    healthy = sorted(keys[entry.path] for entry in entries if entry.reason is None)
    for stage in ("curate", "image_features", "prompt_features"):
        stored = [
            key
            for shard in results[stage].output.shards
            for key, _ in read_samples(results[stage].output.folder, shard.file, shard)
        ]
        assert stored == healthy, stage
