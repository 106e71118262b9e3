"""Shards of images or clips -> a column of encoder features (`KEY.image_features.npy`, of clips
`KEY.video_features.npy`, float16) and their exact statistics.

Statistics are taken of the rounded values that training will read, and of what a tower's LayerNorm took of
each token. Each shard's are stored beside it and merged in the order of the shards, so the result has the
same bits for any number of actors.
"""

import ctypes
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from jaxtyping import UInt8
from pydantic import Field

from pipelines.dag import Place, ShardStage, Stage
from pipelines.runtime.pool import ActorsConfig, ShardJob
from pipelines.shards.arrays import npy_parts
from pipelines.shards.manifest import ShardTable
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, ShardError, Sidecar, read_sidecar
from pipelines.shards.tars import read_samples, tar_shard
from repfusion.config import Config, naming
from repfusion.data.source_images import CLIP_EXTENSION, IMAGE_EXTENSIONS, PICTURE_EXTENSIONS
from repfusion.devices.placing import Precision, find_device, precision_of
from repfusion.images.decode import read_pixels
from repfusion.images.limits import BadImage
from repfusion.latents.load import EncoderConfig
from repfusion.latents.video_vae import ClipGeometry, VideoEncoderConfig
from repfusion.runs.folder import STATISTICS

if TYPE_CHECKING:
    import torch

    from pipelines.stages.encoding import Encoded

Batch = tuple[list[str], UInt8[np.ndarray, "b *f h w 3"]]
Decode = Callable[..., UInt8[np.ndarray, "*f h w 3"]]
"""(members, place) -> a sample's image or clip."""

MALLOC_OPTIONS = {-1: 1 << 30, -3: 1 << 30, -8: 1}
"""glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in bytes, and M_ARENA_MAX."""
STATISTICS_AT_ONCE = 16
"""Shards' statistics in memory at a time: at 576 x 1024 each takes 9 MiB."""


class FeaturesConfig(Config):
    """How a column of what an encoder makes of images or clips is made."""

    encoder_dtype: Literal["auto"] | Precision = "auto"
    """What the encoder computes in; auto: bfloat16 where the actors have a GPU, float32 on a CPU. A tower's
    LayerNorm at its end is float32, what is stored float16.
    """
    compile: Literal["auto"] | bool = "auto"
    """torch.compile the encoder; auto: on a GPU. Where it cannot be done it runs as it is, with a warning."""
    batch_size: int = Field(default=64, ge=1)
    """How many are encoded at once. Counts as changing no bytes: what it does change is below float16's
    rounding, almost always, in float32, and within the encoder's own rounding in less. Where a batch exceeds
    a GPU's memory, its halves are encoded, with a warning.
    """
    actors: ActorsConfig = ActorsConfig()
    """The pool that encodes. Changes no bytes."""

    @property
    def on_gpu(self) -> bool:
        """Whether the actors have a GPU, or a share of one."""
        return self.actors.num_gpus > 0

    @property
    def precision(self) -> Precision:
        """What the encoder computes in, by this configuration alone, on whatever machine it is read."""
        return precision_of(self.encoder_dtype, self.on_gpu)

    @property
    def compiles(self) -> bool:
        """Whether the encoder is compiled."""
        return self.on_gpu if self.compile == "auto" else self.compile


class ImageFeaturesConfig(FeaturesConfig):
    """A column of what an encoder makes of the images, which training denoises."""

    kind: Literal["image_features"] = "image_features"
    encoder: EncoderConfig | None = None
    """The vision tower or VAE; None takes that of the trainings that read the column."""

    @property
    def stands_alone(self) -> bool:
        """Whether the column can be made though no training reads it."""
        return self.encoder is not None


class VideoFeaturesConfig(FeaturesConfig):
    """A column of what a causal video VAE makes of the clips."""

    kind: Literal["video_features"] = "video_features"
    encoder: VideoEncoderConfig
    """The video VAE, and the clips that it takes."""
    batch_size: int = Field(default=8, ge=1)
    """Clips encoded at once; changes bytes as that of images does."""

    @property
    def stands_alone(self) -> bool:
        """Whether the column can be made though no training reads it."""
        return True


def fingerprint_fields(
    name: str, encoder: EncoderConfig, digest: str, config: ImageFeaturesConfig = ImageFeaturesConfig()
) -> dict[str, Any]:
    """What decides the bytes of the column of a name: the encoder's folder (its digest, not its place), layer
    and image size; a VAE has no layer, and no LayerNorm whose scales its statistics would hold. Less than
    float32, and being compiled, count where they are asked for. Raises ValueError where its folder has no
    such tower or size.
    """
    from repfusion.latents.geometry import is_vae, latent_geometry

    has_layer_norm = not is_vae(encoder.path)
    fields = {
        f"columns.{name}.encoder.path": digest,
        f"columns.{name}.encoder.layer": encoder.layer if has_layer_norm else None,
        f"columns.{name}.encoder.image_size": latent_geometry(encoder.path, encoder.image_size).image_size,
        f"columns.{name}.dtype": "float16",
    }
    if has_layer_norm:
        fields[f"columns.{name}.token_scale"] = "mean"
    return fields | _computing_fields(name, config)


