"""Image shards -> a column of encoder features (`KEY.image_features.npy`, float16) and their exact
statistics.

Statistics are taken of the rounded values that training will read, and of what a tower's LayerNorm took of
each token. Each shard's are stored beside it and merged in the order of the shards, so the result has the
same bits for any number of actors.
"""

import ctypes
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from jaxtyping import UInt8
from pydantic import Field

from pipelines.dag import Place, ShardStage, Stage
from pipelines.runtime.pool import ActorsConfig, ShardJob
from pipelines.shards.arrays import npy_bytes
from pipelines.shards.manifest import ShardTable
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar, read_sidecar
from pipelines.shards.tars import TarSamples, read_samples, tar_shard
from repfusion.config import Config, naming
from repfusion.data.source_images import IMAGE_EXTENSIONS
from repfusion.images.decode import read_pixels
from repfusion.images.limits import BadImage
from repfusion.latents.load import EncoderConfig
from repfusion.runs.folder import STATISTICS

if TYPE_CHECKING:
    import torch

    from repfusion.latents.encoder import Encoding
    from repfusion.latents.statistics import LatentStatistics

Batch = tuple[list[str], UInt8[np.ndarray, "b h w 3"]]

MALLOC_OPTIONS = {-1: 1 << 30, -3: 1 << 30, -8: 1}
"""glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in bytes, and M_ARENA_MAX."""
STATISTICS_AT_ONCE = 16
"""Shards' statistics in memory at a time: at 576 x 1024 each takes 9 MiB."""


class ImageFeaturesConfig(Config):
    """A column of what an encoder makes of the images, which training denoises."""

    kind: Literal["image_features"] = "image_features"
    encoder: EncoderConfig | None = None
    """The vision tower or VAE; None takes that of the trainings that read the column."""
    batch_size: int = Field(default=64, ge=1)
    """Images encoded at once. Counts as changing no bytes: what it does change is below float16's rounding,
    almost always.
    """
    actors: ActorsConfig = ActorsConfig()
    """The pool that encodes. Changes no bytes."""

    @property
    def stands_alone(self) -> bool:
        """Whether the column can be made though no training reads it."""
        return self.encoder is not None


def fingerprint_fields(name: str, encoder: EncoderConfig, digest: str) -> dict[str, Any]:
    """What decides the bytes of the column of a name: the encoder's folder (its digest, not its place), layer
    and image size; a VAE has no layer, and no LayerNorm whose scales its statistics would hold. Raises
    ValueError where its folder has no such tower or size.
    """
    from repfusion.latents.geometry import is_vae, latent_geometry

    has_layer_norm = not is_vae(encoder.path)
    fields = {
        f"columns.{name}.encoder.path": digest,
        f"columns.{name}.encoder.layer": encoder.layer if has_layer_norm else None,
        f"columns.{name}.encoder.image_size": latent_geometry(encoder.path, encoder.image_size).image_size,
        f"columns.{name}.dtype": "float16",
    }
    return fields | ({f"columns.{name}.token_scale": "mean"} if has_layer_norm else {})


def decode_image(members: dict[str, bytes], size: int, place: str) -> UInt8[np.ndarray, "h w 3"]:
    """A sample's image, `size` x `size` px. One of another shape is brought there by its shorter side
    (bicubic, antialiased) and a centre crop.

    Raises:
        ShardError: for no image, one that cannot be decoded, or one with a side shorter than `size`.
    """
    data = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    if data is None:
        raise ShardError(f"{place}: no image; 'curate' keeps no such sample: run it again")
    try:
        pixels = read_pixels(data)
    except BadImage as error:
        raise ShardError(
            f"{place}: the image cannot be decoded, {error}; 'curate' drops such images, so this shard was "
            "not made by it or changed since; run 'verify', or take the sample out"
        ) from error
    height, width, _ = pixels.shape
    if min(width, height) < size:
        raise ShardError(
            f"{place}: image is {width} x {height} px, smaller than the {size} x {size} that the encoder "
            f"takes; set ingest.image_size={size}"
        )
    if (width, height) == (size, size):
        return pixels
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(Image.fromarray(pixels), (size, size), Image.Resampling.BICUBIC))


