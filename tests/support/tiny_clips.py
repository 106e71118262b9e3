"""A text-to-video model of a few thousand weights: a tiny video VAE, a column of its features, a training."""

import json
from pathlib import Path

import numpy as np
import torch
from tiny_training import npy, write_tar

from repfusion.latents.load import EncoderConfig
from repfusion.latents.statistics import LatentStatistics
from repfusion.model.config import ModelConfig
from repfusion.model.dit import DiTConfig
from repfusion.train import TrainConfig
from repfusion.training.engine import EngineConfig

SIZE, FRAMES, GRID, CHANNELS = 32, 9, (3, 4, 4), 4
TOKENS = 48
CAPTIONS = ("a red circle", "two blue square")


def clip_statistics(seed: int = 3) -> LatentStatistics:
    """Of normal features that are not normalised."""
    made = torch.Generator().manual_seed(seed)
    return LatentStatistics.of(2 + 0.5 * torch.randn(64, TOKENS, CHANNELS, generator=made))


def make_clip_columns(folder: Path, num: int = 8, others: dict[str, tuple[int, ...]] | None = None) -> Path:
    """curate/ and video_features/, with statistics, under `folder`, whose captions take turns and decide the
    features but for some noise; columns of normal numbers by their names and shapes.
    """
    rng = np.random.default_rng(0)
    shown = rng.standard_normal((len(CAPTIONS), TOKENS, CHANNELS))
    statistics = LatentStatistics.empty(TOKENS, CHANNELS)
    made: dict[str, list] = {name: [] for name in ("curate", "video_features", *(others or {}))}
    for i in range(num):
        key, turn = f"{i:06d}", i % len(CAPTIONS)
        array = (shown[turn] + 0.1 * rng.standard_normal((TOKENS, CHANNELS))).astype(np.float16)
        statistics.update(torch.from_numpy(array)[None])
        made["curate"].append((key, {"txt": CAPTIONS[turn].encode(), "json": json.dumps({}).encode()}))
        made["video_features"].append((key, {"video_features.npy": npy(array)}))
        for name, shape in (others or {}).items():
            made[name].append((key, {f"{name}.npy": npy(rng.standard_normal(shape).astype(np.float16))}))
    for name, samples in made.items():
        write_tar(folder / name / "00000.tar", samples)
    statistics.save(folder / "video_features" / "statistics.safetensors")
    return folder


def clip_model(vae: Path, mllm: Path, conditioning: str | dict) -> ModelConfig:
    """Over the video VAE and the language model of two folders."""
    return ModelConfig.model_validate(
        {
            "conditioning": conditioning,
            "mllm": mllm,
            "encoder": EncoderConfig(path=vae, image_size=SIZE, num_frames=FRAMES),
            "decoder": vae,
            "dit": DiTConfig(hidden_size=32, depth=2, num_heads=2),
        }
    )


def clip_training(folder: Path, model: ModelConfig, columns: Path, num_steps: int = 4) -> TrainConfig:
    """Of all columns that are there."""
    names = [one.name for one in columns.iterdir() if one.is_dir() and one.name != "curate"]
    return TrainConfig.model_validate(
        {
            "output_dir": folder,
            "data": {"images": columns / "curate", "columns": {name: columns / name for name in names}},
            "model": model,
            "engine": EngineConfig(precision="fp32", micro_batch_size=8, lr=5e-3, num_threads=1),
            "num_steps": num_steps,
            "global_batch_size": 8,
            "log_every_steps": 1,
        }
    )
