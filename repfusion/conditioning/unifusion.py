"""UniFusion (arXiv 2510.12789): a frozen model that sees is the one encoder of prompts and reference images,
read as one chat, pooled over layers (LAP); with VERIFI it rewrites the prompt within that chat.

The activations of system prompt, template and, where there is a rewriting, instruction never reach the DiT:
image and decoded tokens do, which have attended to them.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from repfusion.conditioning.base import (
    Conditioner,
    Context,
    ContextInterface,
    MethodConfig,
    Prepared,
    frozen_reading,
)
from repfusion.conditioning.lap import LapSettings
from repfusion.conditioning.related.maven import ImageTokens, ReferenceSelection, SelectionConfig
from repfusion.config import Config
from repfusion.data.order import fraction
from repfusion.data.readers import REWRITES, CaptionArray, Reader
from repfusion.inputs import Inputs
from repfusion.llm.base import LanguageModel
from repfusion.llm.chats.batch import ChatBatch, num_kept, pack, tokenise_chats, with_written
from repfusion.llm.chats.eyes import text_positions
from repfusion.llm.chats.format import Chat, ChatPart
from repfusion.llm.chats.read import read_chats
from repfusion.llm.chats.rewriting import rewrite
from repfusion.request import Branch, Request

log = logging.getLogger(__name__)


class RewritingConfig(Config):
    """VERIFI's habit: how prompts are rewritten unless a request says otherwise."""

    system: str = Field(default="rewrite", min_length=1)
    """System prompt under which the language model rewrites."""
    max_new_tokens: int = Field(default=64, ge=1)
    """A longer rewriting counts as endless, and the prompt itself serves."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the training's samples that are shown with their rewriting; the others with the caption as it
    is, so that a call may leave rewriting out.
    """


class UniFusionConfig(MethodConfig):
    reads_images: ClassVar[bool] = True
    method: Literal["unifusion"] = "unifusion"
    """Prompt and images in one chat with a model that sees, pooled over layers, the same at every step."""
    interface: ContextInterface = "in_context"
    """How the DiT takes the pooled tokens."""
    lap: LapSettings = LapSettings()
    """What is pooled."""
    image_lap: bool = False
    """Whether image tokens are pooled by layers of their own."""
    rewriting: RewritingConfig | None = None
    """How prompts are rewritten; None takes them as they are."""
    kept_references: bool = False
    """Whether image tokens see each other alone in the DiT, as at noise level 0, so that their keys and
    values are computed once for all steps (FLUX.2 klein). Only in context: cross-attention keeps all.
    """
    selection: SelectionConfig | None = None
    """Which tokens of images reach the DiT, beside discrete ones of theirs (MaVEn); None is all."""

    @model_validator(mode="after")
    def _kept_in_context(self) -> "UniFusionConfig":
        if self.kept_references and not self.is_in_context:
            raise ValueError(
                f"kept_references with interface {self.interface}, which keeps all keys and values anyway; "
                "leave kept_references out, or set interface: in_context"
            )
        return self

    @property
    def columns(self) -> Mapping[str, Reader]:
        return {} if self.rewriting is None else {REWRITES: CaptionArray(is_required=True, sees_images=True)}

    @property
    def needs_head(self) -> bool:
        return True  # a request may ask for a rewriting of its own


@dataclass(frozen=True)
class _Asked:
    """A request as it is put to the language model."""

    chat: Chat
    written: Sequence[int] = ()
    is_open: bool = False
    """Whether the rewriting is still to be written."""


