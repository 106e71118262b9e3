"""A tiny LLaVA, tower, decoder and column data set for the training tests: real classes, real tars,
seconds to make.
"""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from repfusion.data.columns import scan_tar
from repfusion.data.config import DataConfig
from repfusion.latents.load import EncoderConfig
from repfusion.latents.rae_decoder import RAEDecoder, RAEDecoderConfig
from repfusion.latents.statistics import LatentStatistics
from repfusion.model.config import ModelConfig
from repfusion.model.dit import DiTConfig
from repfusion.train import TrainConfig
from repfusion.training.engine import EngineConfig

METHODS = {
    "noisy_latents": {"method": "noisy_latents"},
    "noisy_latents_cross": {"method": "noisy_latents", "interface": "cross_attention"},
    "noisy_latents_trained": {
        "method": "noisy_latents",
        "train_llm": True,
        "bidirectional": True,
        "captioning": {"weight": 0.5, "share": 0.5},
    },
    "text_embed": {"method": "text_embed"},
    "text_embed_in_context": {"method": "text_embed", "interface": "in_context"},
    "lap": {"method": "lap", "lap": {"taps": [0, 1, -1]}},
    "noisy_latents_lap": {"method": "noisy_latents", "lap": {"taps": [1, -1], "refiner_depth": 1}},
    "queries": {"method": "queries"},
    "queries_timestep": {"method": "queries", "reads_time": True},
    "queries_connector": {
        "method": "queries",
        "interface": "cross_attention",
        "num_queries": 3,
        "connector_depth": 1,
    },
    "transfusion": {"method": "transfusion", "captioning": {"share": 0.5}},
    "one_layer": {"method": "one_layer", "layer": -2, "refiner_depth": 1},
    "channel_concat": {"method": "channel_concat", "taps": [0, 1, -1]},
    "all_layers": {"method": "all_layers", "width": 24},
    "hidden_injection": {"method": "hidden_injection"},
    "layer_per_block": {"method": "layer_per_block"},
    "key_values": {"method": "key_values"},
    "unifusion": {"method": "unifusion", "lap": {"taps": [0, -1], "refiner_depth": 1}},
    "unifusion_references": {
        "method": "unifusion",
        "lap": {"taps": [0, -1], "refiner_depth": 1},
        "kept_references": True,
    },
    "blip3o": {"method": "blip3o", "num_queries": 3, "width": 24},
    "li_dit": {"method": "li_dit", "instruction": "a red", "refiner_depth": 1},
    "metaquery": {"method": "metaquery", "num_queries": 3, "connector_depth": 1, "width": 24, "gain": 2.0},
}
"""`model.conditioning` of every method and of its variants, by a name for tests."""
DISTINCT = ("noisy_latents", "text_embed", "queries_connector", "transfusion", "key_values", "unifusion")
"""Methods that differ most: in what the language model reads, when it reads it, how the denoiser takes it.
The others in METHODS are put together of what these have.
"""
CONTRARY = ("noisy_latents", "unifusion")
"""The two of DISTINCT that differ most: read at every step and added to tokens, read once and in context."""
APART = {"llm_controller": {"method": "llm_controller", "adds_noise": False, "trains_generator": True}}
"""Those of methods that have their whole models' tests of their own (conditioning/related/), most of them
slow.
"""


