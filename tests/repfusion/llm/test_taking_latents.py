"""A LLaVA's projector says of the latents of images what it says of the tower's hidden states."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from repfusion.latents.load import EncoderConfig
from repfusion.latents.statistics import LatentStatistics
from repfusion.model.build import build_model
from repfusion.model.config import ModelConfig
from repfusion.model.dit import DiTConfig

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "image_size": 84}
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "image_size": 336}
"""LLaVA-1.5's tower."""


def llava_of(folder: Path, foundation: Path, vision: dict[str, int], text_width: int) -> ModelConfig:
    """Random weights; a text model of two layers behind them."""
    torch.manual_seed(0)
    shutil.copytree(foundation / "llava", folder)
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=text_width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
    )
    tower = CLIPVisionConfig(patch_size=14, num_attention_heads=vision["hidden_size"] // 64, **vision)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=4, vision_feature_layer=-2)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    dit = DiTConfig(hidden_size=vision["hidden_size"], depth=1, num_heads=4)
    return ModelConfig(mllm=folder, encoder=EncoderConfig(path=folder), dit=dit)


def smooth_images(num: int, size: int) -> torch.Tensor:
    coarse = torch.rand(num, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)


def error(made: torch.Tensor, expected: torch.Tensor) -> float:
    return float((made - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("vision", "text_width", "num_images"),
    [
        pytest.param(SMALL, 48, 24, id="small"),
        pytest.param(CLIP_L, 256, 4, id="LLaVA-1.5", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_of_real_images(foundation, tmp_path, vision, text_width, num_images):
    """Equal but for how far a token's own scale lies from the mean of its place, which the statistics hold: a
    few per cent of the hidden state. With that mean for each token's own, what is left is float16.
    """
    config = llava_of(tmp_path / "llava", foundation, vision, text_width)
    encoder = config.encoder.load()
    statistics = LatentStatistics.empty(encoder.num_tokens, encoder.feature_dim)
    pixels = smooth_images(num_images, vision["image_size"])
    encodings = [encoder.encode(part) for part in pixels.split(2)]
    for one in encodings:
        statistics.update(one.features.half(), one.tokens)
    features = torch.cat([one.features for one in encodings])

    llava = LlavaForConditionalGeneration.from_pretrained(config.mllm).eval()
    values = (pixels - encoder.mean) / encoder.std
    hidden = torch.cat(
        [
            llava.model.vision_tower(part, output_hidden_states=True).hidden_states[-2][:, 1:]
            for part in values.split(2)
        ]
    )
    own = llava.model.multi_modal_projector
    model = build_model(config, statistics)
    said = model.conditioner.project(model.normalise(features.half()), torch.zeros(num_images))

    mean, std = (one[:, None].float() for one in statistics.tokens)
    typical = std * features + mean
    spread = error(typical, hidden)
    assert 1e-3 < spread < 0.1
    assert error(said, own(typical)) < 1e-3
    assert error(said, own(hidden)) < 1.5 * spread
