"""Scenes -> a LLaVA that sees, and its language-only twin that never saw an image.

The vision tower is trained end to end by two signals: the language model's answers, and pixels rebuilt from
its penultimate layer under noise, so that what a latent says survives the small errors a diffusion model
makes (cf. RAE's noise-augmented decoding).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from repfusion.config import Config
from repfusion.foundation.dialogues import IGNORED, encode_captions, encode_dialogues, write_dialogue
from repfusion.latents.rae_decoder import RAEDecoder, RAEDecoderConfig
from repfusion.pretrained.weights import load_transformers
from repfusion.scenes.captions import caption_scene
from repfusion.scenes.world import Scene, WorldConfig, draw_scene, render

PIXEL_MEAN, PIXEL_STD = 0.5, 0.5


class FoundationConfig(Config):
    image_size: int = 32
    """Pixels a side."""
    patch_size: int = 8
    """Pixels a side of a patch: (image_size / patch_size)^2 tokens."""
    vision_width: int = 64
    """Width of the tower, so of the latents."""
    vision_layers: int = 5
    """Layers of the tower; the last one only serves the standard CLIP geometry, features are the penultimate
    state.
    """
    text_width: int = 128
    """Width of the language model."""
    text_layers: int = 4
    """Layers of the language model."""
    num_scenes: int = 40_000
    """Distinct training scenes."""
    perception_steps: int = 4_000
    """Steps of LLaVA training."""
    language_steps: int = 1_000
    """Steps of the twin."""
    decoder_steps: int = 3_000
    """Steps of the RAE decoder."""
    batch_size: int = 128
    """Scenes a step."""
    refine_steps: int = 2_500
    """Steps in which LLaVA and decoder go on together."""
    polish_steps: int = 5_000
    """Steps of the decoder alone, on the tower as it then is."""
    learning_rate: float = 1e-3
    """Peak of the cosine schedule."""
    feature_noise: float = 0.6
    """Largest standard deviation of the noise on features under which pixels are rebuilt (features have unit
    variance).
    """

    refine_noise: float = 0.4
    """Largest standard deviation of that noise while refining."""

    large_width: int = 256
    """Width of the larger LLaVA's language model."""
    large_layers: int = 6
    """Layers of the larger LLaVA's language model."""
    large_steps: int = 800
    """Steps of the larger LLaVA, from the small one's weights grown to its size."""
    large_learning_rate: float = 3e-4
    """Peak learning rate of the larger LLaVA: it goes on, and does not begin."""
    large_batch_size: int = 64
    """Scenes a step of the larger LLaVA."""
    fluent_align_steps: int = 1_000
    """Steps in which the twin's LLaVA learns its projector alone."""
    fluent_steps: int = 4_000
    """Steps of projector and language model."""
    fluent_learning_rate: float = 2e-4
    """Peak learning rate of those steps; the projector alone takes `learning_rate`. At 5e-4 new combinations
    are seen better and prompts read worse (docs/log.md).
    """
    fluent_batch_size: int = 64
    """Scenes a step of the twin's LLaVA."""
    vae_channels: int = 16
    """Channels of the VAE's latents; its grid is the tower's at a factor of 8."""
    vae_steps: int = 2_000
    """Steps of the VAE."""
    vae_batch_size: int = 64
    """Scenes a step of the VAE."""
    vae_noise: float = 0.4
    """Largest noise on the VAE's latents while it is trained, in their standard deviations."""
    vae_polish_steps: int = 2_500
    """Steps in which the VAE goes on."""
    vae_polish_noise: float = 0.2
    """The noise meanwhile."""

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class ScenePool:
    """Training scenes with their pixels (uint8), drawn in random batches."""

    def __init__(self, config: FoundationConfig, seed: int = 0):
        world = WorldConfig(image_size=config.image_size)
        self.scenes = [
            draw_scene(seed + i, world) for i in tqdm(range(config.num_scenes), desc="scenes", mininterval=5)
        ]
        size = config.image_size
        self.pixels = np.empty((len(self.scenes), 3, size, size), np.uint8)
        for i, scene in enumerate(tqdm(self.scenes, desc="render", mininterval=5)):
            self.pixels[i] = np.round(render(scene, world) * 255)
        self.rng = np.random.default_rng(seed)

    def batch(self, size: int) -> tuple[list[Scene], Tensor]:
        chosen = self.rng.integers(len(self.scenes), size=size)
        return [self.scenes[i] for i in chosen], torch.from_numpy(self.pixels[chosen]).float() / 255


