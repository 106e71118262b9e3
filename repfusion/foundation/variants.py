"""The LLaVA's second course over the frozen tower, then its siblings: taught on noise, language alone, and
larger.

Comparisons of what a language model has learned need them: all read the same texts, and the ones that see
read the same features.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration, PreTrainedModel

from repfusion.diffusion.flow import interpolate, shift_factor, shift_noise_level
from repfusion.foundation.config import FoundationConfig, LengthConfig
from repfusion.foundation.large import grow
from repfusion.foundation.optimise import Objective, optimise
from repfusion.foundation.perception import (
    CAPTION_WEIGHT,
    answer_loss,
    caption_loss,
    llava_config,
    save_mllm,
    token_loss,
)
from repfusion.foundation.pool import SceneBatch, ScenePool
from repfusion.latents.statistics import LatentStatistics
from repfusion.latents.tower import RepresentationEncoder
from repfusion.llm.tokenizer import load_tokenizer
from repfusion.pretrained.weights import load_transformers

Disturb = Callable[[Float[Tensor, "b n d"], torch.Generator], Float[Tensor, "b n d"]]


CAPTION_SHARE = 0.25
"""Captions read alone, for each dialogue of the second course: a reader is kept, no longer made."""


class SeenPool:
    """A pool's images as the frozen tower sees them, computed once."""

    def __init__(self, pool: ScenePool, folder: Path):
        self.pool = pool
        encoder = RepresentationEncoder.from_pretrained(folder / "vision_tower").to(pool.device)
        parts = [encoder(part.float() / 255) for part in pool.pixels.split(500)]
        self.features = torch.cat([part.half() for part in parts])
        self.statistics = LatentStatistics.empty(*self.features.shape[1:])
        for part in self.features.split(5_000):
            self.statistics.update(part)

    def of(self, batch: SceneBatch) -> Float[Tensor, "b n d"]:
        return self.features[batch.rows].float()


def train_judgement(
    seen: SeenPool, config: FoundationConfig, folder: Path, state: Path, until: float | None = None
) -> dict[str, float]:
    """Writes `llava` anew: it goes on with the dialogues of the second course, its tower frozen."""
    llava = load_transformers(LlavaForConditionalGeneration, folder / "llava", "LLaVA").to(seen.pool.device)
    objective = sight_objective(llava, seen, config.judgement, 7, lambda features, generator: features)
    shown = train_over_the_tower(llava, config, config.judgement, objective, state, until)
    save_mllm(llava, folder / "llava", folder / "llava")
    return shown


def train_noise_taught(
    seen: SeenPool, config: FoundationConfig, folder: Path, state: Path, until: float | None = None
) -> dict[str, float]:
    """Writes `llava_noise_taught`: the LLaVA, which goes on with its projector reading z_t at all noise
    levels of RepFusion's schedule.
    """
    llava = load_transformers(LlavaForConditionalGeneration, folder / "llava", "LLaVA").to(seen.pool.device)
    shift = shift_factor(config.num_tokens, config.vision_width, config.base_dim)

    def disturb(features: Tensor, generator: torch.Generator) -> Tensor:
        u = torch.rand(len(features), generator=generator, device=features.device)
        latents = seen.statistics.normalise(features)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        return seen.statistics.denormalise(interpolate(latents, noise, shift_noise_level(u, shift)))

    objective = sight_objective(llava, seen, config.noise_taught, 2, disturb)
    shown = train_over_the_tower(llava, config, config.noise_taught, objective, state, until)
    save_mllm(llava, folder / "llava", folder / "llava_noise_taught")
    return shown


