"""UniDisc (arXiv 2503.20853): one transformer for captions and images as discrete tokens, trained by masked
diffusion; it draws, describes, invents both, and fills gaps in either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from repfusion.conditioning.base import Losses
from repfusion.config import WeightsFolder
from repfusion.data.dataset import Sample
from repfusion.data.order import fraction
from repfusion.data.recipe import Recipe
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.inputs import Inputs
from repfusion.llm.base import PromptTooLong
from repfusion.model.discrete.base import (
    CodeModel,
    CodeModelConfig,
    OnCodes,
    refuse_flow_settings,
    sampling,
)
from repfusion.model.discrete.filling import FillingConfig, check_noise, fill
from repfusion.model.discrete.masking import draw_masks, weighted
from repfusion.model.discrete.network import JointTransformer, JointTransformerConfig
from repfusion.model.discrete.text import CaptionRows
from repfusion.request import Request, refuse_images
from repfusion.weights import WEIGHTS


class UniDiscConfig(CodeModelConfig):
    """Masked diffusion over captions and codes."""

    kind: Literal["unidisc"] = "unidisc"
    text: WeightsFolder = WEIGHTS / "language"
    """Folder of a language model, whose tokenizer alone is read."""
    text_length: int = Field(default=32, ge=2)
    """Text tokens of a sequence, the caption's end counted."""
    network: JointTransformerConfig = JointTransformerConfig()
    """The transformer."""
    image_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples whose caption is shown whole, so that the image alone is found. UniDisc masks both
    at one noise level, always.
    """
    caption_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the samples whose image is shown whole, so that the caption alone is found."""
    filling: FillingConfig = FillingConfig()
    """How masked places are filled in sampling."""

    @model_validator(mode="after")
    def _shares_leave_something(self) -> "UniDiscConfig":
        if self.image_share + self.caption_share > 1:
            raise ValueError(
                f"image_share {self.image_share:g} and caption_share {self.caption_share:g} are more than 1 "
                "together; lower one"
            )
        return self

    @property
    def label(self) -> str:
        return "the model 'unidisc'"

    def describe(self) -> str:
        return f"unidisc, {self.network.depth} x {self.network.hidden_size}"


@dataclass(frozen=True)
class Canvas:
    """Captions and images with gaps: what stands at unknown places is not read."""

    text: Int[Tensor, "b l"]
    codes: Int[Tensor, "b n"]
    unknown: Bool[Tensor, "b t"]
    """What is to be found, of all tokens, text first."""


