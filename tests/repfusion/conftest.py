"""Tiny models of the real classes, written by save_pretrained and loaded by the code that users run."""

import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_columns import add_captions
from tiny_training import GRID, WIDTH, make_columns, make_foundation, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from repfusion.latents.load import EncoderConfig
from repfusion.latents.rae_decoder import RAEDecoder, RAEDecoderConfig
from repfusion.latents.statistics import LatentStatistics
from repfusion.model.build import build_model
from repfusion.model.config import ModelConfig
from repfusion.model.dit import DiTConfig
from repfusion.model.text_to_image import TextToImage
from repfusion.scenes.captions import caption_scene
from repfusion.scenes.world import draw_scene


@pytest.fixture(scope="session")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llava/`, `vision_tower/` and `decoder/`: 4 tokens of width 16, a language model of width 32."""
    return make_foundation(tmp_path_factory.mktemp("foundation"))


@pytest.fixture
def columns(tmp_path: Path) -> Path:
    """Of 20 samples in 3 shards, the test's own."""
    return make_columns(tmp_path)


@pytest.fixture
def captioned(columns: Path) -> Path:
    """`columns`, where every second sample has an alternative caption too."""
    return add_captions(columns)


@pytest.fixture(scope="session")
def statistics() -> LatentStatistics:
    rng = np.random.default_rng(3)
    features = 2.0 + 0.5 * rng.standard_normal((64, GRID**2, WIDTH))
    collected = LatentStatistics.empty(GRID**2, WIDTH)
    collected.update(torch.from_numpy(features).float())
    return collected


@pytest.fixture
def make_generator(foundation: Path, statistics: LatentStatistics) -> Callable[..., TextToImage]:
    """Builds from the tiny foundation, by a name in METHODS; `awake` moves the zero weights, so that
    everything counts.
    """

    def make(conditioning: str = "noisy_latents", awake: bool = True, **changes) -> TextToImage:
        torch.manual_seed(1)
        config = tiny_model(foundation, conditioning).model_copy(update=changes)
        generator = build_model(config, statistics)
        if awake:
            with torch.no_grad():
                for parameter in generator.trainable_state().values():
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return generator.eval()

    return make


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on captions, in the style of GPT-2: no begin token, no padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rng = np.random.default_rng(0)
    captions = [caption_scene(draw_scene(seed), rng) for seed in range(200)]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|image|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words learned from captions, with special tokens of its own in an unusual order."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    rng = np.random.default_rng(0)
    captions = [caption_scene(draw_scene(seed), rng) for seed in range(200)]
    special = ["[UNK]", "[IMG]", "[END]", "[START]", "[PAD]"]
    tokenizer.train_from_iterator(
        captions, trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        bos_token="[START]",
        eos_token="[END]",
        pad_token="[PAD]",
        padding_side="right",
    )


@pytest.fixture(scope="session", params=["bytes", pytest.param("words", marks=pytest.mark.slow)])
def elsewhere(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """The config of a LLaVA made elsewhere: other widths, depths, patch size, tokenizer, grouped queries."""
    torch.manual_seed(5)
    is_bytes = request.param == "bytes"
    tokenizer = byte_tokenizer() if is_bytes else word_tokenizer()
    folder = tmp_path_factory.mktemp(f"elsewhere_{request.param}")
    width, patch_size = (40, 12) if is_bytes else (24, 16)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=48,
        patch_size=patch_size,
        projection_dim=8,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=1,
            image_seq_length=(48 // patch_size) ** 2,
            vision_feature_layer=-2,
            multimodal_projector_bias=is_bytes,
            projector_hidden_act="gelu" if is_bytes else "silu",
        )
    )
    llava.save_pretrained(folder / "llava")
    tokenizer.save_pretrained(folder / "llava")
    side = 48 // patch_size
    decoder = RAEDecoderConfig(
        feature_dim=width, grid=(side, side), patch_size=patch_size, hidden_size=16, depth=1
    )
    RAEDecoder(decoder).save_pretrained(folder / "decoder")
    return ModelConfig(
        mllm=folder / "llava",
        encoder=EncoderConfig(path=folder / "llava"),
        decoder=folder / "decoder",
        dit=DiTConfig(hidden_size=48, depth=2, num_heads=4),
    )


@pytest.fixture(scope="session")
def clip_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP tower of 9 tokens whose weights are large enough for its layers to differ."""
    torch.manual_seed(7)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=24,
            patch_size=8,
            projection_dim=8,
        )
    )
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("clip")
    tower.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}'
    )
    return folder


@pytest.fixture
def free_port() -> int:
    """A TCP port of loopback that nobody listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
