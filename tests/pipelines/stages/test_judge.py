"""What `judge` says of a sample, and what it recognises an image by."""

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from image_forms import POSTSCRIPT, jpeg_of_scans
from PIL import Image, ImageFilter

from pipelines.runtime.pool import ShardJob
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError
from pipelines.shards.tars import tar_shard
from pipelines.stages.curate import CurateConfig, judge_fields
from pipelines.stages.judge import JudgeWorker, judge, perceptual_hash
from repfusion.llm.tokenizer import CaptionLimit
from repfusion.weights import WEIGHTS


def encode(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int = 32, height: int = 32) -> bytes:
    return encode(Image.new("RGB", (width, height), (90, 90, 90)))


def photo(seed: int = 0, side: int = 64) -> Image.Image:
    """Soft random blobs: like a photograph, most of it in the low frequencies."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def write_shard(folder: Folder, name: str, samples: dict[str, dict[str, bytes]]) -> None:
    with ShardCommit(folder, name, "f", {}) as commit:
        with tar_shard(commit) as tar:
            for key, members in samples.items():
                tar.write(key, members)
        commit.commit(f"{name}.tar")


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({}, None, ""),
        ({"png": b"no image"}, "undecodable_image", "no known format"),
        ({"png": encode(photo())[:-200]}, "undecodable_image", None),
        ({"png": png()[:20]}, "undecodable_image", None),
        ({"png": encode(photo(), "GIF")}, None, ""),
        (
            {"png": POSTSCRIPT},
            "undecodable_image",
            "no known format",
        ),
        ({"png": jpeg_of_scans(101)}, "too_many_scans", "a JPEG of more than 100 scans"),
        ({"png": png(101, 100)}, "too_many_pixels", "101 x 100 px; max_pixels 10,000"),
        ({"png": png(8, 30)}, "image_too_small", "shortest side 8 px, at least 16"),
        ({"json": b'{"original_width": 9, "original_height": 50}'}, "image_too_small", None),
        ({"png": png(20, 61)}, "bad_aspect", "20 x 61, at most 3 to 1"),
        ({"json": b'{"original_width": 200, "original_height": 601}'}, "bad_aspect", None),
        ({"json": b'{"original_width": 200, "original_height": 600}'}, None, ""),
        ({"json": b'{"original_width": 9, "original_height": null}'}, None, ""),
        ({"json": b"{"}, "undecodable_metadata", None),
        ({"json": b"[1]"}, "undecodable_metadata", "a JSON list, an object is expected"),
        ({"json": b"\xff{}"}, "undecodable_metadata", None),
        ({"txt": b"  \n"}, "empty_caption", ""),
        ({"txt": b"ab"}, "caption_too_short", "2 characters, at least 3"),
        ({"txt": b"a" * 99}, "caption_too_long", "99 characters, at most 50"),
        ({"txt": b"\xff\xfe"}, "undecodable_caption", None),
        ({"png": None}, "no_image", "members: json, txt"),
        ({"txt": None}, "no_caption", "members: json, png"),
    ],
)
def test_reasons(change, reason, detail):
    members = {"png": png(), "txt": b"a red circle", "json": b"{}"} | change
    config = CurateConfig(min_caption_chars=3, max_caption_chars=50, max_aspect=3, max_pixels=10_000)
    verdict = judge({name: data for name, data in members.items() if data is not None}, config)
    assert verdict.reason == reason
    assert detail is None or verdict.detail == detail
    assert " 0x" not in verdict.detail.replace("byte 0x", ""), (
        "an address in memory is another one in each process"
    )


def test_a_verdict_holds_the_original_size_and_the_images_digest():
    members = {"webp": encode(photo(), "WEBP"), "txt": b"blobs"}
    assert judge(members, CurateConfig()).hash is None
    verdict = judge(members, CurateConfig(duplicates="near"))
    assert (verdict.width, verdict.height, verdict.hash) == (
        64,
        64,
        perceptual_hash(Image.open(io.BytesIO(members["webp"]))),
    )
    assert verdict.digest == hashlib.sha256(members["webp"]).digest()[:16]
    members["json"] = b'{"original_width": 640, "original_height": 480}'
    verdict = judge(members, CurateConfig())
    assert (verdict.width, verdict.height) == (640, 480)


def distance(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def test_the_hash_survives_what_leaves_an_image_alike():
    image = photo()
    original = perceptual_hash(image)
    changed = [
        image.resize((48, 48), Image.Resampling.BICUBIC),
        Image.open(io.BytesIO(encode(image, "JPEG", quality=60))),
        image.filter(ImageFilter.GaussianBlur(1)),
        image.point([min(255, round(20 + 0.8 * value)) for value in range(256)] * 3),
    ]
    assert max(distance(original, perceptual_hash(other)) for other in changed) <= 4
    others = [perceptual_hash(photo(seed)) for seed in range(1, 40)]
    assert min(distance(original, other) for other in others) >= 12


def test_the_hash_is_that_of_the_textbook():
    """scipy's DCT of the same thumbnail, thresholded by its median."""
    from scipy.fft import dctn

    for seed in range(20):
        image = photo(seed)
        grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
        low = dctn(grey, type=2)[:8, :8]
        bits = (low > np.median(low)).ravel()
        expected = int("".join("01"[int(bit)] for bit in bits), 2)
        # the cosines are rounded to whole numbers: a frequency right at the median may fall on its other side
        assert distance(perceptual_hash(image), expected) <= 2