def video_fingerprint_fields(name: str, digest: str, config: VideoFeaturesConfig) -> dict[str, Any]:
    """What decides the bytes of a column of clips: the VAE's folder (its digest), and what it takes."""
    return {
        f"columns.{name}.encoder.path": digest,
        f"columns.{name}.encoder.image_size": config.encoder.image_size,
        f"columns.{name}.encoder.num_frames": config.encoder.num_frames,
        f"columns.{name}.dtype": "float16",
    } | _computing_fields(name, config)


def _computing_fields(name: str, config: FeaturesConfig) -> dict[str, Any]:
    precision = {} if config.precision == "float32" else {f"columns.{name}.encoder_dtype": config.precision}
    return precision | ({f"columns.{name}.compile": True} if config.compiles else {})


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


def decode_clip(
    members: dict[str, bytes], geometry: ClipGeometry, place: str
) -> UInt8[np.ndarray, "f h w 3"]:
    """A sample's clip, of the length and size that an encoder takes.

    Raises:
        ShardError: for no clip, one that cannot be decoded, or one of another length or size.
    """
    from repfusion.video.fitting import read_clip

    data = members.get(CLIP_EXTENSION)
    if data is None:
        raise ShardError(f"{place}: no clip; set ingest.clips, or take image_features for images")
    try:
        frames = read_clip(data).frames
    except BadImage as error:
        raise ShardError(
            f"{place}: the clip cannot be decoded, {error}; 'curate' drops such clips, so this shard was "
            "not made by it or changed since; run 'verify', or take the sample out"
        ) from error
    size = geometry.image_size
    if frames.shape != (geometry.num_frames, size, size, 3):
        found = "{} frames of {} x {} px".format(*(frames.shape[axis] for axis in (0, 2, 1)))
        raise ShardError(
            f"{place}: a clip of {found}, the encoder takes {geometry.num_frames} of {size} x {size}; set "
            f"ingest.image_size={size} and ingest.clips.num_frames={geometry.num_frames}"
        )
    return frames


def decoded_batches(
    folder: Folder,
    name: str,
    sidecar: Sidecar | None,
    decode: Decode,
    shape: tuple[int, ...],
    batch_size: int,
) -> Iterator[Batch]:
    """A shard's images or clips in batches, the last one shorter, in page-locked memory where there is CUDA:
    which share a batch never depends on other shards.

    Args:
        decode: makes one of a sample's members.
        shape: of what it makes.

    Raises:
        ShardError: where the shard is missing or broken (the last of it when all was read), and what
            `decode` raises.
    """
    import torch

    from repfusion.inputs import empty

    samples = read_samples(folder, f"{name}.tar", sidecar, PICTURE_EXTENSIONS)
    while part := list(itertools.islice(samples, batch_size)):
        images = empty(len(part), *shape, dtype=torch.uint8).numpy()
        for row, (key, members) in enumerate(part):
            images[row] = decode(members, place=f"shard {folder / name}.tar, key {key}")
        yield [key for key, _ in part], images


