"""Readers of foreign bytes: for each, valid inputs, how they are spoilt, and how they are read."""

import csv
import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipelines.config import WorkflowConfig
from pipelines.shards.storage import Folder
from pipelines.shards.tars import read_samples
from pipelines.sources.folder import FolderConfig, FolderWorker
from pipelines.sources.folder import jobs as folder_jobs
from pipelines.sources.ingest import ImageFitter, IngestConfig
from pipelines.sources.raw_samples import BadEntry, SampleMaker
from pipelines.sources.tars import TarsConfig, TarWorker
from pipelines.sources.tars import jobs as tar_jobs
from pipelines.sources.urls import UrlList, UrlsConfig
from repfusion.config import load_config
from repfusion.data.columns import Column
from repfusion.files import bytes_sha256, digest_of, json_bytes
from repfusion.images.decode import read_image, read_pixels
from repfusion.images.limits import BadImage
from repfusion.lineage.trace import trace
from repfusion.runs.completion import SCHEMA, check_all
from tests.fuzz.mutate import mutate

INGEST = IngestConfig(image_size=16, max_drop_fraction=1, max_pixels=4_000_000, max_download_bytes=1 << 20)


@dataclass(frozen=True)
class Target:
    """A reader of bytes that others wrote."""

    seed: Callable[[Random], bytes]
    """A valid input."""
    read: Callable[[bytes, Path], None]
    """Reads one, in a scratch folder of its own. May raise ValueError, with a text."""
    spoil: Callable[[Random, bytes], bytes] = mutate

    def make(self, random: Random) -> bytes:
        """An input, mostly a spoilt one."""
        return self.spoil(random, self.seed(random))


def _fresh(scratch: Path) -> Path:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    return scratch


FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
MODES = {
    "PNG": ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"],
    "JPEG": ["RGB", "L", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["P", "L"],
    "BMP": ["RGB", "L", "P"],
    "TIFF": ["RGB", "L", "RGBA", "CMYK", "I;16", "F"],
    "AVIF": ["RGB", "RGBA"],
}


def picture(random: Random) -> bytes:
    """A small image of any format and mode."""
    kind = random.choice(FORMATS)
    mode = random.choice(MODES[kind])
    size = (random.randint(1, 40), random.randint(1, 40))
    noise = np.frombuffer(random.randbytes(size[0] * size[1] * 3), np.uint8).reshape(size[1], size[0], 3)
    image = Image.fromarray(noise)
    if mode in ("I;16", "F"):
        image = Image.fromarray(noise[..., 0].astype(np.uint16 if mode == "I;16" else np.float32))
    elif mode != "RGB":
        image = image.convert(mode)
    options: dict[str, object] = {}
    if random.random() < 0.3 and kind in ("PNG", "JPEG", "WEBP"):
        exif = Image.Exif()
        exif[0x0112] = random.randint(0, 9)
        options["exif"] = exif
    if kind == "JPEG":
        options["progressive"] = random.random() < 0.5
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def ingest_image(data: bytes, scratch: Path) -> None:
    """What one reader refuses, the others refuse."""
    keep = SampleMaker(INGEST.model_copy(update={"image_size": None}))
    try:
        image = read_image(data, INGEST.max_pixels)
    except BadImage as error:
        assert error.reason and error.detail
        image = None
    else:
        assert image.mode == "RGB" and (read_pixels(data) == np.asarray(image)).all()
    for ingest in (ImageFitter(INGEST), lambda found: keep("key", found, "caption", {})):
        try:
            ingest(data)
        except (BadImage, BadEntry) as error:
            assert error.reason and error.detail
            assert image is None or error.reason in ("too_many_pixels", "failed_to_resize"), str(error)
        else:
            assert image is not None


def foreign_tar(random: Random) -> bytes:
    stream = io.BytesIO()
    kind = random.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
        for index in range(random.randint(0, 4)):
            key = random.choice(
                [f"{index}", f"a/{index}", f"shot.{index}", "same", "x" * 120 * (kind != 0) or "x"]
            )
            for end, data in [
                ("png", picture(random)), ("txt", b"a caption"), ("json", b'{"a": [1, {"b": null}]}')
            ][: random.randint(1, 3)]:  # fmt: skip
                info = tarfile.TarInfo(f"{key}.{end}")
                info.size = len(data)
                if random.random() < 0.1:
                    info.type, info.linkname = random.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]), "same.png"
                    info.size = 0
                archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def spoil_tar(random: Random, data: bytes) -> bytes:
    """Half of the time, headers are changed and their checksums made right again: damage that looks sound."""
    if random.random() < 0.5:
        return mutate(random, data)
    changed = bytearray(data)
    for _ in range(random.randint(1, 3)):
        at = 512 * random.randrange(max(1, len(changed) // 512))
        header = bytearray(mutate(random, bytes(changed[at : at + 512]))[:512].ljust(512, b"\0"))
        header[148:156] = b" " * 8
        header[148:155] = b"%06o\0" % sum(header)
        changed[at : at + 512] = header
    return bytes(changed)


def read_foreign_tar(data: bytes, scratch: Path) -> None:
    folder = _fresh(scratch)
    (folder / "in.tar").write_bytes(data)
    config = TarsConfig(path=str(folder / "in.tar"), on_truncated="keep")
    (job,) = tar_jobs(config)
    sidecar = TarWorker(Folder.at(folder / "out"), config, INGEST)(job)
    assert sum(1 for _ in read_samples(Folder.at(folder / "out"), sidecar.file, sidecar)) == sidecar.samples


def column_tar(random: Random) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for index in range(random.randint(1, 3)):
            array = io.BytesIO()
            np.save(array, np.zeros((random.randint(1, 9), 4), random.choice([np.float16, np.float32])))
            for name, data in ((f"{index}.a.npy", array.getvalue()), (f"{index}.b.ref", b"0.a.npy")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def read_column(data: bytes, scratch: Path) -> None:
    folder = _fresh(scratch)
    (folder / "00000.tar").write_bytes(data)
    column = Column(folder, required=("a.npy",), optional=("b.npy",))
    try:
        for row, _ in enumerate(column.open_shard("00000.tar")):
            column.read_array("a.npy", 0, row)
            if column.has("b.npy", 0)[row]:
                column.read_array("b.npy", 0, row)
    finally:
        column.close()


CAPTIONS = [
    "a red circle",
    "caf\xe9",
    "</s> <image>",
    "",
    "two\nlines",
    "nul \0",
    "\x1b[31mred",
    "long " * 99,
]


def caption(random: Random) -> bytes:
    return random.choice(CAPTIONS).encode(random.choice(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))


def read_caption(data: bytes, scratch: Path) -> None:
    folder = _fresh(scratch) / "in"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "a.txt").write_bytes(data)
    config = FolderConfig(path=str(folder))
    (job,) = folder_jobs(config)
    sidecar = FolderWorker(Folder.at(scratch / "out"), config, INGEST)(job)
    assert sidecar.entries == 1


LISTS = ["l.csv", "l.tsv", "l.jsonl", "l.json", "l.csv.gz", "l.jsonl.gz", "l.parquet"]


def url_list(random: Random) -> bytes:
    """A list; the first byte says in which format."""
    texts = [*CAPTIONS, None, "a, b; c", "\ufeffx"]
    rows = [
        {"url": f"http://h/{index}", "caption": random.choice(texts), "score": random.choice([1, 0.5, None])}
        for index in range(random.randint(0, 5))
    ]
    kind = random.randrange(len(LISTS))
    name = LISTS[kind].removesuffix(".gz")
    if name == "l.parquet":
        stream = io.BytesIO()
        kinds = [("url", pa.string()), ("caption", pa.string()), ("score", pa.float64())]
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(kinds)), stream)
        data = stream.getvalue()
    elif name in ("l.csv", "l.tsv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, ["url", "caption", "score"], delimiter="\t" if name == "l.tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode(random.choice(["utf-8", "utf-8-sig", "utf-16"]))
    else:
        data = (
            json.dumps(rows).encode()
            if name == "l.json"
            else b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        )
    return bytes([kind]) + (gzip.compress(data) if LISTS[kind].endswith(".gz") else data)


def spoil_list(random: Random, data: bytes) -> bytes:
    return data[:1] + mutate(random, data[1:])


def read_url_list(data: bytes, scratch: Path) -> None:
    path = _fresh(scratch) / LISTS[data[0]]
    path.write_bytes(data[1:])
    for several in ("whole", "all"):
        config = UrlsConfig(path=str(path), extra_columns=("score",), several_captions=several)
        if length := len(listed := UrlList(config)):
            rows, bad = listed.read(range(length))
            assert len(rows) + len(bad) == length


def workflow(random: Random) -> bytes:
    sources = [{"kind": "tars", "path": "in/*.tar"}, {"kind": "urls", "path": "a.csv"}, "scenes"]
    values = {
        "root": "runs/x",
        "source": random.choice(sources),
        "ingest": {"image_size": random.choice([32, None])},
        "trainings": {"train": {"num_steps": 3, "engine": {"lr": 1e-3}}},
    }
    return yaml.safe_dump(values).encode()


def read_workflow(data: bytes, scratch: Path) -> None:
    folder = _fresh(scratch)
    (folder / "w.yaml").write_bytes(data)
    load_config(WorkflowConfig, folder / "w.yaml", [])


def override(random: Random) -> bytes:
    keys = [
        "root",
        "source.path",
        "ingest.image_size",
        "curate.duplicates",
        "trainings.train.engine.lr",
        "no.such",
    ]
    values = [
        "x",
        "1",
        "null",
        "*.tar",
        "[1",
        "#",
        "yes",
        "{a: 1}",
        "${x}",
        "${oc.env:HOME}",
        "1e400",
        "\u202e",
    ]
    return f"{random.choice(keys)}={random.choice(values)}".encode()


def read_override(data: bytes, scratch: Path) -> None:
    folder = _fresh(scratch)
    (folder / "w.yaml").write_text("root: runs/x\nsource: {kind: tars, path: a.tar}\n")
    load_config(WorkflowConfig, folder / "w.yaml", [data.decode(errors="replace")])


def sample_json(random: Random) -> bytes:
    values = [1, -0.5, None, True, "text", [1, [2]], {"a": {"b": "c"}}, 10**30, "\ud83d\ude00"]
    return json.dumps({f"k{index}": random.choice(values) for index in range(random.randint(0, 5))}).encode()


def read_sample_json(data: bytes, scratch: Path) -> None:
    stream, image = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in (("a.png", image.getvalue()), ("a.txt", b"x"), ("a.json", data)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    read_foreign_tar(stream.getvalue(), scratch)


CHECKPOINT = {"config.json": b"{}", "ema.safetensors": bytes(99), "resume/loop.json": b'{"step": 4}'}


def completion(random: Random) -> bytes:
    files = {name: {"bytes": len(data), "sha256": bytes_sha256(data)} for name, data in CHECKPOINT.items()}
    record = {"schema": SCHEMA, "step": 4, "files": files}
    return json_bytes({**record, "digest": digest_of(record)})


def read_completion(data: bytes, scratch: Path) -> None:
    folder = _fresh(scratch) / "step_00000004"
    (folder / "resume").mkdir(parents=True)
    for name, content in CHECKPOINT.items():
        (folder / name).write_bytes(content)
    (folder / "complete.json").write_bytes(data)
    assert check_all(folder)["files"].keys() == CHECKPOINT.keys()


FOLDERS = [None, "runs/x", "WEIGHTS/base", "/dev/zero", "x" * 5000, "\x1b[31m", "a\0b"]


def lineage_png(random: Random) -> bytes:
    """A PNG that says what it was made of."""
    column = {"folder": random.choice(FOLDERS), "manifest_digest": "0" * 64, "fingerprint": None}
    training = {"run_id": "r", "tracking_uri": "sqlite:///x", "git_commit": None, "lock_digest": None}
    record = {
        "rows": [{"prompt": random.choice(CAPTIONS), "seeds": [3, 4]}],
        **{"num_steps": 30, "solver": "euler", "guidance_scale": 4.0},
        "guidance_interval": [0, 1],
        "checkpoint": {"path": random.choice(FOLDERS), "digest": "0" * 64, "step": 4},
        "lineage": {**training, "datasets": {"main": {"image_features": column}}},
    }
    text = json.dumps(record).encode()
    if random.random() < 0.5:
        text = mutate(random, text)
    info = PngInfo()
    info.add_text("repfusion", text.decode("latin-1"), zip=random.random() < 0.5)
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def read_lineage_png(data: bytes, scratch: Path) -> None:
    path = _fresh(scratch) / "x.png"
    path.write_bytes(data)
    list(trace(path))


TARGETS: dict[str, Target] = {
    "image": Target(picture, ingest_image),
    "lineage": Target(lineage_png, read_lineage_png),
    "tar": Target(foreign_tar, read_foreign_tar, spoil_tar),
    "column": Target(column_tar, read_column, spoil_tar),
    "caption": Target(caption, read_caption),
    "list": Target(url_list, read_url_list, spoil_list),
    "workflow": Target(workflow, read_workflow),
    "override": Target(override, read_override),
    "json": Target(sample_json, read_sample_json),
    "checkpoint": Target(completion, read_completion),
}
"""By name, which findings carry."""
