"""Scenes -> columns of captions and features -> the shipped base RepFusion checkpoint, trained from scratch
without Ray.

`python -m repfusion.foundation.base prepare` writes the columns, `repfusion.train` trains on them, `release`
copies the averaged weights of the last checkpoint into `weights/base`. `make base` runs the three.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from safetensors.torch import save_file
from tqdm import tqdm

from repfusion.data.readers import IMAGE_FEATURES
from repfusion.latents.statistics import LatentStatistics
from repfusion.latents.tower import RepresentationEncoder
from repfusion.runs.checkpoint import load_checked
from repfusion.runs.completion import begin_checkpoint, finish_checkpoint, latest_whole
from repfusion.runs.folder import step_of
from repfusion.scenes.captions import caption_scene
from repfusion.scenes.world import BASE_COLOURS, BASE_SHAPES, WorldConfig, draw_scene, render
from repfusion.weights import WEIGHTS

SHARD_SAMPLES = 5_000
CAPTIONS_PER_SCENE = 6
FIRST_SEED = 10_000_000


def base_world(image_size: int) -> WorldConfig:
    """What the base is trained on. Half of the scenes stand in a relation, which is learned last."""
    return WorldConfig(image_size=image_size, shapes=BASE_SHAPES, colours=BASE_COLOURS, relation_share=0.5)


def prepare(root: Path, num_scenes: int) -> None:
    """Writes `captions/`, `image_features/` and `image_features/statistics.safetensors`: scenes of the base's
    shapes and colours only.
    """
    encoder = RepresentationEncoder.from_pretrained(WEIGHTS / "vision_tower")
    world = base_world(encoder.image_size)
    statistics = LatentStatistics.empty(encoder.num_tokens, encoder.feature_dim)
    for folder in ("captions", IMAGE_FEATURES):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, num_scenes, SHARD_SAMPLES), desc="shards"):
        scenes = [
            draw_scene(FIRST_SEED + i, world) for i in range(start, min(start + SHARD_SAMPLES, num_scenes))
        ]
        pixels = torch.from_numpy(np.stack([render(scene, world) for scene in scenes]))
        parts = [encoder.encode(part) for part in pixels.split(500)]
        for part in parts:
            statistics.update(part.features.half(), part.tokens)
        features = torch.cat([part.features for part in parts]).half()
        name = f"{start // SHARD_SAMPLES:05d}.tar"
        with (
            wds.TarWriter(str(root / "captions" / name), mtime=0) as captions,
            wds.TarWriter(str(root / IMAGE_FEATURES / name), mtime=0) as column,
        ):
            for i, scene in enumerate(scenes):
                key, rng = f"{start + i:08d}", np.random.default_rng([FIRST_SEED, start + i])
                texts = [caption_scene(scene, rng) for _ in range(CAPTIONS_PER_SCENE)]
                captions.write(
                    {"__key__": key, "json": json.dumps({"captions": texts}).encode(), "txt": texts[0]}
                )
                buffer = io.BytesIO()
                np.save(buffer, features[i].numpy())
                column.write({"__key__": key, f"{IMAGE_FEATURES}.npy": buffer.getvalue()})
    statistics.save(root / IMAGE_FEATURES / "statistics.safetensors")


def release(checkpoints: Path, folder: Path) -> None:
    """The last checkpoint's averaged weights in half precision, as a checkpoint of its own."""
    source = latest_whole(checkpoints)
    if source is None:
        raise ValueError(f"{checkpoints}: no complete checkpoint; train first")
    model = load_checked(source)
    working = begin_checkpoint(folder)
    (working / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = {k: v.detach().half().contiguous() for k, v in model.trainable_state().items()}
    save_file(weights | model.fixed_state(), str(working / "ema.safetensors"))
    model.statistics.save(working / "statistics.safetensors")
    finish_checkpoint(working, folder, {"step": step_of(source)})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m repfusion.foundation.base", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="write the columns")
    command.add_argument("--root", type=Path, default=Path("runs/base"))
    command.add_argument("--num-scenes", type=int, default=60_000)
    command = commands.add_parser("release", help="copy the last checkpoint into the shipped weights")
    command.add_argument("--checkpoints", type=Path, default=Path("runs/base/train/checkpoints"))
    command.add_argument("--out", type=Path, default=WEIGHTS / "base")
    args = parser.parse_args()
    match args.command:
        case "prepare":
            prepare(args.root, args.num_scenes)
        case "release":
            release(args.checkpoints, args.out)


if __name__ == "__main__":
    main()
