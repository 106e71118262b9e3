"""A tiny folder of every family of models that is read, as its library writes it, and what reads it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderDC, AutoencoderKL
from tiny_vlms import SAVES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from repfusion.latents.load import EncoderConfig, load_decoder
from repfusion.latents.rae_decoder import RAEDecoder, RAEDecoderConfig
from repfusion.llm.load import load_language_model

WORDS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "a", "red", "circle")
WIDTH, LAYERS = 16, 2
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
IMAGES = {"image_size": 16, "patch_size": 8}
VISION = SIZES | IMAGES | {"intermediate_size": 24}
DINO = SIZES | IMAGES | {"mlp_ratio": 2}
TEXT = SIZES | {"vocab_size": 99, "intermediate_size": 24}
CAUSAL = SIZES | {
    "vocab_size": len(WORDS),
    "intermediate_size": 24,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_causal(name: str, folder: Path, **more: Any) -> None:
    config = getattr(transformers, f"{name}Config")(**CAUSAL | more)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def t5_tokenizer(pieces: Iterable[tuple[str, float]] = ()) -> PreTrainedTokenizerFast:
    """T5's own, whose vocabulary holds its control tokens as words that are likelier than any other."""
    control = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = list(pieces) or [("▁", -2.0), *((f"▁{word}", -3.0) for word in WORDS[5:])]
    extra = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(2))]
    return transformers.T5TokenizerFast(vocab=[*control, *words, *extra], extra_ids=2)


def save_t5(name: str, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **more: Any) -> None:
    tokenizer = tokenizer or t5_tokenizer()
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": LAYERS, "num_heads": 2}
    config = transformers.T5Config(
        **sizes | {"vocab_size": len(tokenizer), "decoder_start_token_id": 0} | more
    )
    getattr(transformers, name)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_llava(folder: Path, vision: Any) -> None:
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**CAUSAL), image_token_index=4
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def save_kl(folder: Path) -> None:
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=3,
        norm_num_groups=4,
        sample_size=16,
    ).save_pretrained(folder)


def save_dc(folder: Path) -> None:
    AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    ).save_pretrained(folder)


def clip() -> Any:
    return transformers.CLIPVisionConfig(**VISION, projection_dim=8)


def siglip(**more: Any) -> Any:
    return transformers.SiglipVisionConfig(**VISION, **more)


def save_clip(folder: Path) -> None:
    text = transformers.CLIPTextConfig(**TEXT, max_position_embeddings=8)
    config = transformers.CLIPConfig(vision_config=clip(), text_config=text, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)


def save_siglip(folder: Path) -> None:
    text = transformers.SiglipTextConfig(**TEXT, max_position_embeddings=8)
    config = transformers.SiglipConfig(vision_config=siglip(), text_config=text)
    transformers.SiglipModel(config).save_pretrained(folder)


def language_model(folder: Path, on_meta: bool = False) -> torch.nn.Module:
    return load_language_model(folder, with_head=True, on_meta=on_meta)


def seeing(folder: Path, on_meta: bool = False) -> torch.nn.Module:
    return load_language_model(folder, with_head=True, on_meta=on_meta, with_eyes=True)


def encoder(folder: Path, on_meta: bool = False) -> torch.nn.Module:
    return EncoderConfig(path=folder).load(on_meta)


def sized_encoder(folder: Path, on_meta: bool = False) -> torch.nn.Module:
    return EncoderConfig(path=folder, image_size=16).load(on_meta)


def decoder(folder: Path, on_meta: bool = False) -> torch.nn.Module:
    return load_decoder(folder, (2, 2), on_meta)


@dataclass(frozen=True)
class Family:
    """How a folder of a family is written, and read."""

    save: Callable[[Path], Any]
    load: Callable[..., torch.nn.Module]
    own: str = ""
    """How the names of its own weights begin, where others lie beside them."""
    file: str = "model.safetensors"


VAE_FILE = "diffusion_pytorch_model.safetensors"
FAMILIES: dict[str, Family] = {
    "llava": Family(lambda to: save_llava(to, clip()), language_model),
    "llava_siglip": Family(lambda to: save_llava(to, siglip(vision_use_head=False)), language_model),
    "llama": Family(lambda to: save_causal("Llama", to), language_model),
    "mistral": Family(lambda to: save_causal("Mistral", to), language_model),
    "qwen2": Family(lambda to: save_causal("Qwen2", to), language_model),
    "qwen2_tied": Family(lambda to: save_causal("Qwen2", to, tie_word_embeddings=True), language_model),
    "qwen3": Family(lambda to: save_causal("Qwen3", to), language_model),
    "gemma": Family(lambda to: save_causal("Gemma", to), language_model),
    **{name: Family(SAVES[name], seeing) for name in ("qwen2_5_vl", "qwen3_vl", "internvl")},
    "phi3": Family(lambda to: save_causal("Phi3", to), language_model),
    "t5_encoder": Family(lambda to: save_t5("T5EncoderModel", to), language_model),
    "t5": Family(
        lambda to: save_t5("T5ForConditionalGeneration", to, tie_word_embeddings=False),
        language_model,
        "encoder.",
    ),
    "clip_tower": Family(lambda to: transformers.CLIPVisionModel(clip()).save_pretrained(to), encoder),
    "clip": Family(save_clip, encoder, "vision_model."),
    "siglip_tower": Family(lambda to: transformers.SiglipVisionModel(siglip()).save_pretrained(to), encoder),
    "siglip": Family(save_siglip, encoder, "vision_model."),
    "llava_tower": Family(lambda to: save_llava(to, clip()), encoder),
    "dinov2": Family(
        lambda to: transformers.Dinov2Model(transformers.Dinov2Config(**DINO)).save_pretrained(to), encoder
    ),
    "dinov2_with_registers": Family(
        lambda to: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**DINO)
        ).save_pretrained(to),
        encoder,
    ),
    "rae_decoder": Family(
        lambda to: RAEDecoder(
            RAEDecoderConfig(feature_dim=WIDTH, grid=(2, 2), patch_size=8, hidden_size=16, depth=1)
        ).save_pretrained(to),
        decoder,
    ),
    "kl_encoder": Family(save_kl, encoder, file=VAE_FILE),
    "kl_decoder": Family(save_kl, decoder, file=VAE_FILE),
    "dc": Family(save_dc, sized_encoder, file=VAE_FILE),
}
