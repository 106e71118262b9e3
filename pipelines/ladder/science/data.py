"""Seeds -> the rows' training scenes with plain captions; an encoder -> their features, once for each latent
space.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from pipelines.ladder.science.plan import SciencePlan
from repfusion.files import digest_of, file_sha256
from repfusion.foundation.chunks import Arrays, Kept, in_chunks, joined
from repfusion.latents.encoder import PixelEncoder
from repfusion.latents.statistics import LatentStatistics
from repfusion.llm.tokenizer import load_tokenizer, plain_ids
from repfusion.scenes.captions import caption_scene
from repfusion.scenes.world import WorldConfig, draw_scene, render

CHUNK = 500
FIRST_SEED = 1_000_000
"""Scenes of the rows are none that the foundation was trained on or measured with."""
NONE = -1
"""Fills up captions; no token has this id."""
BATCH = 1000


@dataclass(frozen=True)
class Captions:
    """Token ids of all distinct captions, without begin and end, and which of them each scene has. The first
    one is the empty caption.
    """

    ids: tuple[tuple[int, ...], ...]
    of_scene: Int[Tensor, "s k"]


@dataclass(frozen=True)
class Pictures:
    """Training images and their captions, on the CPU."""

    pixels: UInt8[Tensor, "s 3 h w"]
    captions: Captions


@dataclass(frozen=True)
class FeatureSpace:
    """Features of all training images on the device, and their statistics."""

    features: Float[Tensor, "s n d"]
    statistics: LatentStatistics


def draw_pictures(plan: SciencePlan, tokenizer: Path, kept: Path, until: float | None) -> Pictures:
    """The scenes of a plan, kept by chunks in a folder.

    Raises:
        OutOfTime: the deadline came before all were drawn.
    """
    jobs = [
        (plan.world, tokenizer, start, min(CHUNK, plan.num_scenes - start), plan.captions_per_scene)
        for start in range(0, plan.num_scenes, CHUNK)
    ]
    fields = {"num_scenes", "world", "captions_per_scene"}
    made_from = [
        plan.model_dump(mode="json", include=fields),
        file_sha256(tokenizer / "tokenizer.json"),
        CHUNK,
    ]
    parts = in_chunks(draw_chunk, jobs, kept=Kept(kept, digest_of(made_from)), until=until)
    rows = joined(parts, "captions", NONE)
    empty = np.full((1, rows.shape[-1]), NONE, rows.dtype)
    # ids are at least 0, so the empty caption comes first
    distinct, places = np.unique(
        np.concatenate([empty, rows.reshape(-1, rows.shape[-1])]), axis=0, return_inverse=True
    )
    of_scene = torch.from_numpy(places.reshape(-1)[1:].reshape(rows.shape[:2]))
    ids = tuple(tuple(int(one) for one in row if one != NONE) for row in distinct)
    return Pictures(torch.from_numpy(joined(parts, "pixels")), Captions(ids, of_scene))


def draw_chunk(world: WorldConfig, tokenizer_folder: Path, start: int, num: int, num_captions: int) -> Arrays:
    """Pixels of scenes, and ids of their captions by scene."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(tokenizer_folder)
    pixels = np.empty((num, 3, world.image_size, world.image_size), np.uint8)
    texts: list[str] = []
    for place in range(num):
        seed = FIRST_SEED + start + place
        scene, rng = draw_scene(seed, world), np.random.default_rng([seed, 8])
        pixels[place] = np.round(render(scene, world) * 255)
        texts += [caption_scene(scene, rng, "plain") for _ in range(num_captions)]
    rows = plain_ids(tokenizer, texts)
    captions = np.full((len(rows), max(map(len, rows))), NONE, np.int16)
    for row, ids in zip(captions, rows, strict=True):
        row[: len(ids)] = ids
    return {"pixels": pixels, "captions": captions.reshape(num, num_captions, -1)}


@torch.no_grad()
def encode_pictures(pictures: Pictures, encoder: PixelEncoder, device: torch.device) -> FeatureSpace:
    """Features in half precision, and their statistics with what a LayerNorm took."""
    encoder = encoder.to(device)
    statistics, features = LatentStatistics.empty(encoder.num_tokens, encoder.feature_dim), []
    for part in pictures.pixels.split(BATCH):
        encoding = encoder.encode(part.to(device).float() / 255)
        half = encoding.features.half()
        statistics.update(half, encoding.tokens)
        features.append(half)
    return FeatureSpace(torch.cat(features), statistics)
