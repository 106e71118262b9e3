"""Seeds -> image files and url lists, and a loopback HTTP server that serves them, so that `ingest` has
something to download.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
from jaxtyping import Float, UInt8
from pydantic import BaseModel, ConfigDict, Field

from pipelines.pool import ShardJob
from pipelines.store import ShardCommit, Sidecar, sample_key
from repfusion.scenes.captions import caption_scene
from repfusion.scenes.world import WorldConfig, draw_scene, render

CAPTION_STREAM = 7
"""Keeps the captions' random numbers apart from the scenes'."""


class DefectsConfig(BaseModel):
    """Entries spoilt on purpose, so that a run shows how drops are counted. They replace healthy entries."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    missing: int = Field(default=0, ge=0)
    """URLs that answer with HTTP 404."""
    undecodable: int = Field(default=0, ge=0)
    """Files that are not images."""
    empty_caption: int = Field(default=0, ge=0)
    """Captions without text."""


class ScenesConfig(BaseModel):
    """What the embedded world draws."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_samples: int = Field(default=4000, ge=1)
    """Entries of the url list, defects included."""
    seed: int = Field(default=0, ge=0)
    """Entry i shows the scene of seed `seed * 2**32 + i`."""
    world: WorldConfig = WorldConfig()
    """Image size, and which shapes and colours occur how often."""
    defects: DefectsConfig = DefectsConfig()
    """Entries spoilt on purpose."""


def to_uint8(pixels: Float[np.ndarray, "3 h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels in [0, 1] -> bytes, rounded to nearest: truncation would darken every image by half a step."""
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


def defect_positions(config: ScenesConfig) -> dict[int, str]:
    """Which entries are spoilt and how; drawn from the seed.

    Raises:
        ValueError: for more defects than entries.
    """
    kinds = [kind for kind, number in config.defects for _ in range(number)]
    if len(kinds) > config.num_samples:
        raise ValueError(
            f"source.scenes.defects: {len(kinds)} defects in {config.num_samples} samples; ask for fewer"
        )
    chosen = np.random.default_rng([config.seed, CAPTION_STREAM]).choice(
        config.num_samples, len(kinds), replace=False
    )
    return dict(zip(chosen.tolist(), kinds, strict=True))


class SceneWorker:
    """Draws one shard: `images/NAME/KEY.png` and `NAME.parquet` with columns key, url (relative), caption,
    facts (JSON).
    """

    def __init__(self, folder: Path, config: ScenesConfig):
        self.folder, self.config = folder, config
        self.defects = defect_positions(config)

    def __call__(self, job: ShardJob) -> Sidecar:
        import pyarrow as pa
        import pyarrow.parquet as pq
        from PIL import Image

        images = self.folder / "images" / job.name
        images.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, str]] = []
        with ShardCommit(self.folder, job.name, job.fingerprint, job.inputs, ("numpy", "pillow")) as commit:
            for index in range(job.arguments["start"], job.arguments["stop"]):
                seed, key = (self.config.seed << 32) + index, sample_key(index)
                scene = draw_scene(seed, self.config.world)
                caption = caption_scene(scene, np.random.default_rng([seed, CAPTION_STREAM]))
                defect = self.defects.get(index)
                path = images / f"{key}.png"
                match defect:
                    case "missing":
                        path.unlink(missing_ok=True)
                    case "undecodable":
                        path.write_bytes(b"not an image " * 8)
                    case _:
                        Image.fromarray(to_uint8(render(scene, self.config.world))).save(path)
                facts = {"things": [vars(thing) for thing in scene.things], "relation": scene.relation}
                url = f"images/{job.name}/{key}.png"
                text = "" if defect == "empty_caption" else caption
                rows.append(
                    {"key": key, "url": url, "caption": text, "facts": json.dumps(facts, sort_keys=True)}
                )
            commit.samples = len(rows)
            pq.write_table(pa.Table.from_pylist(rows), commit.staging / f"{job.name}.parquet")
            return commit.commit(f"{job.name}.parquet")


class _QuietHandler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: a line per image would bury the run's own."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def serve(folder: Path, port: int = 0) -> Iterator[str]:
    """Serves a folder on loopback for the length of the block; yields the address. Port 0 takes any free one.

    Raises:
        OSError: where the port is taken or none is free.
    """
    try:
        server = _Server(("127.0.0.1", port), functools.partial(_QuietHandler, directory=str(folder)))
    except OSError as error:
        wanted = f"port {port}" if port else "any free port"
        raise OSError(
            error.errno,
            f"cannot serve {folder} on 127.0.0.1, {wanted}: {error.strerror}; free one or set source.port: 0",
        ) from error
    thread = Thread(target=server.serve_forever, name="scenes-server", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
