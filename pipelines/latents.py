"""Image shards -> a column of encoder features (`KEY.features.npy`, float16) and their exact statistics.

Statistics are taken of the rounded values that training will read. Each shard's are stored beside it and
merged in the order of
the shards, so the result has the same bits for any number of actors.
"""

import io
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8
from pydantic import BaseModel, ConfigDict, Field

from pipelines.curate import IMAGE_EXTENSIONS
from pipelines.pool import ActorsConfig, ShardJob
from pipelines.store import (
    ShardCommit,
    ShardError,
    Sidecar,
    TarSamples,
    read_samples,
    read_sidecar,
    tar_shard,
)

if TYPE_CHECKING:
    from repfusion.rae.statistics import LatentStatistics

Batch = tuple[list[str], UInt8[np.ndarray, "b h w 3"]]


class LatentsConfig(BaseModel):
    """Encodes images."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    batch_size: int = Field(default=64, ge=1)
    """Images encoded at once. Counts as changing no bytes: what it does change is below float16's
    rounding, almost always.
    """
    actors: ActorsConfig = ActorsConfig()
    """Its pool. Changes no bytes."""


def fingerprint_fields(encoder_digest: str, layer: int) -> dict[str, Any]:
    """What decides the bytes: the encoder's weights, not their place."""
    return {
        "train.model.encoder.path": encoder_digest,
        "train.model.encoder.layer": layer,
        "latents.dtype": "float16",
    }


def npy_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=False)
    return stream.getvalue()


def decode_image(members: dict[str, bytes], size: int, place: str) -> UInt8[np.ndarray, "h w 3"]:
    """Raises ShardError for an image of another size."""
    from PIL import Image

    data = next(members[extension] for extension in IMAGE_EXTENSIONS if extension in members)
    with Image.open(io.BytesIO(data)) as image:
        if image.size != (size, size):
            got = f"{image.width} x {image.height}"
            raise ShardError(
                f"{place}: image is {got} px, the encoder takes {size} x {size}; set ingest.image_size={size}"
            )
        return np.asarray(image.convert("RGB"))


def decoded_batches(path: Path, sidecar: Sidecar | None, size: int, batch_size: int) -> Iterator[Batch]:
    """Reads and decodes a shard in batches."""
    keys: list[str] = []
    images: list[np.ndarray] = []
    for key, members in read_samples(path, sidecar, IMAGE_EXTENSIONS):
        keys.append(key)
        images.append(decode_image(members, size, f"shard {path}, key {key}"))
        if len(keys) == batch_size:
            yield keys, np.stack(images)
            keys, images = [], []
    if keys:
        yield keys, np.stack(images)


def read_ahead(batches: Iterator[Batch], depth: int = 4) -> Iterator[Batch]:
    """The same batches, made by a thread while the caller computes; an exception in the thread is raised
    here.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
    stopped = Event()

    def put(item: Batch | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put(batch):
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001  handed to the caller, who raises it
            put(error)

    thread = Thread(target=work, name="decode", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


class LatentsWorker:
    """Makes `NAME.tar` of features and `NAME.statistics.safetensors`; the encoder is loaded once.

    Args:
        folder: of the stage.
        source: folder of the image shards.
        config: the stage's.
        encoder: folder of the vision tower.
        layer: hidden state taken as features.
    """

    def __init__(self, folder: Path, source: Path, config: LatentsConfig, encoder: Path, layer: int):
        import torch

        from repfusion.rae.encoder import RepresentationEncoder

        torch.set_num_threads(max(1, int(config.actors.num_cpus)))
        self.folder, self.source, self.config = folder, source, config
        self.device = "cuda" if config.actors.num_gpus else "cpu"
        self.encoder = RepresentationEncoder.from_pretrained(encoder, layer).to(self.device)

    def __call__(self, job: ShardJob) -> Sidecar:
        from repfusion.rae.statistics import LatentStatistics

        statistics = LatentStatistics.empty(self.encoder.num_tokens, self.encoder.feature_dim)
        path, size = self.source / f"{job.name}.tar", self.encoder.image_size
        batches = decoded_batches(path, read_sidecar(self.source, job.name), size, self.config.batch_size)
        with ShardCommit(
            self.folder, job.name, job.fingerprint, job.inputs, ("torch", "transformers")
        ) as commit:
            with tar_shard(commit) as samples:
                for keys, images in read_ahead(batches):
                    self._encode(keys, images, samples, statistics)
            statistics.save(commit.staging / f"{job.name}.statistics.safetensors")
            return commit.commit(f"{job.name}.tar")

    def _encode(
        self,
        keys: list[str],
        images: UInt8[np.ndarray, "b h w 3"],
        samples: TarSamples,
        statistics: "LatentStatistics",
    ) -> None:
        import torch

        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float().div(255)
        features = self.encoder(pixels).half().cpu()
        finite = features.isfinite().flatten(1).all(1)
        if not finite.all():
            key = keys[int(finite.logical_not().nonzero()[0])]
            raise ShardError(f"key {key}: the encoder gives features that are not finite in float16")
        statistics.update(features)
        for key, row in zip(keys, features.numpy(), strict=True):
            samples.write(key, {"features.npy": npy_bytes(row)})


def merge_statistics(folder: Path, sidecars: Sequence[Sidecar], path: Path) -> None:
    """Statistics of all shards, merged in the given order, written to `path`."""
    from repfusion.rae.statistics import LatentStatistics

    parts = [LatentStatistics.load(folder / f"{sidecar.name}.statistics.safetensors") for sidecar in sidecars]
    merged = LatentStatistics.empty(*parts[0].mean.shape)
    for part in parts:
        merged.merge(part)
    merged.save(path)