def test_images_of_one_colour_have_one_hash():
    colours = [(0, 9, 0), (255, 255, 255), (90, 90, 90), (200, 30, 10)]
    assert {perceptual_hash(Image.new("RGB", (40, 50), colour)) for colour in colours} == {1 << 63}
    assert perceptual_hash(Image.new("RGB", (40, 50))) == 0


def test_a_shard_gives_a_row_for_each_sample(tmp_path):
    source, folder = Folder.at(tmp_path / "ingest"), Folder.at(tmp_path / "judge")
    good = {"png": png(), "txt": b"a red circle"}
    write_shard(source, "00000", {"000": good, "001": {**good, "png": b"no image"}, "002": {"txt": b"a"}})
    worker = JudgeWorker(folder, source, CurateConfig(duplicates="near"))
    sidecar = worker(ShardJob("00000", "g", {"ingest": "x"}))
    assert (sidecar.file, sidecar.samples, sidecar.drops, sidecar.files) == ("00000.parquet", 3, {}, {})
    rows = pq.read_table(tmp_path / "judge" / "00000.parquet").to_pylist()
    assert [(row["key"], row["reason"]) for row in rows] == [
        ("000", None),
        ("001", "undecodable_image"),
        ("002", "no_image"),
    ]
    assert rows[0]["hash"] == 1 << 63 and rows[1]["hash"] is rows[1]["width"] is rows[2]["digest"] is None


def test_an_empty_shard_gives_an_empty_table(tmp_path):
    source, folder = Folder.at(tmp_path / "ingest"), Folder.at(tmp_path / "judge")
    write_shard(source, "00000", {})
    assert JudgeWorker(folder, source, CurateConfig())(ShardJob("00000", "g")).samples == 0
    assert len(pq.read_table(tmp_path / "judge" / "00000.parquet")) == 0


def test_a_changed_byte_in_the_source_fails_the_shard(tmp_path):
    source, folder = Folder.at(tmp_path / "ingest"), Folder.at(tmp_path / "judge")
    write_shard(source, "00000", {"000": {"png": png(), "txt": b"a red circle"}})
    path = tmp_path / "ingest" / "00000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="not the sidecar's sha256"):
        JudgeWorker(folder, source, CurateConfig())(ShardJob("00000", "g"))
    assert not list((tmp_path / "judge").iterdir())


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(tmp_path):
    """Also the details of what cannot be decoded."""
    source = Folder.at(tmp_path / "ingest")
    samples = {f"{i:03d}": {"png": encode(photo(i)), "txt": b"blobs"} for i in range(8)}
    write_shard(source, "0", samples | {"900": {"png": b"no image", "txt": b"a"}})
    code = (
        "import sys\n"
        "from pipelines.stages.judge import JudgeWorker, CurateConfig\n"
        "from pipelines.shards.storage import Folder\n"
        "from pipelines.runtime.pool import ShardJob\n"
        "JudgeWorker(Folder.at(sys.argv[2]), Folder.at(sys.argv[1]), CurateConfig())(ShardJob('0', 'g'))\n"
    )
    for name in ("a", "b"):
        command = [sys.executable, "-c", code, str(source), str(tmp_path / name)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[3])
    assert (tmp_path / "a" / "0.parquet").read_bytes() == (tmp_path / "b" / "0.parquet").read_bytes()


def test_only_what_changes_bytes_is_in_the_fingerprint():
    fields = judge_fields(CurateConfig(), {})
    assert fields == judge_fields(CurateConfig(near_duplicate_bits=2, max_drop_fraction=1), {})
    near = CurateConfig(duplicates="near", near_duplicate_bits=2)
    assert judge_fields(near, {})["curate.near_duplicate_bits"] == 2
    assert fields["curate.duplicates"] == "exact" and "curate.max_aspect" in fields


LIMITS = (CaptionLimit(WEIGHTS / "llava", 7),)


