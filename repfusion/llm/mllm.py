"""A Hugging Face folder -> the language model of an MLLM, its visual projector and its tokenizer.

Any `LlavaForConditionalGeneration` (LLaVA-1.5-7B's class) loads; its vision tower is left on disk, since
RepFusion feeds the projector with noisy latents. A plain causal language model loads too, with a fresh
projector: the language-only twin.
"""

from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from repfusion.files import weights_digest
from repfusion.latents.statistics import VARIANCE_EPS, LatentStatistics

LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")
"""Causal language models that load by themselves."""
MAX_CACHED_PROMPTS = 100_000
"""Tokenised prompts kept: training meets the same captions in every epoch."""


class Projector(nn.Module):
    """LLaVA-1.5's two-layer projector from visual width to language width."""

    def __init__(self, visual_width: int, width: int, activation: str = "gelu", bias: bool = True):
        super().__init__()
        from transformers.activations import ACT2FN

        self.linear_1 = nn.Linear(visual_width, width, bias)
        self.act = ACT2FN[activation]
        self.linear_2 = nn.Linear(width, width, bias)

    def forward(self, x: Float[Tensor, "b n v"]) -> Float[Tensor, "b n w"]:
        return self.linear_2(self.act(self.linear_1(x)))

    @torch.no_grad()
    def take_latents(self, statistics: LatentStatistics) -> None:
        """Rewrites the first layer, so that it makes of latents what it made of their features.

        It has one weight for all places: this is exact where the statistics are the same at each, and else
        goes by their average. Without a bias, the mean stays out.
        """
        std = (statistics.var.mean(0) + VARIANCE_EPS).sqrt()
        first = self.linear_1
        if first.bias is not None:
            first.bias.add_(first.weight @ statistics.mean.mean(0).to(first.weight))
        first.weight.mul_(std.to(first.weight))


class MLLM(nn.Module):
    """`language_model` is in eval mode and frozen, unless a method unfreezes it; `head` scores its next
    token, where that is asked for; `projector` is the pretrained one, for whoever fine-tunes it to take over.
    """

    def __init__(
        self,
        language_model: nn.Module,
        projector: Projector | None,
        tokenizer,
        folder: Path,
        digest: str,
        head: nn.Module | None = None,
    ):
        super().__init__()
        self.language_model = language_model.eval().requires_grad_(False)
        self.projector = projector
        self.head = None if head is None else head.requires_grad_(False)
        self.tokenizer = tokenizer
        self.folder = folder
        self.digest = digest
        self.width: int = language_model.config.hidden_size
        self.max_text_tokens: int = min(
            tokenizer.model_max_length, language_model.config.max_position_embeddings
        )
        begin_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if begin_id is None:
            raise ValueError(
                f"MLLM folder {folder}: its tokenizer has neither a begin nor an end token; a prompt "
                "needs one to begin with"
            )
        self.begin_id: int = begin_id
        self.end_id: int = begin_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self._ids: dict[str, list[int]] = {}
        self.pad_id: int = begin_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, with_head: bool = False
    ) -> "MLLM":
        """Raises ValueError where the folder is missing or holds no LLaVA and no causal language model."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"MLLM folder {folder}: no config.json; expected a folder written by save_pretrained"
            )
        # here and not above: whoever only reads configurations, such as `status`, need not wait for it
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoTokenizer,
            LlavaForConditionalGeneration,
        )

        config = AutoConfig.from_pretrained(folder)
        projector = None
        if config.model_type == "llava":
            llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
            language_model, head = llava.model.language_model, llava.lm_head
            if not isinstance(config.vision_feature_layer, int):
                raise ValueError(
                    f"MLLM folder {folder}: reads layers {config.vision_feature_layer} of its tower; "
                    "expected a single layer"
                )
            widths = config.vision_config.hidden_size, config.text_config.hidden_size
            projector = Projector(*widths, config.projector_hidden_act, config.multimodal_projector_bias)
            projector.load_state_dict(llava.model.multi_modal_projector.state_dict())
        elif config.model_type in LANGUAGE_MODELS:
            causal = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            language_model, head = causal.model, causal.lm_head
        else:
            raise ValueError(
                f"MLLM folder {folder}: model_type {config.model_type!r}; expected 'llava' or a causal "
                "language model"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        digest = weights_digest(folder)
        return cls(language_model, projector, tokenizer, folder, digest, head if with_head else None)

    def unfreeze(self) -> None:
        """The language model, and its head where there is one, train from now on."""
        self.language_model.requires_grad_(True)
        if self.head is not None:
            self.head.requires_grad_(True)

    @property
    def is_frozen(self) -> bool:
        return not any(p.requires_grad for p in self.language_model.parameters())

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        """Of each text, without begin or end token."""
        unknown = [text for text in dict.fromkeys(texts) if text not in self._ids]
        if unknown:
            if len(self._ids) + len(unknown) > MAX_CACHED_PROMPTS:
                self._ids = {text: self._ids[text] for text in texts if text in self._ids}
            found = self.tokenizer(unknown, add_special_tokens=False).input_ids
            self._ids |= dict(zip(unknown, found, strict=True))
        return [self._ids[text] for text in texts]

    def tokenize(self, prompts: list[str]) -> tuple[Int[Tensor, "b m"], Bool[Tensor, "b m"]]:
        """Ids and mask, left-padded, begin token first (an empty prompt is that token alone).

        Raises:
            ValueError: where a prompt is longer than the context.
        """
        rows = [[self.begin_id, *ids] for ids in self.token_ids(prompts)]
        longest = max(range(len(rows)), key=lambda i: len(rows[i]))
        width = len(rows[longest])
        if width > self.max_text_tokens:
            start = prompts[longest][:60]
            raise ValueError(
                f"prompt {start!r}... has {width} tokens; the context takes {self.max_text_tokens}: "
                "shorten it"
            )
        ids = torch.tensor([[self.pad_id] * (width - len(row)) + row for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(width) >= width - lengths[:, None]