class UniDisc(CodeModel):
    """The transformer, with the tokens of captions and of a tokenizer's images.

    Raises:
        ValueError: a folder is none.
    """

    def __init__(self, config: UniDiscConfig):
        super().__init__()
        self.config: UniDiscConfig = config
        self.columns = config.columns
        self.streams = config.streams
        self.text = CaptionRows(config.text, config.text_length)
        given = config.text_length, self.text.num_ids, self.streams
        self.network = JointTransformer(config.network, *given)
        self.num_text = config.text_length

    @property
    def captions(self) -> CaptionRows:
        """The tokenizer of captions."""
        return self.text

    def layers(self) -> list[nn.Module]:
        return list(self.network.blocks)

    def collate(self, samples: Sequence[Sample], recipe: Recipe, seeds: Sequence[int]) -> Inputs:
        """Ids of a micro-batch, noise levels, what is masked and what of that is scored.

        Raises: ValueError: codes that are not the tokenizer's, or a caption that does not fit into a row; the
            message names the sample.
        """
        drawn = [recipe.draw(one, seed, {}) for one, seed in zip(samples, seeds, strict=True)]
        codes = self.stacked_codes(samples)
        t, masked = draw_masks(seeds, self.network.num_tokens)
        is_image, scored = self._modalities(), torch.ones_like(masked)
        for row, (seed, (_, branch)) in enumerate(zip(seeds, drawn, strict=True)):
            shown = self._shown(seed)
            if shown is not None:
                masked[row] &= is_image if shown == "caption" else ~is_image
            if branch == "none":  # the condition is a caption of which nothing is known
                scored[row] = is_image
                masked[row] |= ~is_image
        text = self._rows([request.prompt for request, _ in drawn], samples)
        return {"text": text, "codes": codes, "t": t, "masked": masked, "scored": scored & masked}

    def _shown(self, seed: int) -> Literal["caption", "image"] | None:
        """Which modality a sample shows whole."""
        chance = fraction("modality", seed)
        if chance < self.config.image_share:
            return "caption"
        return "image" if chance < self.config.image_share + self.config.caption_share else None

    def _modalities(self) -> Bool[Tensor, " t"]:
        """Which tokens are the image's."""
        return torch.arange(self.network.num_tokens) >= self.num_text

    def _rows(self, prompts: Sequence[str], samples: Sequence[Sample]) -> Int[Tensor, "b l"]:
        try:
            return self.text.rows(prompts)
        except PromptTooLong as error:
            place = samples[prompts.index(error.prompt)].place
            raise ValueError(f"{place}: {self.unfit_caption(error)}") from error

    def unfit_caption(self, error: PromptTooLong) -> str:
        return (
            f"its caption {error.prompt[:60]!r}... has {error.num_tokens} tokens, its end included, "
            f"model.text_length is {error.most}: raise that, or leave such samples out by "
            "curate.max_caption_tokens"
        )

    def forward(self, inputs: Inputs) -> Losses:
        """`image` and `text`: bounds in nats a token of the whole sequence, float32, which add up to that of
        both.
        """
        ids = self._ids(inputs["text"], inputs["codes"])
        states = self.network(ids.masked_fill(inputs["masked"], self.network.mask_id))
        found = {"image": states.new_zeros(len(ids)), "text": states.new_zeros(len(ids))}
        for section in self.network.sections:
            scores, wanted = self.network.scores(states, section), ids[:, section.places] - section.first_id
            losses = F.cross_entropy(scores.mT, wanted, reduction="none")
            scored = inputs["scored"][:, section.places]
            name = "text" if section.start == 0 else "image"
            own = weighted(losses, scored, inputs["t"], self.network.num_tokens)
            found[name] = found[name].float() + own
        return found

    def _ids(self, text: Int[Tensor, "b l"], codes: Int[Tensor, "b n"]) -> Int[Tensor, "b t"]:
        return torch.cat([text, codes + self.text.num_ids], dim=1)

    def noise_shape(self, config: SamplerConfig) -> tuple[int, int]:
        return config.num_steps, 2 * self.network.num_tokens

    def draw(
        self,
        requests: Sequence[Request],
        noise: Float[Tensor, "b s m"],
        config: SamplerConfig,
        negatives: Sequence[Request] | None = None,
        on_step: OnCodes | None = None,
    ) -> Int[Tensor, "b n"]:
        refuse_images(requests, self.config.kind)
        text = self.text.rows([one.prompt for one in requests])
        other = None if negatives is None else self.text.rows([one.prompt for one in negatives])
        codes = torch.zeros(len(requests), self.num_codes, dtype=torch.long)
        unknown = self._modalities().expand(len(requests), -1)
        return self.complete(Canvas(text, codes, unknown), noise, config, other, on_step).codes

    def describe(
        self,
        codes: Int[Tensor, "b n"],
        noise: Float[Tensor, "b s m"],
        config: SamplerConfig,
        beginnings: Sequence[str] | None = None,
    ) -> list[str]:
        """Captions of images, as `CodeModel.describe`; guidance leads away from what is said of none."""
        canvas = self.begun(beginnings or [""] * len(codes), codes)
        return self.text.texts(self.complete(canvas, noise, config).text)

    def invent(
        self, noise: Float[Tensor, "b s m"], config: SamplerConfig
    ) -> tuple[list[str], Int[Tensor, "b n"]]:
        """Captions and images together, out of nothing: there is nothing to guide by."""
        text = torch.full((len(noise), self.num_text), self.text.end_id)
        codes = torch.zeros(len(noise), self.num_codes, dtype=torch.long)
        unknown = torch.ones(len(noise), self.network.num_tokens, dtype=torch.bool)
        unguided = config.model_copy(update={"guidance_scale": 1.0})
        found = self.complete(Canvas(text, codes, unknown), noise, unguided)
        return self.text.texts(found.text), found.codes

    def begun(self, beginnings: Sequence[str], codes: Int[Tensor, "b n"]) -> Canvas:
        """Images whose captions begin as given and are to be written to their end."""
        text = self.text.rows(beginnings)
        unknown = torch.zeros(len(text), self.network.num_tokens, dtype=torch.bool)
        unknown[:, : self.num_text] = text == self.text.end_id
        return Canvas(text, codes, unknown)

    def painted(
        self, prompts: Sequence[str], codes: Int[Tensor, "b n"], region: Bool[Tensor, "b h w"]
    ) -> Canvas:
        """Images of which a region, true where something new is to stand, is to be drawn as the captions say:
        the codes of every stream whose square it touches.
        """
        unknown = torch.zeros(len(codes), self.network.num_tokens, dtype=torch.bool)
        for stream in self.streams:
            touched = F.adaptive_max_pool2d(region[:, None].float(), stream.grid).flatten(1) > 0
            unknown[:, self.num_text + stream.start : self.num_text + stream.stop] = touched.cpu()
        return Canvas(self.text.rows(prompts), codes, unknown)

    def complete(
        self,
        canvas: Canvas,
        noise: Float[Tensor, "b s m"],
        config: SamplerConfig,
        against: Int[Tensor, "b l"] | None = None,
        on_step: OnCodes | None = None,
    ) -> Canvas:
        """The canvas with its gaps filled. Guidance leads away from the same gaps beside a modality of which
        nothing is known: the text where codes are to be found, else the image; or beside the captions
        `against`.

        Raises:
            ValueError: noise of another shape, or a setting of flows alone.
        """
        refuse_flow_settings(config, self.config.label)
        check_noise(noise, len(canvas.text), self.noise_shape(config))
        device = self.device
        ids, unknown = self._ids(canvas.text, canvas.codes).to(device), canvas.unknown.to(device)
        is_image = self._modalities().to(device)
        finds_codes = (unknown & is_image).any(dim=1, keepdim=True)
        hidden = torch.where(finds_codes, ~is_image, is_image)
        other = None if against is None else against.to(device)

        def led_away(now: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
            if other is not None:
                return torch.cat([other, now[:, self.num_text :]], dim=1)
            return now.masked_fill(hidden, self.network.mask_id)

        def told(step: int, now: Int[Tensor, "b t"]) -> bool:
            assert on_step is not None
            return on_step(step, now[:, self.num_text :] - self.text.num_ids)

        with sampling(config, device):
            found = fill(
                self.network,
                ids,
                unknown,
                noise.to(device, torch.float32),
                self.config.filling,
                config.guidance_scale,
                led_away,
                None if on_step is None else told,
            )
        text, codes = found[:, : self.num_text], found[:, self.num_text :] - self.text.num_ids
        return Canvas(text, codes, torch.zeros_like(unknown))
