"""Query-Kontext (arXiv 2509.26641): learned queries that a model which sees reads after images and prompt,
beside the prompt's own states; a connector takes both to the DiT, and low-level tokens of sources join them.

Faithful (paper) are 128 queries read after the whole chat, their states concatenated with those of the text,
an MLP connector, the generator that is replaced by a larger one while the conditioner stays (`replaces_dit`),
and source tokens that join in a last training, at rows and columns shifted off those of the image. There is
no code: ours are the queries' first values, the connector's width, the DiT in context in the place of a
pretrained MMDiT, and that the low-level tokens are those that the vision tower gives, before the language
model, in the place of a VAE's; and the LoRA's rank and layers. The LoRA on the language model trains with the
light DiT, and stays frozen beside the weights that it adapts from the second training on.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from repfusion.conditioning.base import (
    Conditioner,
    Context,
    ContextInterface,
    Handover,
    MethodConfig,
    Prepared,
)
from repfusion.conditioning.lora import LoraConfig, add_lora
from repfusion.conditioning.unifusion import kept, positions_of
from repfusion.inputs import Inputs
from repfusion.llm.base import LanguageModel
from repfusion.llm.chats.batch import num_kept, pack, tokenise_chats
from repfusion.llm.chats.format import Chat, ChatPart
from repfusion.llm.chats.read import read_chats
from repfusion.request import Branch, Request


class QueryKontextConfig(MethodConfig):
    reads_images: ClassVar[bool] = True
    method: Literal["query_kontext"] = "query_kontext"
    """Learned queries beside the prompt's states, the same at every step."""
    num_queries: int = Field(default=128, ge=1)
    """Queries."""
    width: int | None = Field(default=None, ge=1)
    """Channels of what the DiT is given; None is the language model's width."""
    interface: ContextInterface = "in_context"
    """How the DiT takes it."""
    lora: LoraConfig | None = None
    """The language model's LoRA, which the first training trains and the others keep frozen; None is none."""
    low_level: bool = False
    """Whether tokens of the sources, as the vision tower gives them, join: the third training."""
    replaces_dit: bool = False
    """Whether a training takes the conditioner alone of the checkpoint that it starts from, for a DiT that is
    fresh: the second training.
    """

    def tokens_beside(self, num_latents: int) -> int:
        """The queries."""
        return self.num_queries

    @property
    def trains_lora(self) -> bool:
        """Whether there is a LoRA that trains: in the first training."""
        return self.lora is not None and not (self.replaces_dit or self.low_level)

    @property
    def needs_start(self) -> bool:
        """Whether a LoRA is kept frozen."""
        return self.lora is not None and not self.trains_lora

    def handover(self, before: MethodConfig) -> Handover | None:
        """Parts that come from the training before: the conditioner, its LoRA with it, and the DiT unless it
        is replaced. Raises ValueError where the training before had another LoRA.
        """
        if not isinstance(before, QueryKontextConfig):
            return None
        if before.lora != self.lora:
            raise ValueError(
                f"conditioning.lora is {said(self.lora)}, that of the training before {said(before.lora)}, "
                "which its weights were made for; leave lora out of the config to take it"
            )
        if before.low_level > self.low_level:
            return None
        if self.replaces_dit and not before.replaces_dit:
            return Handover(("conditioner.",))
        return Handover(("conditioner.", "denoiser.")) if self.low_level > before.low_level else None


def said(lora: LoraConfig | None) -> str:
    """The settings of a LoRA in a line."""
    return "none" if lora is None else str(lora.model_dump(mode="json"))


def connector(width: int, out: int) -> nn.Sequential:
    """States -> tokens for the DiT, each by itself."""
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


class QueryKontextConditioner(Conditioner):
    """The connected states of prompt and queries, and low-level tokens where they join, as one context.

    Raises: ValueError: where the MLLM's context is too short for the queries, or its layers are not those
        that the LoRA names.
    """

    def __init__(self, llm: LanguageModel, config: QueryKontextConfig = QueryKontextConfig()):
        super().__init__()
        self.llm = llm
        llm.projector = None  # its eyes have their own; left in, it would count as trainable
        llm.leave_room(config.num_queries)
        width = config.width or llm.width
        self.context_widths = (width,)
        if config.lora is not None:
            added = add_lora(llm, config.lora, config.trains_lora)
            self.adapters = tuple(f"llm.{name}" for name in added)
        self.queries = nn.Parameter(torch.randn(config.num_queries, llm.width) * llm.width**-0.5)
        self.connector = connector(llm.width, width)
        self.low_level = connector(llm.width, width) if config.low_level else None

    def collate(
        self, requests: Sequence[Request], branches: Sequence[Branch], seeds: Sequence[int] | None = None
    ) -> Inputs:
        """Chats of images and prompt, with room for the queries, and how many tokens of each row reach the
        DiT, known on the CPU.
        """
        chats = [self._asked(*pair) for pair in zip(requests, branches, strict=True)]
        batch = tokenise_chats(self.llm, chats, room=len(self.queries))
        is_image = batch.is_any(ChatPart.IMAGE)
        keep = kept(batch) & ~is_image
        return {
            "chats": batch,
            "text": keep,
            "most_text": num_kept(keep),
            "most_images": num_kept(is_image),
        }

    @staticmethod
    def _asked(request: Request, branch: Branch) -> Chat:
        if branch == "none":
            return Chat()
        return Chat(request.prompt if branch == "full" else "", request.images)

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """Text, then queries, then low-level tokens; `reuse` changes nothing: they are static."""
        batch, keep = inputs["chats"], inputs["text"]
        queries = self.queries.expand(len(batch.ids), -1, -1)
        shown, states = read_chats(self.llm, batch, (0, -1), queries)
        num = batch.ids.shape[1]
        places = positions_of(batch, keep)
        (text, text_places), text_mask = pack([states[:, :num], places], keep, inputs["most_text"])
        numbers = text_mask.sum(1, keepdim=True) + torch.arange(queries.shape[1], device=keep.device)
        joined = torch.cat([text, states[:, num:]], dim=1).to(self.queries.dtype)
        tokens = [self.connector(joined)]
        masks = [text_mask, torch.ones_like(numbers, dtype=torch.bool)]
        positions = [text_places, numbers[..., None].expand(-1, -1, 2)]
        if self.low_level is not None:
            is_image = batch.is_any(ChatPart.IMAGE)
            (seen, seen_places), mask = pack([shown[:, :num], places], is_image, inputs["most_images"])
            tokens.append(self.low_level(seen.to(self.queries.dtype)))
            masks.append(mask)
            positions.append(seen_places)
        parts = (torch.cat(one, dim=1) for one in (tokens, masks, positions))
        return Prepared(static=(Context(*parts),))
