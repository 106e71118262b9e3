"""`python -m pipelines.frechet CONFIG.yaml [key.path=value ...]`: image shards -> statistics for Frechet
distances (repfusion/evaluation/frechet.py), by actors that encode a shard each.

OUT          statistics of all images, merged in the order of the shards: the same bits for any number of
             actors
OUT.parts/   those of each shard, written as they come; a run that was cut off makes the others
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from tqdm import tqdm

from pipelines.runtime.pool import ActorsConfig, num_actors_that_fit
from pipelines.runtime.session import RayConfig, StageError, ray_session
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardError, read_sidecar
from pipelines.stages.image_features import image_batches
from repfusion.config import Config, load_config, weights_of
from repfusion.data.columns import shard_names
from repfusion.devices.placing import Precision, find_device, precision_of
from repfusion.display.redaction import redact_text
from repfusion.display.terminal import printable_lines
from repfusion.evaluation.frechet import FeatureStatistics, merged
from repfusion.files import weights_digest
from repfusion.latents.geometry import is_vae, latent_geometry
from repfusion.latents.load import EncoderConfig
from repfusion.pretrained.cache import fetch


class FrechetConfig(Config):
    """What images are encoded by, and by how many actors."""

    images: Path
    """Folder of image shards, on a disk that all nodes see."""
    out: Path
    """File of statistics to write."""
    encoder: EncoderConfig = EncoderConfig()
    """The encoder; an image's features are the mean over its tokens (FD-DINOv2, FD-CLIP and so on, but for
    the token taken there: distances to others' figures are of other features).
    """
    encoder_dtype: Literal["auto"] | Precision = "auto"
    """What it computes in; auto: bfloat16 where the actors have a GPU, float32 on a CPU."""
    batch_size: int = Field(default=64, ge=1)
    """Images encoded at once."""
    actors: ActorsConfig = ActorsConfig()
    """How many actors, and what of the machines each has; how often a shard is tried is not followed."""
    ray: RayConfig = RayConfig()
    """How to reach or start Ray."""

    @property
    def precision(self) -> Precision:
        """What the encoder computes in."""
        return precision_of(self.encoder_dtype, self.actors.num_gpus > 0)

    def features(self) -> dict[str, str]:
        """What the features are. Raises ValueError where the folder holds no encoder of such a size."""
        encoder = self.encoder
        return {
            "encoder": weights_digest(encoder.path),
            "layer": "none" if is_vae(encoder.path) else str(encoder.layer),
            "image_size": str(latent_geometry(encoder.path, encoder.image_size).image_size),
            "precision": self.precision,
            "pooled": "mean over tokens",
        }


class FrechetWorker:
    """Encodes shards; the encoder is loaded once.

    Args: config: what to encode by.
    """

    def __init__(self, config: FrechetConfig):
        import torch

        fetch(weights_of(config).values())
        torch.set_num_threads(max(1, int(config.actors.num_cpus)))
        self.config = config
        device = find_device(config.actors.num_gpus > 0, config.precision, "encoder_dtype")
        self.encoder = config.encoder.load(dtype=getattr(torch, config.precision)).to(device)
        self.device = device

    def run(self, name: str, features: dict[str, str]) -> tuple[str, FeatureStatistics]:
        """A shard's name, and the statistics of its images, batch by batch.

        Args:
            name: the shard's.
            features: what the statistics say of themselves.

        Raises:
            ShardError: an image cannot be read, or has features that are not finite.
        """
        import torch

        folder, size = Folder.at(str(self.config.images)), self.encoder.image_size
        found = FeatureStatistics.of(np.empty((0, self.encoder.feature_dim)), features)
        sidecar = read_sidecar(folder, name)
        for keys, images in image_batches(folder, name, sidecar, size, self.config.batch_size):
            encoded = self.encoder.encode_images(torch.from_numpy(images).to(self.device)).features
            vectors = encoded.double().mean(1).cpu().numpy()
            if len(wrong := np.flatnonzero(~np.isfinite(vectors).all(1))):
                raise ShardError(
                    f"shard {name}, key {keys[wrong[0]]}: features that are not finite, computing in "
                    f"{self.config.precision}; set encoder_dtype=float32"
                )
            found.merge(FeatureStatistics.of(vectors, features))
        return name, found


def part_of(config: FrechetConfig, name: str) -> Path:
    """Where the statistics of a shard lie."""
    return config.out.with_name(f"{config.out.name}.parts") / f"{name}.safetensors"


def is_made(path: Path, features: dict[str, str]) -> bool:
    """Whether a file holds statistics of these features."""
    try:
        return path.is_file() and FeatureStatistics.load(path).features == features
    except ValueError:
        return False


def encoded_by_actors(
    config: FrechetConfig, said: dict[str, dict[str, str]]
) -> Iterator[tuple[str, FeatureStatistics]]:
    """Names of shards and their statistics, as they come, of shards and what their statistics say of
    themselves. Each actor has one shard at a time.
    """
    import ray
    from ray.util import ActorPool

    num = min(len(said), config.actors.num_actors or num_actors_that_fit("frechet", config.actors))
    made = ray.remote(num_cpus=config.actors.num_cpus, num_gpus=config.actors.num_gpus)(FrechetWorker)
    pool: Any = ActorPool([made.remote(config) for _ in range(num)])
    yield from pool.map_unordered(lambda actor, one: actor.run.remote(*one), said.items())


def frechet_statistics(config: FrechetConfig) -> FeatureStatistics:
    """Writes `out`, and returns what it holds. Memory does not grow with images, shards or actors: of the
    parts, which are files, two are held.

    Raises:
        ValueError: no shards, or no encoder.
        StageError: no node is large enough for an actor, or no cluster answers.
        ShardError: an image cannot be read, or its features are not finite.
    """
    fetch(weights_of(config).values())
    names = [Path(file).stem for file in shard_names(config.images)]
    features = config.features()
    said = {name: {**features, **_shard_identity(config, name)} for name in names}
    todo = {name: one for name, one in said.items() if not is_made(part_of(config, name), one)}
    if todo:
        part_of(config, names[0]).parent.mkdir(parents=True, exist_ok=True)
        with ray_session(config.ray):
            found = encoded_by_actors(config, todo)
            for name, part in tqdm(found, desc="shards", initial=len(names) - len(todo), total=len(names)):
                part.save(part_of(config, name))
    whole = merged(_without_shard(FeatureStatistics.load(part_of(config, name)), features) for name in names)
    whole.save(config.out)
    return whole


def _shard_identity(config: FrechetConfig, name: str) -> dict[str, str]:
    """A shard's bytes, and the batches that they are encoded in: no part stays of others."""
    sidecar = read_sidecar(Folder.at(str(config.images)), name)
    path = config.images / f"{name}.tar"
    shard = sidecar.sha256 if sidecar is not None else f"{path.stat().st_size} {path.stat().st_mtime_ns}"
    return {"batch_size": str(config.batch_size), "shard": shard}


def _without_shard(part: FeatureStatistics, features: dict[str, str]) -> FeatureStatistics:
    return FeatureStatistics(part.count, part.mean, part.scatter, features)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipelines.frechet", description=__doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    args = parser.parse_intermixed_args()
    try:
        config = load_config(FrechetConfig, args.config, args.overrides)
        found = frechet_statistics(config)
    except (ValueError, OSError, ShardError, StageError) as error:
        sys.exit(printable_lines(redact_text(f"error: {error}")))
    print(f"{config.out}: statistics of {found.count} images")


if __name__ == "__main__":
    main()