def train_large(
    seen: SeenPool, config: FoundationConfig, folder: Path, state: Path, until: float | None = None
) -> dict[str, float]:
    """Writes `llava_large`, the LLaVA grown to another width and depth, which goes on as it did."""
    torch.manual_seed(6)
    small = load_transformers(LlavaForConditionalGeneration, folder / "llava", "LLaVA")
    size = {
        "text_width": config.large_width,
        "text_layers": config.large_layers,
        "text_heads": config.large_heads,
    }
    tokenizer = load_tokenizer(folder / "llava")
    large = LlavaForConditionalGeneration(llava_config(config.model_copy(update=size), tokenizer))
    grow(small, large)
    large.to(seen.pool.device)
    objective = sight_objective(large, seen, config.large, 6, lambda features, generator: features)
    shown = train_over_the_tower(large, config, config.large, objective, state, until)
    save_mllm(large, folder / "llava", folder / "llava_large")
    return shown


def train_over_the_tower(
    llava: LlavaForConditionalGeneration,
    config: FoundationConfig,
    length: LengthConfig,
    objective: Objective,
    state: Path,
    until: float | None = None,
) -> dict[str, float]:
    """Trains all of a LLaVA but its tower."""
    llava.requires_grad_(True).train()
    llava.model.vision_tower.requires_grad_(False)
    return optimise(llava, length, objective, state, config, until)


def sight_objective(
    llava: LlavaForConditionalGeneration, seen: SeenPool, length: LengthConfig, seed: int, disturb: Disturb
) -> Objective:
    """Answers of the second course about images whose features are disturbed, and captions alone."""
    pool, num_captions = seen.pool, max(1, round(length.batch_size * CAPTION_SHARE))

    def draw(step: int) -> tuple[Tensor, ...]:
        generator = pool.generator(seed, step)
        batch = pool.batch(length.batch_size, generator, pool.judgements, num_captions)
        return disturb(seen.of(batch), generator), *batch.texts

    def loss(
        features: Tensor, dialogues: Tensor, is_answer: Tensor, captions: Tensor, is_caption: Tensor
    ) -> dict[str, Tensor]:
        return {
            "answers": answer_loss(llava, features, dialogues, is_answer),
            "captions": CAPTION_WEIGHT * caption_loss(llava, captions, is_caption),
        }

    return Objective(draw, loss)


def train_language(
    pool: ScenePool, config: FoundationConfig, folder: Path, state: Path, until: float | None = None
) -> dict[str, float]:
    """Writes `language`: a language model of the LLaVA's geometry, on the same captions and on the second
    course's dialogues without their image.
    """
    torch.manual_seed(1)
    tokenizer = load_tokenizer(folder / "llava")
    twin = LlamaForCausalLM(llava_config(config, tokenizer).text_config).to(pool.device)

    def draw(step: int) -> tuple[Tensor, ...]:
        batch = pool.batch(config.language.batch_size, pool.generator(3, step), pool.judgements)
        return *without_images(batch, pool), batch.captions, batch.is_caption

    def loss(dialogues: Tensor, is_answer: Tensor, captions: Tensor, is_caption: Tensor) -> dict[str, Tensor]:
        hidden = twin.model(input_ids=dialogues, use_cache=False).last_hidden_state
        return {
            "answers": token_loss(twin.lm_head, hidden, dialogues, is_answer),
            "captions": CAPTION_WEIGHT * caption_loss(twin, captions, is_caption),
        }

    shown = optimise(twin, config.language, Objective(draw, loss), state, config, until)
    save_language(twin, folder)
    return shown


def without_images(batch: SceneBatch, pool: ScenePool) -> tuple[Tensor, Tensor]:
    """A batch's dialogues with their image tokens taken out; what is left moves up."""
    is_image = batch.dialogues == pool.image_id
    order = torch.argsort(is_image.int(), dim=1, stable=True)
    width = batch.dialogues.shape[1] - int(is_image[0].sum())
    return batch.dialogues.gather(1, order)[:, :width], batch.is_answer.gather(1, order)[:, :width]


def save_language(twin: PreTrainedModel, folder: Path) -> None:
    """Writes the twin with the LLaVA's tokenizer."""
    save_mllm(twin, folder / "llava", folder / "language")
    (folder / "language" / "preprocessor_config.json").unlink()
