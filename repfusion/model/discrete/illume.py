"""ILLUME+ (arXiv 2504.01934): a language model that goes on from a prompt, and from the codes of source
images, with the codes of an image, semantic before pixel; and from an image's codes with its caption.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import Field
from torch import Tensor, nn

from repfusion.codes.quantise import exact
from repfusion.codes.tokenizer import ImageTokenizer
from repfusion.conditioning.base import Losses
from repfusion.config import WeightsFolder
from repfusion.data.dataset import Sample
from repfusion.data.order import fraction
from repfusion.data.recipe import Recipe
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.images.square import square
from repfusion.inputs import Inputs
from repfusion.llm.base import LanguageModel, PromptTooLong, take
from repfusion.llm.load import load_language_model
from repfusion.model.discrete.base import (
    CodeModel,
    CodeModelConfig,
    OnCodes,
    refuse_flow_settings,
    sampling,
)
from repfusion.model.discrete.filling import check_noise, drawn_ids, uniforms_of
from repfusion.model.discrete.sequences import (
    SOURCE,
    TokenRow,
    Vocabulary,
    describing,
    drawing,
    padded,
    written,
)
from repfusion.request import Branch, Request, refuse_images
from repfusion.weights import WEIGHTS


class IllumeConfig(CodeModelConfig):
    """Autoregression over codes by a language model."""

    kind: Literal["illume"] = "illume"
    mllm: WeightsFolder = WEIGHTS / "llava"
    """Folder of the language model, or of a model that holds one."""
    train_llm: bool = True
    """Whether it is trained; else only the codes' embeddings and heads are."""
    max_sources: int = Field(default=0, ge=0)
    """Source images of a request at most, whose codes stand in the context and for which prompts leave room;
    above 0 the tokenizer's tower is loaded too.
    """
    caption_share: float = Field(default=0.25, ge=0, le=1)
    """Share of the samples without source images that are described instead of drawn."""
    caption_weight: float = Field(default=1.0, gt=0)
    """Weight of a caption's loss beside that of an image's codes."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the scores that codes are drawn by."""
    max_caption_tokens: int = Field(default=64, ge=1)
    """Tokens of a caption that is written, at most."""

    @property
    def tokens_beside(self) -> int:
        """Tokens that stand beside a prompt. Raises ValueError where the tokenizer's folder is none."""
        return (self.streams[-1].stop + 2) * (1 + self.max_sources)

    @property
    def reads_images(self) -> bool:
        return self.max_sources > 0

    @property
    def label(self) -> str:
        return "the model 'illume'"

    def describe(self) -> str:
        return f"illume over {self.mllm.name}, {'trained' if self.train_llm else 'frozen'}"


