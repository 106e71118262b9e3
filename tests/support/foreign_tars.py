"""Small tars as others write them, taken in by the source's own worker."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from pipelines.shards.storage import Folder
from pipelines.shards.store import Sidecar
from pipelines.shards.tars import read_samples
from pipelines.sources.ingest import IngestConfig
from pipelines.sources.tars import TarsConfig, TarWorker, jobs


def picture(kind: str = "JPEG", size: tuple[int, int] = (40, 48), colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(first: int, number: int) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for index in range(first, first + number):
        members[f"sa_{index}.jpg"] = picture(colour=["red", "green", "blue"][index % 3])
        members[f"sa_{index}.txt"] = f"picture {index}".encode()
        members[f"sa_{index}.json"] = json.dumps({"long": f"a long caption of {index}", "width": 7}).encode()
    return members


def run(
    config: TarsConfig, to: Path, ingest: IngestConfig | None = None, wanted: int | None = None
) -> list[Sidecar]:
    worker = TarWorker(Folder.at(to), config, ingest or IngestConfig(image_size=None, max_drop_fraction=1))
    return [worker(job) for job in jobs(config) if wanted is None or job.arguments["index"] == wanted]


def read(folder: Path, name: str = "00000") -> dict[str, dict[str, bytes]]:
    return dict(read_samples(Folder.at(folder), f"{name}.tar"))


def drops(folder: Path, name: str = "00000") -> list[tuple[str, str, str]]:
    return [tuple(row.values()) for row in pq.read_table(folder / f"{name}.drops.parquet").to_pylist()]
