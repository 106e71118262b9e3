"""RepFusion (arXiv 2606.14700): the frozen causal LLM reads the prompt, then P(z_t + e_t); its outputs there
are the condition.

P is the MLLM's own projector, fine-tuned; e_t is a learned embedding of the noise level. Gradients pass
through the frozen LLM to P.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from repfusion.conditioning import Condition
from repfusion.dit import Interface, TimestepEmbedder
from repfusion.mllm import MLLM, Projector


@dataclass(frozen=True)
class Prefix:
    """Prompt ids `[b, m]`, left-padded, their mask, and, for sampling, the keys and values over them."""

    ids: Int[Tensor, "b m"]
    mask: Bool[Tensor, "b m"]
    cache: Any = None
    """A transformers Cache."""


class NoisyLatentConditioner(nn.Module):
    interface: Interface = "adaln"
    prompt_column: Literal["ids", "features"] = "ids"

    def __init__(self, mllm: MLLM, latent_dim: int, num_tokens: int):
        """Prompt and latent tokens share the context: the MLLM takes prompts that leave room for
        `num_tokens`.

        Raises:
            ValueError: where the MLLM's projector takes another width than the latents have, or its context
            is too short for them.
        """
        super().__init__()
        self.mllm = mllm
        self.projector = mllm.projector or Projector(latent_dim, mllm.width)
        if self.projector.linear_1.in_features != latent_dim:
            took = self.projector.linear_1.in_features
            raise ValueError(
                f"MLLM {mllm.folder}: its projector takes width {took}, the latents have {latent_dim}; "
                "use the vision tower this MLLM was trained with as encoder"
            )
        mllm.max_text_tokens = min(
            mllm.max_text_tokens, mllm.language_model.config.max_position_embeddings - num_tokens
        )
        if mllm.max_text_tokens < 1:
            raise ValueError(
                f"MLLM {mllm.folder}: its context leaves no room for a prompt beside {num_tokens} "
                "latent tokens"
            )
        mllm.projector = None  # one owner: the trained copy
        self.time = TimestepEmbedder(latent_dim, zero_init=True)

    def prepare(self, prompts: list[str], device: torch.device, reuse: bool = False) -> Prefix:
        """Prompts -> prefix. With `reuse`, the LLM reads the prefix once and keeps it for every step (no
        gradients).
        """
        ids, mask = self.mllm.tokenize(prompts)
        ids, mask = ids.to(device), mask.to(device)
        if not reuse:
            return Prefix(ids, mask)
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            cache = self.mllm.language_model(
                input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=True
            ).past_key_values
        return Prefix(ids, mask, cache)

    def condition(self, prefix: Prefix, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"]) -> Condition:
        """The LLM's last hidden states at the n visual positions."""
        visual = self.projector(z_t + self.time(t)[:, None]).to(self.mllm.language_model.dtype)
        return Condition(self._read(prefix, visual) if prefix.cache is None else self._go_on(prefix, visual))

    def _go_on(self, prefix: Prefix, visual: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """After the prompt that the cache remembers."""
        num_text = prefix.ids.shape[1]
        mask = torch.cat([prefix.mask, prefix.mask.new_ones(visual.shape[:2])], dim=1)
        if (surplus := prefix.cache.get_seq_length() - num_text) > 0:
            prefix.cache.crop(-surplus)  # forget the previous step's visual tokens
        return self.mllm.language_model(
            inputs_embeds=visual,
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, num_text:],
            past_key_values=prefix.cache,
            use_cache=True,
        ).last_hidden_state

    def _read(self, prefix: Prefix, visual: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Prompt and latents at once, each row rolled until its padding lies at the end, where no token that
        counts looks: the LLM takes no mask, so flash attention serves, and no position ids, so nothing waits
        for the GPU to tell what they say.
        """
        model = self.mllm.language_model
        rows = torch.cat([model.get_input_embeddings()(prefix.ids), visual], dim=1)
        length, num_text = rows.shape[1], prefix.ids.shape[1]
        padding = (~prefix.mask).sum(1, keepdim=True)
        order = torch.arange(length, device=rows.device) + padding
        rows = take(rows, order % length)
        hidden = model(inputs_embeds=rows, use_cache=False).last_hidden_state
        return take(hidden, torch.arange(num_text, length, device=rows.device) - padding)


def take(rows: Float[Tensor, "b n c"], positions: Int[Tensor, "b m"]) -> Float[Tensor, "b m c"]:
    """Of each row the tokens at its own positions."""
    return rows.gather(1, positions[..., None].expand(-1, -1, rows.shape[-1]))