class Illume(CodeModel):
    """The language model, and what makes it read and write codes.

    Args:
        config: what it is made of.
        on_meta: shapes without memory: of weights the headers alone are read.

    Raises:
        ValueError: a folder is none, or the context has no room for the codes.
    """

    def __init__(self, config: IllumeConfig, on_meta: bool = False):
        super().__init__()
        self.config: IllumeConfig = config
        self.columns = config.columns
        self.streams = config.streams
        self.llm: LanguageModel = load_language_model(config.mllm, with_head=True, on_meta=on_meta)
        if not (self.llm.is_causal and self.llm.head is not None):
            raise ValueError(f"mllm {config.mllm}: expected a causal language model with a head")
        self.llm.projector = None  # images come as codes
        table = self.llm.language_model.get_input_embeddings()
        last = self.streams[-1]
        self.vocabulary = Vocabulary(table.num_embeddings, last.first_code + last.num_codes)
        self.llm.leave_room(config.tokens_beside)
        self.embed = nn.Embedding(self.vocabulary.num_codes + 2, self.llm.width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.heads = nn.ModuleDict(
            {one.name: nn.Linear(self.llm.width, one.num_codes) for one in self.streams}
        )
        if config.train_llm:
            self.llm.unfreeze()
        self.sources: SourceCodes | None = None
        if config.reads_images:
            self.sources = SourceCodes(ImageTokenizer.from_pretrained(config.tokenizer, True, on_meta))

    @property
    def captions(self) -> LanguageModel:
        """The language model, which reads the captions."""
        return self.llm

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def layers(self) -> list[nn.Module]:
        return self.llm.layers

    def frozen_parts(self) -> list[nn.Module]:
        parts = [] if self.config.train_llm else [self.llm.language_model, self.llm.head]
        return [one for one in parts if one is not None]

    def unfit_caption(self, error: PromptTooLong) -> str:
        return (
            f"its caption {error.prompt[:60]!r}... has {error.num_tokens} tokens, begin token included; the "
            f"context of model.mllm takes {error.most} beside the codes: leave such samples out by "
            "curate.max_caption_tokens"
        )

    def collate(self, samples: Sequence[Sample], recipe: Recipe, seeds: Sequence[int]) -> Inputs:
        """Rows of a micro-batch, right-padded, and the source images whose codes are filled in.

        Raises: ValueError: codes that are not the tokenizer's, a caption that does not fit, or too many
            source images; the message names the sample.
        """
        drawn = [recipe.draw(one, seed, {}) for one, seed in zip(samples, seeds, strict=True)]
        codes, rows, sources = self.stacked_codes(samples), [], []
        for sample, own, seed, (request, branch) in zip(samples, codes.tolist(), seeds, drawn, strict=True):
            is_described = not request.images and fraction("described", seed) < self.config.caption_share
            try:
                if is_described:
                    caption = [*self._text(request.prompt), self.llm.end_id]
                    rows.append(describing(self.vocabulary, self.llm.begin_id, own, caption))
                    continue
                row, images = self._drawing(request, branch, own)
            except PromptTooLong as error:
                raise ValueError(f"{sample.place}: {self.unfit_caption(error)}") from error
            except ValueError as error:
                raise ValueError(f"{sample.place}: {error}") from error
            rows.append(row)
            sources += images
        # there are no noise levels: the meters' losses by level are those of all samples
        found = {"ids": padded(rows, self.llm.pad_id)[0], "t": torch.zeros(len(rows))}
        return {**found, "codes": codes, **written(rows), **self._shown(sources)}

    def _text(self, prompt: str) -> list[int]:
        self.llm.check_lengths([prompt])
        return self.llm.token_ids([prompt])[0]

    def _drawing(
        self, request: Request, branch: Branch, codes: Sequence[int]
    ) -> tuple[TokenRow, list[UInt8[np.ndarray, "s s 3"]]]:
        """A request's row up to its image's codes, and its source images as they are encoded."""
        images = () if branch == "none" else request.images
        if len(images) > self.config.max_sources:
            raise ValueError(f"{len(images)} source images; model.max_sources is {self.config.max_sources}")
        prompt = [self.llm.begin_id, *(self._text(request.prompt) if branch == "full" else ())]
        row = drawing(self.vocabulary, prompt, codes, len(images), self.num_codes)
        side = 0 if self.sources is None else self.sources.tokenizer.image_size
        return row, [square(image, side) for image in images]

    @staticmethod
    def _shown(images: Sequence[UInt8[np.ndarray, "s s 3"]]) -> Inputs:
        return {"sources": torch.from_numpy(np.stack(images))} if images else {}

    def filled(self, inputs: Inputs) -> Int[Tensor, "b n"]:
        """Ids with the codes of source images in their places."""
        ids = inputs["ids"]
        if (images := inputs.get("sources")) is None:
            return ids
        assert self.sources is not None
        codes = self.sources(images) + self.vocabulary.num_text
        return ids.masked_scatter(ids == SOURCE, codes)

    def embedded(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
        """Embeddings of ids of the common vocabulary."""
        num_text = self.vocabulary.num_text
        is_text = ids < num_text
        text = self.llm.embed(ids.where(is_text, 0))
        codes = self.embed((ids - num_text).clamp(min=0))
        return torch.where(is_text[..., None], text, codes.to(text.dtype))

    def forward(self, inputs: Inputs) -> Losses:
        """`codes` and `caption`: mean cross-entropy a token, float32, 0 where a sample has none; the
        caption's is weighted.
        """
        ids = self.filled(inputs)
        # padding lies after all that counts, so that causal attention needs no mask
        states = self.llm.language_model(inputs_embeds=self.embedded(ids), use_cache=False).last_hidden_state
        before, total = inputs["first_code"] - 1, inputs["t"].new_zeros(len(ids))
        for stream in self.streams:
            own = following(states, before + stream.start, stream.num_tokens)
            wanted = inputs["codes"][:, stream.places] - stream.first_code
            scores = self.heads[stream.name](own).float()
            total = total + F.cross_entropy(scores.mT, wanted, reduction="none").sum(1)
        caption, mask = inputs["caption"], inputs["has_caption"]
        own = following(states, inputs["first_word"] - 1, caption.shape[1])
        words = F.cross_entropy(self.llm.logits(own).mT, caption, reduction="none")
        return {
            "codes": total / self.num_codes * ~inputs["is_described"],
            "caption": self.config.caption_weight * (words * mask).sum(1) / mask.sum(1).clamp(min=1),
        }

    def noise_shape(self, config: SamplerConfig) -> tuple[int, int]:
        return self.num_codes, 1

    def draw(
        self,
        requests: Sequence[Request],
        noise: Float[Tensor, "b s m"],
        config: SamplerConfig,
        negatives: Sequence[Request] | None = None,
        on_step: OnCodes | None = None,
    ) -> Int[Tensor, "b n"]:
        """Codes one after the other, all images at once, keys and values of what went before kept; as
        `CodeModel.draw`. There are as many steps as codes.
        """
        refuse_flow_settings(config, self.config.label, "num_steps")
        check_noise(noise, len(requests), self.noise_shape(config))
        if not self.config.reads_images:
            refuse_images(requests, self.config.kind)
        rows: list[tuple[Request, Branch]] = [(one, "full") for one in requests]
        if is_guided := config.guidance_scale != 1:
            other: Branch = "none" if negatives is None else "full"
            rows.extend((one, other) for one in negatives or requests)
        made = [self._drawing(request, branch, ()) for request, branch in rows]
        ids, real = padded([row for row, _ in made], self.llm.pad_id, on_left=True)
        inputs = {"ids": ids, **self._shown([image for _, images in made for image in images])}
        inputs = {name: one.to(self.device) for name, one in inputs.items()}
        chances = uniforms_of(noise.to(self.device, torch.float32))[..., 0]
        with sampling(config, self.device):
            reading = Decoding(self, self.filled(inputs), real.to(self.device))
            found: list[Tensor] = []
            for place in range(self.num_codes):
                stream = next(one for one in self.streams if place < one.stop)
                scores = self.heads[stream.name](reading.state).float()
                if is_guided:
                    own, other = scores.chunk(2)
                    scores = other + config.guidance_scale * (own - other)
                chance = chances[:, place, None]
                code, _ = drawn_ids(scores[:, None], chance, self.config.temperature)
                found.append(code[:, 0] + stream.first_code)
                if on_step is not None and on_step(place, torch.stack(found, dim=1)):
                    break
                if place + 1 < self.num_codes:
                    reading.append((found[-1] + self.vocabulary.num_text).repeat(1 + is_guided))
        codes = torch.stack(found, dim=1)
        return F.pad(codes, (0, self.num_codes - codes.shape[1]))

    def describe(
        self,
        codes: Int[Tensor, "b n"],
        noise: Float[Tensor, "b s m"],
        config: SamplerConfig,
        beginnings: Sequence[str] | None = None,
    ) -> list[str]:
        """Captions of images, as `CodeModel.describe`: the likeliest next token, up to an end token or
        `max_caption_tokens`; neither noise nor guidance counts.
        """
        begun = [self._text(one) for one in beginnings or [""] * len(codes)]
        begin_id = self.llm.begin_id
        rows = [
            describing(self.vocabulary, begin_id, own, words)
            for own, words in zip(codes.tolist(), begun, strict=True)
        ]
        ids, real = padded(rows, self.llm.pad_id, on_left=True)
        with sampling(config, self.device):
            reading = Decoding(self, ids.to(self.device), real.to(self.device))
            said = self._write(reading)
        found = []
        for row, words in zip(said.tolist(), begun, strict=True):
            own = row[: row.index(self.llm.end_id)] if self.llm.end_id in row else row
            found.append(self.llm.tokenizer.decode([*words, *own], skip_special_tokens=True).strip())
        return found

    def _write(self, reading: "Decoding") -> Int[Tensor, "b m"]:
        """Text after rows, until all of them have ended."""
        said: list[Tensor] = []
        has_ended = torch.zeros(len(reading.state), dtype=torch.bool, device=self.device)
        while True:
            said.append(self.llm.logits(reading.state[:, None])[:, 0].argmax(-1))
            has_ended |= said[-1] == self.llm.end_id
            if has_ended.all() or len(said) == self.config.max_caption_tokens:
                return torch.stack(said, dim=1)
            reading.append(said[-1])


def following(states: Float[Tensor, "b n c"], first: Int[Tensor, " b"], num: int) -> Float[Tensor, "b m c"]:
    """The states of `num` places of each row from a place of its own on; those after its end are of its
    last.
    """
    places = (first[:, None] + torch.arange(num, device=first.device)).clamp(max=states.shape[1] - 1)
    return take(states, places)


class SourceCodes:
    """The tokenizer of source images. It stands apart from the model's weights and computes in float32
    whatever those are cast to: else its codes were others than those of a column. Its FLOPs are not counted.
    """

    def __init__(self, tokenizer: ImageTokenizer):
        self.tokenizer = tokenizer

    def __call__(self, images: UInt8[Tensor, "b s s 3"]) -> Int[Tensor, "b n"]:
        """Codes of images of the tokenizer's size, on the images' device."""
        if images.is_meta:
            return torch.empty(len(images), self.tokenizer.num_tokens, dtype=torch.long, device="meta")
        self.tokenizer.to(images.device)
        with exact(images.device):
            return self.tokenizer.encode_images(images)


class Decoding:
    """Left-padded rows that are read once, and go on by a token each at a time."""

    def __init__(self, model: Illume, ids: Int[Tensor, "b n"], real: Bool[Tensor, "b n"]):
        self.model, self.mask = model, real.long()
        self.position = real.sum(1, keepdim=True)
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        self._run(ids, positions, None)

    def _run(self, ids: Int[Tensor, "b n"], positions: Int[Tensor, "b n"], cache: Any) -> None:
        out = self.model.llm.language_model(
            inputs_embeds=self.model.embedded(ids),
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        self.cache = out.past_key_values
        self.state: Float[Tensor, "b c"] = out.last_hidden_state[:, -1]
        """What follows each row is said by it."""

    def append(self, ids: Int[Tensor, " b"]) -> None:
        """Reads one token more of each row."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self._run(ids[:, None], self.position, self.cache)
        self.position = self.position + 1
