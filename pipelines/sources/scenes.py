"""Seeds -> image files and url lists, and a loopback HTTP server that serves them, so that `ingest` has
something to download.
"""

import io
import json
import os
import re
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
from pydantic import Field

from pipelines.dag import Place, ShardStage
from pipelines.runtime.pool import ActorsConfig, ShardJob
from pipelines.shards.digests import flatten
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, Sidecar, sample_key
from pipelines.shards.tars import TarSamples
from pipelines.sources.base import Entries, download_stage, list_stage, numbered_entries
from pipelines.sources.ingest import IngestConfig
from repfusion.config import Config
from repfusion.scenes.rewriting import CaptionWording, caption_in
from repfusion.scenes.world import Scene, WorldConfig, draw_scene, render, to_uint8
from repfusion.tars import StreamSource, index_members

CAPTION_STREAM = 7
"""Keeps the captions' random numbers apart from the scenes'."""
NO_IMAGE = b"not an image " * 8
"""What lies in the place of an image that is spoilt."""
OPEN_ARCHIVES = 8
"""Archives the server keeps: open where they are local, in memory where they are remote."""


class DefectsConfig(Config):
    """Entries spoilt on purpose, so that a run shows how drops are counted. They replace healthy entries."""

    missing: int = Field(default=0, ge=0)
    """URLs that answer with HTTP 404."""
    undecodable: int = Field(default=0, ge=0)
    """Files that are not images."""
    empty_caption: int = Field(default=0, ge=0)
    """Captions without text."""


class ScenesConfig(Config):
    """What the embedded world draws. It is served on loopback, and downloaded from there."""

    kind: Literal["scenes"] = "scenes"
    shard_size: int = Field(default=500, ge=1)
    """Entries per shard, the unit of work, failure and resume of every later stage."""
    num_samples: int = Field(default=4000, ge=1)
    """Entries of the url list, defects included."""
    seed: int = Field(default=0, ge=0)
    """Entry i shows the scene of seed `seed * 2**32 + i`."""
    world: WorldConfig = WorldConfig()
    """Image size, and which shapes and colours occur how often."""
    wording: CaptionWording = "varied"
    """How captions put what they state."""
    defects: DefectsConfig = DefectsConfig()
    """Entries spoilt on purpose."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port of the loopback server; 0 takes any free one. Changes no bytes."""
    actors: ActorsConfig = ActorsConfig()
    """The pool that draws. Changes no bytes."""


@dataclass(frozen=True)
class ScenesSource:
    """A list of scenes, and a server that has them for the length of `ingest`."""

    config: ScenesConfig

    def stages(self, ingest: IngestConfig, place: Place) -> list[ShardStage]:
        config = self.config
        drawn = list_stage(
            SceneWorker,
            {"config": config},
            flatten(config.model_dump(mode="json", exclude={"port", "actors"}), "source."),
            config.num_samples,
            config.shard_size,
            config.actors,
            place,
        )

        @contextmanager
        def own_server() -> Iterator[dict[str, Any]]:
            with serve(drawn.folder, config.port) as address:
                yield {"base_url": address, "own_server": True}

        return [drawn, download_stage(drawn, ingest, config.shard_size, place, own_server)]

    def entries(self) -> Entries:
        return numbered_entries(self.config.num_samples, self.config.shard_size)


