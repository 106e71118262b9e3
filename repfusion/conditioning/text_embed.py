"""TextEmbed, RepFusion's static baseline: the frozen LLM's last-layer states of the prompt condition the DiT
by cross-attention.

The features do not depend on the noisy latents, so they can be computed ahead, once per caption.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from repfusion.conditioning import Condition
from repfusion.config import Config
from repfusion.llm.mllm import MLLM
from repfusion.model.dit import Interface, RMSNorm


class TextEmbedConfig(Config):
    method: Literal["text_embed"] = "text_embed"
    """The prompt's last-layer states, the same at every step."""


@dataclass(frozen=True)
class TextFeatures:
    """Right-padded prompt features and the mask of real tokens."""

    features: Float[Tensor, "b m c"]
    mask: Bool[Tensor, "b m"]

    def first(self, num: int) -> "TextFeatures":
        """Of the first `num` prompts."""
        return TextFeatures(self.features[:num], self.mask[:num])


def encode_text(mllm: MLLM, prompts: list[str]) -> list[Float[Tensor, "_ c"]]:
    """Last-layer states (after the final norm) of each prompt, begin token included, unpadded, float32."""
    ids, mask = mllm.tokenize(prompts)
    device = next(mllm.language_model.parameters()).device
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        hidden = mllm.language_model(
            input_ids=ids.to(device),
            attention_mask=mask.long().to(device),
            position_ids=positions.to(device),
            use_cache=False,
        ).last_hidden_state
    return [row[keep].float() for row, keep in zip(hidden, mask.to(device), strict=True)]


class TextEmbedConditioner(nn.Module):
    interface: Interface = "cross_attention"
    prompt_column: Literal["ids", "features"] = "features"

    def __init__(self, mllm: MLLM):
        super().__init__()
        self.mllm = mllm
        mllm.projector = None  # visual, so of no use here; left in, it would count as trainable
        self.norm = RMSNorm(mllm.width, eps=1e-6)

    def prepare(
        self, prompts: list[str | Float[Tensor, "_ c"]], device: torch.device, reuse: bool = False
    ) -> TextFeatures:
        """Prompts, as text or as precomputed features -> padded features. `reuse` changes nothing: they are
        static.

        Raises:
            ValueError: where precomputed features have another width than the LLM.
        """
        texts = [prompt for prompt in dict.fromkeys(p for p in prompts if isinstance(p, str))]
        encoded = dict(zip(texts, encode_text(self.mllm, texts), strict=True)) if texts else {}
        rows = [
            encoded[prompt] if isinstance(prompt, str) else prompt.to(device, torch.float32)
            for prompt in prompts
        ]
        for row in rows:
            if row.shape[-1] != self.mllm.width:
                raise ValueError(
                    f"text features have width {row.shape[-1]}, the LLM has {self.mllm.width}; re-run "
                    "'features'"
                )
        lengths = torch.tensor([len(row) for row in rows], device=device)
        features = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        return TextFeatures(features, torch.arange(features.shape[1], device=device) < lengths[:, None])

    def condition(
        self, prefix: TextFeatures, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"]
    ) -> Condition:
        """The same tokens at every step: neither z_t nor t enters."""
        return Condition(self.norm(prefix.features), prefix.mask)
