"""Scenes -> a LLaVA that sees, with its vision tower and the RAE decoder.

The tower is trained end to end by two signals: the language model's answers, and pixels rebuilt from its
penultimate layer under noise, so that what a latent says survives the small errors a diffusion model makes
(cf. RAE's noise-augmented decoding). The projector reads what latents are made of, the LayerNorm of that
layer; the layer itself is held near zero mean and unit variance, so that transformers' own LLaVA, which takes
it as it is, sees the same.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from repfusion.foundation.config import FoundationConfig
from repfusion.foundation.optimise import Objective, optimise
from repfusion.foundation.pool import ScenePool
from repfusion.latents.rae_decoder import RAEDecoder, RAEDecoderConfig
from repfusion.llm.tokenizer import load_tokenizer
from repfusion.llm.words import WORDS

PIXEL_MEAN, PIXEL_STD = 0.5, 0.5
CAPTION_WEIGHT = 0.5
"""Weight of the captions read alone, beside the answers: it keeps the language model a reader."""
UNLEARNED = -100
"""The label of an id that is not learned."""
SCALE_WEIGHT = 0.1
"""Weight of the penultimate layer's distance from zero mean and unit variance."""


def llava_config(config: FoundationConfig, tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=4 * config.vision_width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        projection_dim=config.vision_width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.text_width,
        intermediate_size=round(config.text_width * 8 / 3 / 32) * 32,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
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


def new_decoder(config: FoundationConfig) -> RAEDecoder:
    return RAEDecoder(
        RAEDecoderConfig(
            feature_dim=config.vision_width,
            grid=config.grid,
            patch_size=config.patch_size,
            hidden_size=config.decoder_width,
            depth=config.decoder_depth,
            num_heads=config.decoder_heads,
        )
    )


class Seeing(nn.Module):
    """A LLaVA and a decoder over the same tower, as they are trained together."""

    def __init__(self, llava: LlavaForConditionalGeneration, decoder: RAEDecoder):
        super().__init__()
        self.llava, self.decoder = llava, decoder
        tower = self.llava.model.vision_tower
        for unread in (tower.encoder.layers[-1], tower.post_layernorm):
            unread.requires_grad_(False)


def train_perception(
    pool: ScenePool, config: FoundationConfig, folder: Path, state: Path, until: float | None = None
) -> dict[str, float]:
    """Trains tower, LLaVA and decoder from scratch, and writes `llava`, `vision_tower` and `decoder`; `until`
    as of `optimise`.
    """
    torch.manual_seed(0)
    tokenizer = load_tokenizer(folder / "llava")
    llava = LlavaForConditionalGeneration(llava_config(config, tokenizer))
    both = Seeing(llava, new_decoder(config)).to(pool.device)
    objective = perception_objective(both, pool, config)
    shown = optimise(both, config.perception, objective, state, config, until)
    save_mllm(both.llava, folder / "llava", folder / "llava")
    save_half(both.llava.model.vision_tower, folder / "vision_tower")
    both.decoder.save_pretrained(folder / "decoder", dtype=torch.float16)
    return shown


def perception_objective(both: Seeing, pool: ScenePool, config: FoundationConfig) -> Objective:
    """Answers about the image, captions alone, and pixels rebuilt from noised features."""

    def draw(step: int) -> tuple[Tensor, ...]:
        generator = pool.generator(0, step)
        batch = pool.batch(config.perception.batch_size, generator, pool.dialogues)
        return batch.pixels, *batch.texts, feature_noise(config, len(batch.rows), generator)

    def loss(
        pixels: Tensor,
        dialogues: Tensor,
        is_answer: Tensor,
        captions: Tensor,
        is_caption: Tensor,
        noise: Tensor,
    ) -> dict[str, Tensor]:
        hidden = penultimate(both.llava, pixels)
        features = F.layer_norm(hidden, hidden.shape[-1:])
        rebuilt = both.decoder(features + noise)
        mean, variance = hidden.mean(-1), hidden.var(-1, unbiased=False)
        return {
            "answers": answer_loss(both.llava, features, dialogues, is_answer),
            "captions": CAPTION_WEIGHT * caption_loss(both.llava, captions, is_caption),
            "pixels": config.pixel_weight * F.l1_loss(rebuilt.float(), pixels),
            "scale": SCALE_WEIGHT * (mean.square() + (variance - 1).square()).mean(),
        }

    return Objective(draw, loss)


def polish_decoder(
    pool: ScenePool,
    encoder: nn.Module,
    config: FoundationConfig,
    folder: Path,
    state: Path,
    until: float | None = None,
) -> dict[str, float]:
    """The saved decoder goes on, on the frozen tower."""
    decoder = RAEDecoder.from_pretrained(folder / "decoder").requires_grad_(True).train().to(pool.device)

    def draw(step: int) -> tuple[Tensor, ...]:
        generator = pool.generator(1, step)
        pixels = pool.batch(config.polish.batch_size, generator, pool.dialogues).pixels
        return pixels, encoder(pixels) + feature_noise(config, len(pixels), generator)

    def loss(pixels: Tensor, features: Tensor) -> dict[str, Tensor]:
        return {"pixels": F.l1_loss(decoder(features).float(), pixels)}

    shown = optimise(decoder, config.polish, Objective(draw, loss), state, config, until)
    decoder.save_pretrained(folder / "decoder", dtype=torch.float16)
    return shown


def penultimate(
    llava: LlavaForConditionalGeneration, pixels: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, "b n d"]:
    """The tower's state that LLaVA-1.5 reads, patch tokens only."""
    tower = llava.model.vision_tower
    seen = tower(pixel_values=(pixels - PIXEL_MEAN) / PIXEL_STD, output_hidden_states=True)
    return seen.hidden_states[-2][:, 1:].float()


def feature_noise(
    config: FoundationConfig, num_images: int, generator: torch.Generator
) -> Float[Tensor, "b n d"]:
    """Gaussian noise on the features of images, a standard deviation for each up to the configured one."""
    device = generator.device
    sigma = config.feature_noise * torch.rand(num_images, 1, 1, generator=generator, device=device)
    shape = num_images, config.num_tokens, config.vision_width
    return sigma * torch.randn(shape, generator=generator, device=device)


def answer_loss(
    llava: LlavaForConditionalGeneration,
    features: Float[Tensor, "b n d"],
    ids: Int[Tensor, "b m"],
    is_answer: Bool[Tensor, "b m"],
) -> Float[Tensor, ""]:
    """Cross-entropy a token of answers about images of these features."""
    hidden = read_dialogues(llava, features, ids)
    return token_loss(llava.lm_head, hidden, ids, is_answer)


def read_dialogues(
    llava: LlavaForConditionalGeneration, features: Float[Tensor, "b n d"], ids: Int[Tensor, "b m"]
) -> Float[Tensor, "b m w"]:
    """Last hidden states over dialogues in which projected features stand in the image's place."""
    inner = llava.model
    embedded = inner.language_model.embed_tokens(ids)
    visual = inner.multi_modal_projector(features).to(embedded.dtype)
    embedded = embedded.masked_scatter((ids == llava.config.image_token_index)[..., None], visual)
    return inner.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state


def caption_loss(
    model: PreTrainedModel, captions: Int[Tensor, "b k"], is_caption: Bool[Tensor, "b k"]
) -> Float[Tensor, ""]:
    """Cross-entropy a token of captions without their image; of a LLaVA or a causal language model."""
    language_model = model.model.language_model if hasattr(model.model, "language_model") else model.model
    hidden = language_model(input_ids=captions, use_cache=False).last_hidden_state
    return token_loss(model.lm_head, hidden, captions, is_caption)


def token_loss(
    head: nn.Module,
    hidden: Float[Tensor, "b m w"],
    ids: Int[Tensor, "b m"],
    is_learned: Bool[Tensor, "b m"],
) -> Float[Tensor, ""]:
    """Cross-entropy a learned id."""
    labels = ids[:, 1:].masked_fill(~is_learned[:, 1:], UNLEARNED)
    return F.cross_entropy(
        head(hidden[:, :-1]).float().flatten(0, 1), labels.flatten(), ignore_index=UNLEARNED
    )


def save_mllm(llava: PreTrainedModel, tokenizer_folder: Path, folder: Path) -> None:
    """Writes half-precision weights, the tokenizer with its words, and the pixel normalisation."""
    save_half(llava, folder)
    load_tokenizer(tokenizer_folder).save_pretrained(folder)
    (folder / WORDS).write_text((tokenizer_folder / WORDS).read_text())


def save_half(model: PreTrainedModel, folder: Path) -> None:
    preprocessor = f'{{"image_mean": {[PIXEL_MEAN] * 3}, "image_std": {[PIXEL_STD] * 3}}}\n'
    model.to(torch.float16).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(preprocessor)
    model.float()