def image_batches(
    folder: Folder, name: str, sidecar: Sidecar | None, size: int, batch_size: int
) -> Iterator[Batch]:
    """A shard's images, `size` x `size` px, in batches; see `decoded_batches`. Raises ShardError as that and
    `decode_image` do.
    """
    decode = partial(decode_image, size=size)
    return decoded_batches(folder, name, sidecar, decode, (size, size, 3), batch_size)


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
        encoder: the vision tower or VAE, the tower's layer, the image size; or the video VAE and its clips.
    """

    concurrency: ClassVar[int] = 2
    """While one shard is encoded, another is read, decoded, written and committed; see `shards_in_flight`."""

    def __init__(
        self,
        folder: Folder,
        source: Folder,
        config: ImageFeaturesConfig | VideoFeaturesConfig,
        encoder: EncoderConfig | VideoEncoderConfig,
    ):
        import torch

        from pipelines.stages.encoding import BatchEncoder

        keep_freed_memory()
        num_threads = max(1, int(config.actors.num_cpus))
        torch.set_num_threads(num_threads)
        self.folder, self.source, self.config = folder, source, config
        self.libraries, self.decode, self.shape = _decoding_of(encoder)
        self.key = f"columns.{folder.name}"
        device = find_device(config.on_gpu, config.precision, f"{self.key}.encoder_dtype")
        self.encoder = encoder.load(dtype=getattr(torch, config.precision)).to(device)
        size, key = config.batch_size, f"{self.key}.batch_size"
        self.batches = BatchEncoder(self.encoder, size, config.compiles, key, num_threads)

    def __call__(self, job: ShardJob) -> Sidecar:
        from repfusion.latents.statistics import LatentStatistics

        statistics = LatentStatistics.empty(self.encoder.num_tokens, self.encoder.feature_dim)
        sidecar = read_sidecar(self.source, job.name)
        batches = decoded_batches(
            self.source, job.name, sidecar, self.decode, self.shape, self.config.batch_size
        )
        with ShardCommit(self.folder, job.name, job.fingerprint, job.inputs, self.libraries) as commit:
            with tar_shard(commit) as samples:
                for keys, encoded in self._encode(batches):
                    features, part = encoded.wait()
                    statistics.merge(part)
                    if not statistics.mean.isfinite().all():
                        raise ShardError(self._blame(keys, features, encoded))
                    for key, row in zip(keys, features.numpy(), strict=True):
                        samples.write(key, {f"{self.config.kind}.npy": npy_parts(row)})
            statistics.save(commit.staging / f"{job.name}.statistics.safetensors")
            return commit.commit(f"{job.name}.tar")

    def _encode(self, batches: Iterator[Batch]) -> Iterator[tuple[list[str], "Encoded"]]:
        """Batches as they are encoded; meanwhile the next one is read and the last one written."""
        ahead: tuple[list[str], Future[Encoded]] | None = None
        for keys, images in batches:
            following = keys, self.batches.submit(images)
            if ahead is not None:
                yield ahead[0], ahead[1].result()
            ahead = following
        if ahead is not None:
            yield ahead[0], ahead[1].result()

    def _blame(self, keys: list[str], features: "torch.Tensor", encoded: "Encoded") -> str:
        """Which key has features that are not finite, and where in the encoder they come from."""
        row = int(features.isfinite().flatten(1).all(1).logical_not().nonzero()[0])
        said = f"key {keys[row]}: the encoder gives features that are not finite in float16"
        if (layer := self.batches.first_not_finite(encoded.images[row])) is None:
            return said
        said += f"; the first that are not come from {layer}, computing in {self.config.precision}"
        advice = f": set {self.key}.encoder_dtype=float32"
        return said if self.config.precision == "float32" else said + advice


def _decoding_of(
    encoder: EncoderConfig | VideoEncoderConfig,
) -> tuple[tuple[str, ...], Decode, tuple[int, ...]]:
    """What an encoder needs: its libraries, and how samples are decoded, to which shape."""
    from repfusion.latents.geometry import is_vae, latent_geometry

    if isinstance(encoder, VideoEncoderConfig):
        geometry = encoder.geometry
        shape = (geometry.num_frames, geometry.image_size, geometry.image_size, 3)
        return ("torch", "diffusers", "av"), partial(decode_clip, geometry=geometry), shape
    size = latent_geometry(encoder.path, encoder.image_size).image_size
    library = "diffusers" if is_vae(encoder.path) else "transformers"
    return ("torch", library), partial(decode_image, size=size), (size, size, 3)


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

    def check() -> None:
        with naming(f"{key}.path"):
            encoder.load(on_meta=True)

    fields = fingerprint_fields(name, encoder, place.digests.folder(encoder.path, f"{key}.path"), config)
    return _features_stage(name, config, encoder, fields, check, images, place)


def video_features_stage(name: str, config: VideoFeaturesConfig, clips: Stage, place: Place) -> ShardStage:
    """The stage of a column of features of clips. Raises ValueError where the VAE's folder is missing, or
    has no such size.
    """
    key, encoder = f"columns.{name}.encoder", config.encoder
    digest = place.digests.folder(encoder.path, f"{key}.path")
    with naming(key):
        _ = encoder.geometry

    def check() -> None:
        with naming(f"{key}.path"):
            encoder.load()

    fields = video_fingerprint_fields(name, digest, config)
    return _features_stage(name, config, encoder, fields, check, clips, place)


def _features_stage(
    name: str,
    config: ImageFeaturesConfig | VideoFeaturesConfig,
    encoder: EncoderConfig | VideoEncoderConfig,
    fields: dict[str, Any],
    check: Callable[[], None],
    above: Stage,
    place: Place,
) -> ShardStage:
    def finish(folder: Folder, shards: ShardTable) -> list[str]:
        merge_statistics(folder, shards.names, STATISTICS)
        return [STATISTICS]

    return ShardStage(
        name,
        fields,
        place.data / name,
        (above,),
        ImageFeaturesWorker,
        {"source": above.folder, "config": config, "encoder": encoder},
        config.actors,
        finish=finish,
        check=check,
    )
