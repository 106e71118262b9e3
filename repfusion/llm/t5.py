"""T5's encoder (`T5EncoderModel`): a text encoder that reads a prompt in both directions and nothing after
it, as Flan-T5-XXL in UniFusion's comparison (arXiv 2510.12789).

A folder may hold the whole T5: its decoder is left unread. A prompt ends in the end token, as T5 was
trained.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from repfusion.llm.base import LanguageModel, Prefix
from repfusion.llm.projector import Projector


class T5Encoder(LanguageModel):
    """T5's encoder in the place of a language model, for methods that read the prompt alone."""

    beside = r"decoder\.|lm_head\."
    is_causal = False

    @classmethod
    def model_class(cls, config: Any) -> Any:
        """T5EncoderModel."""
        from transformers import T5EncoderModel

        return T5EncoderModel

    @classmethod
    def parts(cls, model: Any) -> tuple[nn.Module, nn.Module | None, Projector | None]:
        """The encoder; there is neither head nor projector."""
        return model, None, None

    @classmethod
    def of_config(cls, text_config: Any, dtype: torch.dtype) -> nn.Module:
        """T5's encoder of a config, with fresh weights."""
        return cls.model_class(text_config)(text_config).to(dtype)

    @property
    def layers(self) -> list[nn.Module]:
        """Transformer layers."""
        return list(self.language_model.encoder.block)

    def framed(self, ids: Sequence[int]) -> list[int]:
        """A prompt's ids and the end token; an empty prompt is that alone."""
        return [*ids, self.end_id]

    def leave_room(self, num_tokens: int) -> None:
        """Raises ValueError: nothing is read beside a prompt."""
        raise ValueError(
            f"MLLM {self.folder}: T5's encoder reads prompts alone, the method has {num_tokens} tokens read "
            "beside them; choose a method of the prompt alone, such as one_layer, or a causal language model"
        )

    @property
    def key_width(self) -> int:
        """Raises ValueError: an encoder keeps no keys and values."""
        raise ValueError(
            f"MLLM {self.folder}: T5's encoder keeps no keys and values, which key_values reads; choose "
            "layer_per_block, or a causal language model"
        )

    def _run(self, prefix: Prefix, use_cache: bool = False, output_hidden_states: bool = False) -> Any:
        # positions are relative: what stands left of a prompt moves nothing but by the mask
        assert not use_cache
        return self.language_model(
            input_ids=prefix.ids,
            attention_mask=prefix.mask.long(),
            output_hidden_states=output_hidden_states,
        )