class UniFusionConditioner(Conditioner):
    """Pooled states of images and prompt, or of its rewriting, as the one context of all steps."""

    def __init__(self, llm: LanguageModel, config: UniFusionConfig = UniFusionConfig()):
        super().__init__()
        self.llm = llm
        llm.projector = None  # its eyes have their own; left in, it would count as trainable
        self.rewriting = config.rewriting
        self.max_new_tokens = (config.rewriting or RewritingConfig()).max_new_tokens
        self.taps = config.lap.taps_of(len(llm.layers))
        self.kept_references = config.kept_references
        self.context_widths = (llm.width,) * (2 if config.kept_references else 1)
        self.lap = config.lap.pooling(llm)
        self.image_lap = config.lap.pooling(llm) if config.image_lap else None
        self.select: ReferenceSelection | None = None
        self.selection = config.selection
        if config.selection is not None:
            self.select = ReferenceSelection(llm.width, config.selection)

    def collate(
        self, requests: Sequence[Request], branches: Sequence[Branch], seeds: Sequence[int] | None = None
    ) -> Inputs:
        """Chats, which of their tokens condition, and the prompts that are still to be rewritten: in training
        none, there a column holds the rewritings.
        """
        requests = requests if seeds is None else [*map(self._shown, requests, seeds)]
        asked = [self._asked(*pair, seeds is None) for pair in zip(requests, branches, strict=True)]
        room = self.max_new_tokens if any(one.is_open for one in asked) else 0
        chats = [one.chat for one in asked]
        batch = tokenise_chats(self.llm, chats, [one.written for one in asked], room)
        return {
            "chats": batch,
            "kept": _Kept.of(batch, self.selection),
            "open": [one.is_open for one in asked],
            "prompts": [chat.instruction for chat in chats],
        }

    def _shown(self, request: Request, seed: int) -> Request:
        """A training's request, as its seed has it shown: with its rewriting, or as it is."""
        is_plain = self.rewriting is None or fraction("rewriting", seed) >= self.rewriting.share
        return replace(request, rewrite=False) if is_plain else request

    def _asked(self, request: Request, branch: Branch, is_sampling: bool) -> _Asked:
        if branch == "none":
            return _Asked(Chat())
        if branch == "images":
            return _Asked(Chat("", request.images))
        habit = None if self.rewriting is None else self.rewriting.system
        system = habit if request.rewrite is None else request.rewrite or None
        known = request.computed.get(REWRITES)
        if system is None or (known is None and not is_sampling):
            return _Asked(Chat(request.prompt, request.images))
        written = () if known is None else known.tolist()
        return _Asked(Chat(request.prompt, request.images, system), written, known is None)

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """Pooled states, real tokens first, those of images apart where the DiT keeps them; `reuse` changes
        nothing: they are static.
        """
        batch, which = inputs["chats"], inputs["kept"]
        with frozen_reading(batch.ids.device):
            if any(inputs["open"]):
                batch = self._written(batch, inputs["open"], inputs["prompts"])
                which = _Kept.of(batch, self.selection)
            # the embeddings first, by which images are told apart
            states = read_chats(self.llm, batch, self.taps if self.select is None else (0, *self.taps))
        states, keep = [state.float() for state in states], which.keep
        selected = None
        if self.select is not None and which.images is not None:
            is_text = keep & ~batch.is_any(ChatPart.IMAGE)
            selected = self.select(states.pop(0), states[-1], is_text, which.images)
            keep = is_text | selected.keep
        packed, mask = pack(states, keep, which.most)
        beside = batch.is_any(ChatPart.IMAGE)[..., None], positions_of(batch, which.keep)
        (is_image, positions), _ = pack(beside, keep, which.most)
        is_image = is_image[..., 0]
        context = Context(self._pooled(packed, mask, is_image), mask, positions)
        if selected is not None and which.images is not None:
            (gates,), _ = pack([selected.gates[..., None]], keep, which.most)
            places = which.images.places
            context = _beside(context, gates, Context(selected.tokens, selected.mask, places))
            mask = torch.cat([mask, selected.mask], dim=1)
            is_image = torch.cat([is_image, torch.ones_like(selected.mask)], dim=1)
        if not self.kept_references:
            return Prepared(static=(context,))
        parts = (mask & ~is_image, which.most_text), (mask & is_image, which.most_images)
        return Prepared(static=tuple(_part(context, *part) for part in parts))

    def _written(self, batch: ChatBatch, is_open: Sequence[bool], prompts: Sequence[str]) -> ChatBatch:
        """The chats with what the language model writes after those that ask for it. A warning in the log
        counts the prompts that it could not rewrite.
        """
        found = rewrite(self.llm, batch, prompts, self.max_new_tokens)
        asked = [one for one, wanted in zip(found, is_open, strict=True) if wanted]
        if lost := Counter(one.reason for one in asked if one.reason is not None):
            log.warning(
                "rewritings of %d prompts: %s (endless: no end within %d tokens); those prompts serve "
                "themselves",
                len(asked),
                ", ".join(f"{number} {reason}" for reason, number in sorted(lost.items())),
                self.max_new_tokens,
            )
        written = [one.ids if wanted else () for one, wanted in zip(found, is_open, strict=True)]
        return with_written(self.llm, batch, written)

    def _pooled(
        self,
        states: Sequence[Float[Tensor, "b m c"]],
        mask: Bool[Tensor, "b m"],
        is_image: Bool[Tensor, "b m"],
    ) -> Float[Tensor, "b m c"]:
        if self.image_lap is None:
            return self.lap(states, mask)
        # a place of a modality that a row lacks is read all the same: attention to nothing has no value
        text, images = (self._never_empty(mask & own) for own in (~is_image, is_image))
        return torch.where(is_image[..., None], self.image_lap(states, images), self.lap(states, text))

    @staticmethod
    def _never_empty(mask: Bool[Tensor, "b m"]) -> Bool[Tensor, "b m"]:
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        return mask | (first & ~mask.any(1, keepdim=True))


