"""Clean latents -> the caption, by next tokens: the loss that keeps a trained LLM a reader of images
(Transfusion, arXiv 2408.11039, interleaves such batches; RepFusion's trainable-LLM variant adds it).

A sequence is begin token, projected latents, caption, end token: the image first, where drawing has the
prompt first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from repfusion.config import Config
from repfusion.diffusion.flow import CAPTIONED, uniforms
from repfusion.llm.base import LanguageModel, see_each_other


class CaptioningConfig(Config):
    weight: float = Field(default=0.2, gt=0)
    """Weight of the caption loss beside the velocity's (Transfusion weighs diffusion 5 times the text)."""
    share: float = Field(default=0.25, gt=0, le=1)
    """Share of the samples that are captioned as well as drawn."""


@dataclass(frozen=True)
class CaptionBatch:
    """What is to be said of some rows of a batch: caption ids with the end token, right-padded, and the mask
    of real ones.
    """

    rows: Int[Tensor, " r"]
    weights: Float[Tensor, " r"]
    """So that the mean over the whole batch estimates the weighted mean over all of its samples."""
    ids: Int[Tensor, "r m"]
    mask: Bool[Tensor, "r m"]


def caption_batch(
    llm: LanguageModel, captions: Sequence[str], seeds: Sequence[int], config: CaptioningConfig
) -> CaptionBatch:
    """Which samples of a batch are captioned, decided by each sample's seed, and their token ids; on the CPU.
    Where there is none, the first row is read with weight 0: under ZeRO-3 all ranks must run the same
    modules.
    """
    rows = (uniforms(seeds)[:, CAPTIONED] < config.share).nonzero()[:, 0]
    weights = torch.full((len(rows),), config.weight / config.share)
    if len(rows) == 0:
        rows, weights = torch.zeros(1, dtype=torch.long), torch.zeros(1)
    texts = [[*ids, llm.end_id] for ids in llm.token_ids([captions[row] for row in rows.tolist()])]
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[llm.pad_id] * (width - len(text))] for text in texts])
    return CaptionBatch(rows, weights, ids, torch.arange(width) < torch.tensor([[len(t)] for t in texts]))


def caption_losses(
    llm: LanguageModel,
    visual: Float[Tensor, "r n c"],
    captions: CaptionBatch,
    bidirectional: bool,
    beside: Float[Tensor, "k c"] | None = None,
) -> Float[Tensor, " r"]:
    """Mean cross-entropy (nats a token) of each caption after its projected latents, float32, unweighted.
    Tokens `beside` the vocabulary, by their rows of the head, are scored too; none of them is ever right.
    """
    model, num = llm.language_model, visual.shape[1]
    begin = captions.ids.new_full((len(visual), 1), llm.begin_id)
    rows = torch.cat([llm.embed(begin), visual.to(model.dtype), llm.embed(captions.ids[:, :-1])], dim=1)
    mask = see_each_other(begin.new_ones(len(visual), 1), num, rows.shape[1]) if bidirectional else None
    hidden = model(inputs_embeds=rows, attention_mask=mask, use_cache=False).last_hidden_state
    logits = llm.logits(hidden[:, num:])
    if beside is not None:
        logits = torch.cat([logits, hidden[:, num:].float() @ beside.float().T], dim=2)
    losses = F.cross_entropy(logits.transpose(1, 2), captions.ids, reduction="none")
    return (losses * captions.mask).sum(1) / captions.mask.sum(1)