def llava_config(config: FoundationConfig, tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=4 * config.vision_width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_width // 32,
        image_size=config.image_size,
        patch_size=config.patch_size,
        projection_dim=config.vision_width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.text_width,
        intermediate_size=round(config.text_width * 8 / 3 / 32) * 32,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_width // 32,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=config.num_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def answer_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Next-token loss; the vocabulary is scored only where a label is learned."""
    learned = labels[:, 1:] != IGNORED
    return F.cross_entropy(head(hidden[:, :-1][learned]).float(), labels[:, 1:][learned])


def optimise(
    params: list[nn.Parameter],
    config: FoundationConfig,
    num_steps: int,
    loss_of_step: Callable[[int], Tensor],
    name: str,
) -> float:
    """AdamW, warm-up and cosine decay, bfloat16 autocast; returns the mean loss of the last 100 steps."""
    optimizer = torch.optim.AdamW(
        params, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    shape = [
        min(1.0, (step + 1) / 200) * (0.5 + 0.5 * np.cos(np.pi * step / num_steps)) + 0.01
        for step in range(num_steps + 1)
    ]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape[min(step, num_steps)])
    recent: list[float] = []
    bar = tqdm(range(num_steps), desc=name, mininterval=5)
    for step in bar:
        # The CPU's flash attention is slow in the backward pass of short sequences; the plain one is 1.5 x as
        # fast.
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            loss = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent = [*recent[-99:], loss.item()]
        if not np.isfinite(recent[-1]):
            raise RuntimeError(f"{name}: loss {recent[-1]} at step {step}")
        bar.set_postfix(loss=f"{np.mean(recent):.4f}", refresh=False)
    return float(np.mean(recent))


def joint_loss(
    llava: LlavaForConditionalGeneration,
    decoder: RAEDecoder,
    tokenizer: PreTrainedTokenizerFast,
    pool: ScenePool,
    config: FoundationConfig,
    feature_noise: float,
    pixel_weight: float,
) -> Callable[[int], Tensor]:
    """Answers about the image, captions alone (in every 4th step at a quarter of the weight), and pixels
    rebuilt from noised features.
    """

    def loss_of_step(step: int) -> Tensor:
        scenes, pixels = pool.batch(config.batch_size)
        normalised = (pixels - PIXEL_MEAN) / PIXEL_STD
        seen = llava.model.vision_tower(pixel_values=normalised, output_hidden_states=True)
        hidden = seen.hidden_states[-2][:, 1:]
        features = F.layer_norm(hidden.float(), (config.vision_width,))
        sigma = feature_noise * torch.rand(len(features), 1, 1)
        rebuilt = decoder(features + sigma * torch.randn_like(features))
        said = spoken_loss(llava, hidden, tokenizer, scenes, pool.rng)
        if step % 4 == 0:
            head, language_model = llava.lm_head, llava.model.language_model
            said = said + 0.25 * text_loss(head, language_model, tokenizer, scenes, pool.rng)
        return said + pixel_weight * F.l1_loss(rebuilt.float(), pixels)

    return loss_of_step


def spoken_loss(
    llava: LlavaForConditionalGeneration,
    hidden: Tensor,
    tokenizer: PreTrainedTokenizerFast,
    scenes: list[Scene],
    rng: np.random.Generator,
) -> Tensor:
    """Answers about images of which `hidden` is the tower's state."""
    inner = llava.model
    ids, labels = encode_dialogues(tokenizer, [write_dialogue(s, rng) for s in scenes], hidden.shape[1])
    embedded = inner.language_model.embed_tokens(ids)
    visual = inner.multi_modal_projector(hidden).to(embedded.dtype)
    embedded = embedded.masked_scatter((ids == llava.config.image_token_index)[..., None], visual)
    said = inner.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    return answer_loss(llava.lm_head, said, labels)


def frozen_tower_loss(
    llava: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pool: ScenePool,
    batch_size: int,
    captions: bool,
) -> Callable[[int], Tensor]:
    """Answers about images, and captions alone beside them if asked for; the tower does not learn."""
    tower = llava.model.vision_tower.eval().requires_grad_(False)

    def loss_of_step(step: int) -> Tensor:
        scenes, pixels = pool.batch(batch_size)
        with torch.no_grad():
            seen = tower(pixel_values=(pixels - PIXEL_MEAN) / PIXEL_STD, output_hidden_states=True)
        loss = spoken_loss(llava, seen.hidden_states[-2][:, 1:], tokenizer, scenes, pool.rng)
        if captions:
            loss = loss + text_loss(llava.lm_head, llava.model.language_model, tokenizer, scenes, pool.rng)
        return loss

    return loss_of_step


def train_llava(
    pool: ScenePool, tokenizer: PreTrainedTokenizerFast, config: FoundationConfig, folder: Path
) -> None:
    """Trains tower and LLaVA from scratch, with a small decoder that is thrown away."""
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(llava_config(config, tokenizer))
    grid = (config.image_size // config.patch_size,) * 2
    rebuild = RAEDecoder(
        RAEDecoderConfig(feature_dim=config.vision_width, grid=grid, patch_size=config.patch_size, depth=2)
    )
    loss = joint_loss(llava, rebuild, tokenizer, pool, config, config.feature_noise, pixel_weight=4.0)
    optimise([*llava.parameters(), *rebuild.parameters()], config, config.perception_steps, loss, "llava")
    save_mllm(llava, tokenizer, folder / "llava")
    save_half(llava.model.vision_tower, folder / "vision_tower")


def refine(
    pool: ScenePool, tokenizer: PreTrainedTokenizerFast, config: FoundationConfig, folder: Path
) -> None:
    """LLaVA and RAE decoder on together, pixels weighing more: features that tell a cross from a diamond at
    this size.
    """
    torch.manual_seed(3)
    llava = load_transformers(LlavaForConditionalGeneration, folder / "llava", "LLaVA")
    decoder = RAEDecoder.from_pretrained(folder / "decoder").requires_grad_(True).train()
    loss = joint_loss(llava, decoder, tokenizer, pool, config, config.refine_noise, pixel_weight=20.0)
    optimise([*llava.parameters(), *decoder.parameters()], config, config.refine_steps, loss, "refine")
    save_mllm(llava, tokenizer, folder / "llava")
    save_half(llava.model.vision_tower, folder / "vision_tower")
    decoder.save_pretrained(folder / "decoder", dtype=torch.float16)


def text_loss(
    head: nn.Module, language_model: nn.Module, tokenizer, scenes: list[Scene], rng: np.random.Generator
) -> Tensor:
    """Next-token loss on captions alone."""
    ids, labels = encode_captions(tokenizer, [caption_scene(scene, rng) for scene in scenes])
    return answer_loss(head, language_model(input_ids=ids, use_cache=False).last_hidden_state, labels)


def train_language_twin(
    pool: ScenePool, tokenizer: PreTrainedTokenizerFast, config: FoundationConfig, folder: Path
) -> LlamaForCausalLM:
    """Trains the language-only twin, of the same geometry, on the same texts: captions, and the
    dialogues without their image.
    """
    torch.manual_seed(1)
    twin = LlamaForCausalLM(llava_config(config, tokenizer).text_config)

    def loss_of_step(step: int) -> Tensor:
        scenes, _ = pool.batch(config.batch_size)
        ids, labels = encode_dialogues(
            tokenizer, [write_dialogue(s, pool.rng) for s in scenes], num_image_tokens=0
        )
        loss = answer_loss(twin.lm_head, twin.model(input_ids=ids, use_cache=False).last_hidden_state, labels)
        return loss + text_loss(twin.lm_head, twin.model, tokenizer, scenes, pool.rng)

    optimise(list(twin.parameters()), config, config.language_steps, loss_of_step, "language twin")
    twin.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return twin


def save_mllm(llava: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes half-precision weights, the tokenizer and the pixel normalisation."""
    save_half(llava, folder)
    tokenizer.save_pretrained(folder)


def save_half(model: PreTrainedModel, folder: Path) -> None:
    preprocessor = f'{{"image_mean": {[PIXEL_MEAN] * 3}, "image_std": {[PIXEL_STD] * 3}}}\n'
    model.to(torch.float16).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(preprocessor)
    model.float()