@dataclass(frozen=True)
class _Kept:
    """Which tokens of a batch condition, and the most of a row, known on the CPU: of all, of text, of
    images.
    """

    keep: Bool[Tensor, "b n"]
    most: int
    most_text: int
    most_images: int
    images: ImageTokens | None = None
    """Where images are, of which a share of `keep` is selected; discrete tokens count among those of images,
    and not in `most`.
    """

    @classmethod
    def of(cls, batch: ChatBatch, selection: SelectionConfig | None = None) -> "_Kept":
        keep, is_image = kept(batch), batch.is_any(ChatPart.IMAGE)
        most_text = num_kept(keep & ~is_image)
        if selection is None:
            return cls(keep, num_kept(keep), most_text, num_kept(keep & is_image))
        images = ImageTokens.of(batch, selection)
        of_text = (keep & ~is_image).sum(1).tolist()
        most = max(1, *(text + of_row for text, of_row in zip(of_text, images.num_kept, strict=True)))
        discrete = (images.slots < len(images.sizes) - 1).sum(1).tolist()
        of_images = (more + of_row for more, of_row in zip(discrete, images.num_kept, strict=True))
        return cls(keep, most, most_text, max(1, *of_images), images)


def _beside(context: Context, gates: Float[Tensor, "b m 1"], discrete: Context) -> Context:
    """Weighed tokens, with discrete ones behind them."""
    parts = Context(context.tokens * gates, context.mask, context.positions), discrete
    masks = [one.mask for one in parts if one.mask is not None]
    positions = [one.positions for one in parts if one.positions is not None]
    tokens = torch.cat([one.tokens for one in parts], dim=1)
    return Context(tokens, torch.cat(masks, dim=1), torch.cat(positions, dim=1))


def _part(context: Context, keep: Bool[Tensor, "b m"], most: int) -> Context:
    """The tokens of a context that are kept, real ones first."""
    assert context.positions is not None
    (tokens, positions), mask = pack([context.tokens, context.positions], keep, most)
    return Context(tokens, mask, positions)


def positions_of(batch: ChatBatch, keep: Bool[Tensor, "b n"]) -> Int[Tensor, "b n 2"]:
    """Rows and columns of tokens for the DiT (`Context.positions`): kept text is numbered without what stands
    around it, images have the places of their tokens. Each follows from the token's own chat alone.
    """
    is_image = batch.is_any(ChatPart.IMAGE)
    numbers = text_positions(keep & ~is_image)[..., None].expand(-1, -1, 2)
    return numbers.masked_scatter(is_image[..., None], batch.places) if batch.images else numbers


def kept(batch: ChatBatch) -> Bool[Tensor, "b n"]:
    """Which tokens condition: images and what was written; where nothing was, the instruction; where there is
    none of them, what the template consists of.
    """
    written = batch.is_any(ChatPart.WRITTEN)
    text = torch.where(written.any(1, keepdim=True), written, batch.is_any(ChatPart.INSTRUCTION))
    found = text | batch.is_any(ChatPart.IMAGE)
    return torch.where(found.any(1, keepdim=True), found, batch.is_any(ChatPart.TEMPLATE))