def png_of(scene: Scene, world: WorldConfig) -> bytes:
    """A scene as a PNG file."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(to_uint8(render(scene, world))).save(stream, "PNG")
    return stream.getvalue()


class Spoilt(Protocol):
    """A source's section that has some of its entries spoilt."""

    @property
    def num_samples(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def defects(self) -> Iterable[tuple[str, int]]: ...


def defect_positions(config: Spoilt) -> dict[int, str]:
    """Which entries are spoilt and how; drawn from the seed.

    Raises:
        ValueError: for more defects than entries.
    """
    kinds = [kind for kind, number in config.defects for _ in range(number)]
    if len(kinds) > config.num_samples:
        raise ValueError(
            f"source.defects: {len(kinds)} defects in {config.num_samples} samples; ask for fewer"
        )
    chosen = np.random.default_rng([config.seed, CAPTION_STREAM]).choice(
        config.num_samples, len(kinds), replace=False
    )
    return dict(zip(chosen.tolist(), kinds, strict=True))


class SceneWorker:
    """Draws one shard: `NAME.images.tar` with KEY.png and `NAME.parquet` with columns key, url (relative to
    the server's address), caption, facts (JSON).

    A job's arguments are start and stop of its entries and, for a sample of them, step.
    """

    def __init__(self, folder: Folder, config: ScenesConfig):
        self.folder, self.config = folder, config
        self.defects = defect_positions(config)

    def __call__(self, job: ShardJob) -> Sidecar:
        import pyarrow as pa
        import pyarrow.parquet as pq

        entries = range(job.arguments["start"], job.arguments["stop"], job.arguments.get("step", 1))
        rows: list[dict[str, str]] = []
        with ShardCommit(self.folder, job.name, job.fingerprint, job.inputs, ("numpy", "pillow")) as commit:
            with (commit.staging / _archive(job.name)).open("wb") as stream:
                images = TarSamples(stream, commit)
                for index in entries:
                    row, image = self._entry(index, job.name)
                    rows.append(row)
                    if image is not None:
                        images.write(row["key"], {"png": image})
                images.close()
            commit.samples = len(rows)
            pq.write_table(pa.Table.from_pylist(rows), commit.staging / f"{job.name}.parquet")
            return commit.commit(f"{job.name}.parquet")

    def _entry(self, index: int, shard: str) -> tuple[dict[str, str], bytes | None]:
        """A row of the list and the file that its url leads to, if any."""
        seed, key = (self.config.seed << 32) + index, sample_key(index)
        scene = draw_scene(seed, self.config.world)
        caption = caption_in(scene, np.random.default_rng([seed, CAPTION_STREAM]), self.config.wording)
        defect = self.defects.get(index)
        row = {
            "key": key,
            "url": f"images/{shard}/{key}.png",
            "caption": "" if defect == "empty_caption" else caption,
            "facts": json.dumps(scene.facts, sort_keys=True),
        }
        match defect:
            case "missing":
                return row, None
            case "undecodable":
                return row, NO_IMAGE
        return row, png_of(scene, self.config.world)


def _archive(shard: str) -> str:
    return f"{shard}.images.tar"


class _Archive:
    """Random access to the files in a tar."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._lock = stream, Lock()
        self._places = index_members(StreamSource(stream))
        # whoever still reads from an archive that is no longer kept open, keeps it open
        weakref.finalize(self, stream.close)

    def read(self, name: str) -> bytes:
        """Raises KeyError."""
        offset, size = self._places[name]
        with self._lock:
            self._stream.seek(offset)
            return self._stream.read(size)


class _Server(ThreadingHTTPServer):
    """Answers `/images/NAME/KEY.png` from the archives of a folder."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Folder, port: int):
        self._folder, self._opening = folder, Lock()
        self._open = lru_cache(OPEN_ARCHIVES)(self._open_archive)
        super().__init__(("127.0.0.1", port), _Handler)

    def _open_archive(self, shard: str) -> _Archive:
        name = _archive(shard)
        if self._folder.is_local:
            return _Archive(self._folder.open(name))
        return _Archive(io.BytesIO(self._folder.read(name)))

    def find(self, path: str) -> bytes | None:
        """The bytes behind a request's path, or None."""
        asked = re.fullmatch(r"/images/([\w-]+)/([\w-]+\.png)", path)
        if asked is None:
            return None
        try:
            with self._opening:
                archive = self._open(asked[1])
            return archive.read(asked[2])
        except (FileNotFoundError, KeyError):
            return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        data = self.server.find(self.path)
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: a line per image would bury the run's own."""


@contextmanager
def serve(folder: Folder, port: int = 0) -> Iterator[str]:
    """Serves the scenes' images on loopback for the length of the block; yields the address, which ends in a
    slash. Port 0 takes any free one.

    Raises:
        OSError: where the port is taken or none is free.
    """
    try:
        server = _Server(folder, port)
    except OSError as error:
        wanted = f"port {port}" if port else "any free port"
        raise OSError(
            error.errno,
            f"cannot serve {folder} on 127.0.0.1, {wanted}: {os.strerror(error.errno or 0)}; "
            "free one or set source.port: 0",
        ) from error
    thread = Thread(target=server.serve_forever, name="scenes-server", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