def decoded_batches(
    folder: Folder, name: str, sidecar: Sidecar | None, size: int, batch_size: int
) -> Iterator[Batch]:
    """A shard's images in batches, the last one shorter: which images share a batch never depends on other
    shards.

    Raises:
        ShardError: where the shard is missing or broken (the last of it when all was read), and what
            `decode_image` raises.
    """
    samples = read_samples(folder, f"{name}.tar", sidecar, IMAGE_EXTENSIONS)
    while part := list(itertools.islice(samples, batch_size)):
        images = np.empty((len(part), size, size, 3), np.uint8)
        for row, (key, members) in enumerate(part):
            images[row] = decode_image(members, size, f"shard {folder / name}.tar, key {key}")
        yield [key for key, _ in part], images


def keep_freed_memory() -> None:
    """Lets glibc keep what one batch frees for the next, for threads started from now on: giving it back to
    the system and touching it anew takes 10 to 20% of a tower's time on a CPU. Without glibc, does nothing.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in MALLOC_OPTIONS.items():
            mallopt(option, value)


class ImageFeaturesWorker:
    """Makes `NAME.tar` of features and `NAME.statistics.safetensors`; the encoder is loaded once.

    Args:
        folder: of the stage.
        source: folder of the image shards.
        config: the stage's.
        encoder: the vision tower or VAE, the tower's layer, the image size.
    """

    concurrency: ClassVar[int] = 2
    """While one shard is encoded, another is read, decoded, written and committed."""

    def __init__(self, folder: Folder, source: Folder, config: ImageFeaturesConfig, encoder: EncoderConfig):
        import torch

        from repfusion.latents.geometry import is_vae

        keep_freed_memory()
        num_threads = max(1, int(config.actors.num_cpus))
        torch.set_num_threads(num_threads)
        self.folder, self.source, self.config = folder, source, config
        self.libraries = ("torch", "diffusers" if is_vae(encoder.path) else "transformers")
        self.encoder = encoder.load().to("cuda" if config.actors.num_gpus else "cpu")
        # all encoding happens in one thread; the shards' own threads decode, write and commit
        self._encoding = ThreadPoolExecutor(1, "encode", torch.set_num_threads, (num_threads,))
        self._streams = itertools.cycle(
            [torch.cuda.Stream(), torch.cuda.Stream()] if config.actors.num_gpus else [None]
        )
        if config.actors.num_gpus:
            torch.cuda.synchronize()  # the weights lie there before other streams read them

    def __call__(self, job: ShardJob) -> Sidecar:
        from repfusion.latents.statistics import LatentStatistics

        statistics = LatentStatistics.empty(self.encoder.num_tokens, self.encoder.feature_dim)
        sidecar = read_sidecar(self.source, job.name)
        batches = decoded_batches(
            self.source, job.name, sidecar, self.encoder.image_size, self.config.batch_size
        )
        with ShardCommit(self.folder, job.name, job.fingerprint, job.inputs, self.libraries) as commit:
            with tar_shard(commit) as samples:
                for keys, encoding in self._encode(batches):
                    write_features(keys, encoding, samples, statistics)
            statistics.save(commit.staging / f"{job.name}.statistics.safetensors")
            return commit.commit(f"{job.name}.tar")

    def _encode(self, batches: Iterator[Batch]) -> Iterator[tuple[list[str], "Encoding"]]:
        """Encodings on the CPU, features as float16; while a batch is encoded, the next one is read and the
        last one written.
        """
        ahead: tuple[list[str], Future[Encoded]] | None = None
        for keys, images in batches:
            following = keys, self._encoding.submit(self._launch, images)
            if ahead is not None:
                yield ahead[0], ahead[1].result().wait()
            ahead = following
        if ahead is not None:
            yield ahead[0], ahead[1].result().wait()

    def _launch(self, images: UInt8[np.ndarray, "b h w 3"]) -> "Encoded":
        """Encodes a batch; on a GPU, only queues that: two streams take turns, so that one batch is copied
        while the other is encoded.
        """
        import torch

        from repfusion.latents.encoder import Encoding
        from repfusion.latents.statistics import TokenScale

        stream = next(self._streams)
        if stream is None:
            features, tokens = self.encoder.encode_images(torch.from_numpy(images))
            return Encoded(Encoding(features.half(), tokens), None)
        with torch.cuda.stream(stream):
            # from and to pinned memory, or the copies would hold up this thread
            on_device = torch.from_numpy(images).pin_memory().to(stream.device, non_blocking=True)
            features, tokens = self.encoder.encode_images(on_device)
            tokens = None if tokens is None else TokenScale(*map(pinned, tokens))
            return Encoded(Encoding(pinned(features.half()), tokens), stream.record_event())


@dataclass(frozen=True)
class Encoded:
    """An encoding on the CPU, there once `done` has happened."""

    encoding: "Encoding"
    done: "torch.cuda.Event | None"

    def wait(self) -> "Encoding":
        if self.done is not None:
            self.done.synchronize()
        return self.encoding


def pinned(tensor: "torch.Tensor") -> "torch.Tensor":
    """A copy in page-locked memory, there once the current stream has come so far."""
    import torch

    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def write_features(
    keys: list[str], encoding: "Encoding", samples: TarSamples, statistics: "LatentStatistics"
) -> None:
    """Adds a batch to a shard and its statistics. Raises ShardError for features beyond float16."""
    features = encoding.features
    statistics.update(features, encoding.tokens)
    if not statistics.mean.isfinite().all():
        finite = features.isfinite().flatten(1).all(1)
        key = keys[int(finite.logical_not().nonzero()[0])]
        raise ShardError(f"key {key}: the encoder gives features that are not finite in float16")
    for key, row in zip(keys, features.numpy(), strict=True):
        samples.write(key, {"image_features.npy": npy_bytes(row)})


def merge_statistics(folder: Folder, names: Iterable[str], file: str) -> None:
    """Statistics of the shards of these names, merged in this order, written to `file` in the stage's
    folder.
    """
    from repfusion.latents.statistics import LatentStatistics

    merged: LatentStatistics | None = None
    files = [f"{name}.statistics.safetensors" for name in names]
    for start in range(0, len(files), STATISTICS_AT_ONCE):
        block = files[start : start + STATISTICS_AT_ONCE]
        found = dict(folder.read_many(block))
        for part_file in block:
            if part_file not in found:
                raise ShardError(f"{folder / part_file}: no such file; run 'verify', which makes it again")
            part = LatentStatistics.parse(found[part_file], str(folder / part_file))
            merged = LatentStatistics.empty(*part.mean.shape) if merged is None else merged
            merged.merge(part)
    assert merged is not None, "a stage has at least one shard"
    with folder.staging(file) as staging:
        merged.save(staging / file)
        folder.put(file, staging / file)


def image_features_stage(
    name: str, config: ImageFeaturesConfig, encoder: EncoderConfig, key: str, images: Stage, place: Place
) -> ShardStage:
    """The stage of a column of image features. `key` is where the configuration says what the encoder is.
    Raises ValueError where its folder is missing.
    """

    def finish(folder: Folder, shards: ShardTable) -> list[str]:
        merge_statistics(folder, shards.names, STATISTICS)
        return [STATISTICS]

    def check() -> None:
        with naming(f"{key}.path"):
            encoder.load(on_meta=True)

    digest = place.digests.folder(encoder.path, f"{key}.path")
    return ShardStage(
        name,
        fingerprint_fields(name, encoder, digest),
        place.data / name,
        (images,),
        ImageFeaturesWorker,
        {"source": images.folder, "config": config, "encoder": encoder},
        config.actors,
        finish=finish,
        check=check,
    )