def sparing(names: Iterable[str], fast: Sequence[str] = DISTINCT) -> list[Any]:
    """Names of methods for a test that takes long: all but those in `fast` are left to the slow tests."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


WORDS = ["a", "red", "green", "blue", "circle", "square", "left", "of", "and", "two"]
IMAGE_SIZE, GRID, WIDTH = 32, 2, 16


def make_foundation(
    folder: Path,
    tower_width: int = WIDTH,
    text_width: int = 32,
    text_layers: int = 2,
    grid: int = GRID,
    knows_images: bool = True,
) -> Path:
    """llava/, vision_tower/ and decoder/ under `folder`; the tokenizer knows the token of images, or reads it
    as text.
    """
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"] * knows_images,
        model_max_length=48,
    )
    vision = CLIPVisionConfig(
        hidden_size=tower_width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=IMAGE_SIZE // grid,
        projection_dim=tower_width,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=text_width,
        intermediate_size=8 * text_width // 3,
        num_hidden_layers=text_layers,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=4,
        image_seq_length=grid**2,
        vision_feature_layer=-2,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder / "llava")
    fast.save_pretrained(folder / "llava")
    CLIPVisionModel(vision).save_pretrained(folder / "vision_tower")
    RAEDecoder(
        RAEDecoderConfig(
            feature_dim=tower_width, grid=(grid, grid), patch_size=IMAGE_SIZE // grid, hidden_size=16, depth=1
        )
    ).save_pretrained(folder / "decoder")
    return folder


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(path), encoder=False, mtime=0) as tar:
        for key, members in samples:
            tar.write({"__key__": key, **members})


def scan_and_replace(shard: Path, member: str, content: bytes) -> None:
    """Overwrites a member's bytes by others of the same length."""
    offset, size = scan_tar(shard)[member]
    assert len(content) == size
    data = bytearray(shard.read_bytes())
    data[offset : offset + size] = content
    shard.write_bytes(data)


def make_columns(
    folder: Path,
    num_samples: int = 20,
    shard_samples: int = 8,
    grid: int = GRID,
    width: int = WIDTH,
    seed: int = 0,
) -> Path:
    """curate/, image_features/ (with statistics) and prompt_features/ under `folder`; odd samples have two
    captions.
    """
    statistics = LatentStatistics.empty(grid**2, width)
    rng = np.random.default_rng(seed)
    for first in range(0, num_samples, shard_samples):
        images, features, texts = [], [], []
        for i in range(first, min(first + shard_samples, num_samples)):
            key, caption = f"{i:06d}", " ".join(WORDS[(i + k) % len(WORDS)] for k in range(3))
            array = rng.standard_normal((grid**2, width)).astype(np.float16)
            statistics.update(torch.from_numpy(array)[None])
            alternatives = {"captions": [caption, f"two {caption}"]} if i % 2 else {}
            images.append(
                (key, {"txt": caption.encode(), "json": json.dumps(alternatives).encode(), "png": b"unread"})
            )
            features.append((key, {"image_features.npy": npy(array)}))
            texts.append((key, {"prompt_features.npy": npy(rng.standard_normal((4, 32)).astype(np.float16))}))
        name = f"{first // shard_samples:05d}.tar"
        write_tar(folder / "curate" / name, images)
        write_tar(folder / "image_features" / name, features)
        write_tar(folder / "prompt_features" / name, texts)
    statistics.save(folder / "image_features" / "statistics.safetensors")
    return folder


def tiny_model(foundation: Path, conditioning: str = "noisy_latents", **changes) -> ModelConfig:
    """`conditioning` is a name in METHODS or APART, `changes` are the DiT's."""
    return ModelConfig(
        conditioning=(METHODS | APART)[conditioning],
        mllm=foundation / "llava",
        encoder=EncoderConfig(path=foundation / "vision_tower"),
        decoder=foundation / "decoder",
        dit=DiTConfig(hidden_size=24, depth=2, num_heads=2, **changes),
    )


def tiny_data(columns: Path, **changes) -> DataConfig:
    """What `make_columns` wrote, all of it."""
    folders = {name: columns / name for name in ("image_features", "prompt_features")}
    return DataConfig(**{"images": columns / "curate", "columns": folders, **changes})


def tiny_train(
    foundation: Path, columns: Path, output_dir: Path, engine: dict | None = None, **changes
) -> TrainConfig:
    """Four float32 steps of eight samples."""
    settings = {"precision": "fp32", "micro_batch_size": 8, "warmup_steps": 2, "lr": 1e-2, "num_threads": 1}
    return TrainConfig(
        **{
            "output_dir": output_dir,
            "data": tiny_data(columns),
            "model": tiny_model(foundation),
            "engine": EngineConfig(**{**settings, **(engine or {})}),
            "num_steps": 4,
            "global_batch_size": 8,
            "checkpoint_every_steps": 2,
            "log_every_steps": 1,
            **changes,
        }
    )
