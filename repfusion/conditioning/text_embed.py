"""TextEmbed, RepFusion's static baseline: the frozen LLM's last-layer states of the prompt condition the DiT
by cross-attention.

The features do not depend on the noisy latents, so they can be computed ahead, once per caption. Read here or
there, they are computed in the precision of the LLM's weights, never under autocast.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repfusion.conditioning.base import (
    Conditioner,
    Context,
    ContextInterface,
    MethodConfig,
    Prepared,
    frozen_reading,
)
from repfusion.data.readers import PROMPT_FEATURES, CaptionArray, Reader
from repfusion.inputs import Inputs
from repfusion.layers import RMSNorm
from repfusion.llm.base import LanguageModel, Prefix
from repfusion.request import Branch, Request


class TextEmbedConfig(MethodConfig):
    method: Literal["text_embed"] = "text_embed"
    """The prompt's last-layer states, the same at every step."""
    interface: ContextInterface = "cross_attention"
    """How the DiT takes them."""

    @property
    def columns(self) -> Mapping[str, Reader]:
        return {PROMPT_FEATURES: CaptionArray()}


def encode_padded(llm: LanguageModel, prefix: Prefix) -> Float[Tensor, "b m c"]:
    """Last-layer states (after the final norm) of each prompt, begin token included, left-padded, float32."""
    with frozen_reading(prefix.ids.device):
        return llm.read(prefix).float()


def encode_text(llm: LanguageModel, prefix: Prefix) -> list[Float[Tensor, "_ c"]]:
    """Last-layer states of each prompt, unpadded."""
    return [row[keep] for row, keep in zip(encode_padded(llm, prefix), prefix.mask, strict=True)]


class TextEmbedConditioner(Conditioner):
    """The prompt's states behind an RMSNorm, as the one context of all steps."""

    def __init__(self, llm: LanguageModel):
        super().__init__()
        self.llm = llm
        llm.projector = None  # visual, so of no use here; left in, it would count as trainable
        self.context_widths = (llm.width,)
        self.norm = RMSNorm(llm.width, eps=1e-6)

    def collate(
        self, requests: Sequence[Request], branches: Sequence[Branch], seeds: Sequence[int] | None = None
    ) -> Inputs:
        """Precomputed features of the prompts that have them, and the tokens of the others, each text once;
        the empty prompt's where there is no other, so that all ranks run the LLM.

        Raises:
            ValueError: where precomputed features have another width than the LLM.
        """
        rows: list[Tensor | str] = [
            "" if branch == "none" else one.computed.get(PROMPT_FEATURES, one.prompt)
            for one, branch in zip(requests, branches, strict=True)
        ]
        for row in rows:
            if isinstance(row, Tensor) and row.shape[-1] != self.llm.width:
                raise ValueError(
                    f"{PROMPT_FEATURES} have width {row.shape[-1]}, the LLM has {self.llm.width}; re-run the "
                    f"'{PROMPT_FEATURES}' stage"
                )
        texts = list(dict.fromkeys(row for row in rows if isinstance(row, str))) or [""]
        return {
            "rows": [texts.index(row) if isinstance(row, str) else row for row in rows],
            "prefix": self.llm.tokenise(texts),
            "lengths": [1 + len(ids) for ids in self.llm.token_ids(texts)],
        }

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """Padded states; `reuse` changes nothing: they are static. Whoever read all prompts ahead gives
        `states` and `mask` in the place of tokens.
        """
        if "states" in inputs:
            return Prepared(static=(Context(self.norm(inputs["states"]), inputs["mask"]),))
        states = encode_padded(self.llm, inputs["prefix"])
        # by their lengths and not by the mask, for which a GPU would have to be waited for
        encoded = [row[-length:] for row, length in zip(states, inputs["lengths"], strict=True)]
        rows = [encoded[row] if isinstance(row, int) else row.float() for row in inputs["rows"]]
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        states = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
        return Prepared(static=(Context(self.norm(states), mask),))