@pytest.mark.parametrize(
    ("caption", "metadata", "detail"),
    [
        ("a red circle", {}, None),
        ("a red circle left of a blue square", {}, "8 tokens, at most 7 (curate.max_caption_tokens)"),
        ("a red circle", {"captions": ["a red circle", "red"]}, None),
        ("a red circle", {"captions": ["red", "a red circle left of a blue square"]}, "8 tokens, at most 7"),
        ("a red circle", {"captions": "a red circle left of a blue square"}, None),
        ("red</s></s>", {}, "9 tokens, at most 7"),  # no command, but characters
    ],
)
def test_a_caption_of_too_many_tokens_is_dropped_and_counted(caption, metadata, detail):
    """By the tokenizer of what reads it; a training draws the variants in its json too."""
    members = {"png": png(), "txt": caption.encode(), "json": json.dumps(metadata).encode()}
    verdict = judge(members, CurateConfig(), LIMITS)
    assert verdict.reason == (None if detail is None else "caption_too_many_tokens")
    assert verdict.detail.startswith(detail or "")
    assert judge(members, CurateConfig()).reason is None


def test_the_limits_are_in_the_fingerprint_where_there_are_any():
    with_limits = judge_fields(CurateConfig(), {"0123": LIMITS[0]})
    assert with_limits == judge_fields(CurateConfig(), {}) | {"curate.caption_limits": {"0123": 7}}


def edited(target: bytes, instruction: str, *sources: bytes) -> dict[str, bytes]:
    members = {"source.png": sources[0], **{f"source{i}.png": one for i, one in enumerate(sources[1:], 2)}}
    return {"png": target, "txt": instruction.encode(), "json": b"{}"} | members


BLUE = encode(Image.new("RGB", (32, 32), (9, 9, 200)))


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({}, None, ""),
        ({"source.png": b"no image"}, "broken_source", "source.png: [undecodable_image] no known format"),
        ({"source2.png": BLUE[:60]}, "broken_source", None),
        ({"source.png": encode(Image.new("RGB", (600, 600)))}, "broken_source", None),
        ({"source.png": encode(Image.new("RGB", (4, 4)))}, None, ""),
        (
            {"source3.png": BLUE, "source2.png": None},
            "missing_source",
            "no source image 2 beside source3.png",
        ),
        ({"source.png": None}, "missing_source", "no source image 1 beside source2.png"),
        ({"txt": b""}, "empty_caption", ""),
        ({"png": None}, "no_image", None),
    ],
)
def test_an_editing_sample_has_all_its_sources_or_is_dropped(change, reason, detail):
    members = edited(png(), "make it blue", BLUE, png()) | change
    verdict = judge({k: v for k, v in members.items() if v is not None}, CurateConfig(max_pixels=300_000))
    assert verdict.reason == reason and detail in (None, verdict.detail)


@pytest.mark.parametrize("duplicates", ["exact", "near"])
def test_the_same_target_is_a_duplicate_only_with_the_same_instruction_and_sources(duplicates):
    config = CurateConfig(duplicates=duplicates)
    target = encode(photo(3))
    one, again, otherwise, elsewhere, plain = (
        judge(members, config)
        for members in (
            edited(target, "make it blue", BLUE),
            edited(target, "make it blue", BLUE),
            edited(target, "make it green", BLUE),
            edited(target, "make it blue", encode(photo(4))),
            {"png": target, "txt": b"make it blue"},
        )
    )
    assert one == again
    assert len({verdict.digest for verdict in (one, otherwise, elsewhere, plain)}) == 4
    assert plain.digest == hashlib.sha256(target).digest()[:16]
    if duplicates == "near":
        assert plain.hash == perceptual_hash(photo(3))
        hashes = [verdict.hash for verdict in (one, otherwise, elsewhere, plain)]
        assert all((a ^ b).bit_count() > 8 for i, a in enumerate(hashes) for b in hashes[:i])


def test_like_targets_of_one_instruction_are_as_near_as_the_pictures():
    config = CurateConfig(duplicates="near")
    sharp, soft = photo(3), photo(3).filter(ImageFilter.GaussianBlur(1))
    one, two = (judge(edited(encode(image), "make it blue", BLUE), config) for image in (sharp, soft))
    assert one.hash is not None and two.hash is not None
    apart = (one.hash ^ two.hash).bit_count()
    assert apart == (perceptual_hash(sharp) ^ perceptual_hash(soft)).bit_count() <= 8


def test_sources_are_told_apart_by_their_order():
    config = CurateConfig()
    there, back = (judge(edited(png(), "swap them", *two), config) for two in ((BLUE, png()), (png(), BLUE)))
    assert there.digest != back.digest
