"""A language model, with or without eyes, as conditioning reads it: prompts -> tokens -> hidden states, then
further tokens after them, in training at once and in sampling after keys and values computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from repfusion.devices.compiling import Compilation
from repfusion.inputs import map_tensors
from repfusion.llm.chats.eyes import Eyes, text_positions
from repfusion.llm.chats.format import ChatFormat
from repfusion.llm.kept import KeptPrompts, with_own_layer
from repfusion.llm.projector import Projector
from repfusion.llm.tokenizer import context_length, plain_ids

LAST = (-1,)
"""The layers that are read where no others are asked for: the last, after the final norm."""
MAX_CACHED_PROMPTS = 100_000
"""Tokenised prompts kept: training meets the same captions in every epoch."""


class PromptTooLong(ValueError):
    """A prompt that does not fit into the context."""

    def __init__(self, prompt: str, num_tokens: int, most: int):
        super().__init__(prompt, num_tokens, most)
        self.prompt, self.num_tokens, self.most = prompt, num_tokens, most

    def __str__(self) -> str:
        start, num, most = self.prompt[:60], self.num_tokens, self.most
        return f"prompt {start!r}... has {num} tokens; the context takes {most}: shorten it"


@dataclass(frozen=True)
class Prefix:
    """Prompt ids `[b, m]`, left-padded, their mask, and, where those are kept, their keys and values."""

    ids: Int[Tensor, "b m"]
    mask: Bool[Tensor, "b m"]
    kept: KeptPrompts | None = None

    @property
    def positions(self) -> Int[Tensor, "b m"]:
        """Position ids, which count real tokens only."""
        return text_positions(self.mask)

    def first(self, num: int) -> "Prefix":
        """The first `num` prompts; of keys and values, views."""
        return map_tensors(self, lambda rows: rows[:num])


class LanguageModel(nn.Module):
    """A causal language model of transformers, in eval mode and frozen unless a method unfreezes it.

    Args:
        language_model: transformers' model without its head.
        projector: the pretrained one of a model that sees, for whoever fine-tunes it to take over.
        tokenizer: transformers'.
        folder: where it came from.
        digest: sha256 that names its weights.
        head: scores the next token, where that is asked for.
        eyes: see images, where that is asked for.

    Raises:
        ValueError: the tokenizer has neither a begin nor an end token.
    """

    beside: ClassVar[str | None] = None
    """Pattern of the names of weights that a folder may hold beside those that are read."""
    sees: ClassVar[bool] = False
    """Whether models of the family see images."""
    needs_template: ClassVar[bool] = False
    """Whether the family is asked by a chat template alone, never in plain text."""
    is_causal: ClassVar[bool] = True
    """Whether a token sees those before it alone, so that padding after it needs no mask."""
    takes_latents: ClassVar[bool] = True
    """Whether latents may stand in the language model's context in the place of hidden states of its tower,
    as RepFusion has them.
    """

    def __init__(
        self,
        language_model: nn.Module,
        projector: Projector | None,
        tokenizer: Any,
        folder: Path,
        digest: str,
        head: nn.Module | None = None,
        eyes: Eyes | None = None,
    ):
        super().__init__()
        self.language_model = language_model.eval().requires_grad_(False)
        self.projector = projector
        self.head = None if head is None else head.requires_grad_(False)
        self.eyes = eyes
        self.tokenizer = tokenizer
        self.folder = folder
        self.digest = digest
        self.width: int = language_model.config.hidden_size
        self.context: int = context_length(language_model.config)
        self.max_text_tokens: int = min(tokenizer.model_max_length, self.context)
        begin_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if begin_id is None:
            raise ValueError(
                f"MLLM folder {folder}: its tokenizer has neither a begin nor an end token; a prompt "
                "needs one to begin with"
            )
        self.begin_id: int = begin_id
        self.end_id: int = begin_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.pad_id: int = begin_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.bucket = 1
        """Prompts are padded to a multiple of so many tokens."""
        self.reads_apart = False
        """Whether, in training too, prompts are read before what follows them, without gradients, of which
        a frozen model's prompts have none to hand on.
        """
        self._ids: dict[str, list[int]] = {}

    @classmethod
    def model_class(cls, config: Any) -> Any:
        """transformers' class that reads a folder with this config.

        Raises:
            ValueError: the folder holds what the family cannot be read with.
        """
        raise NotImplementedError

    @classmethod
    def parts(cls, model: Any) -> tuple[nn.Module, nn.Module | None, Projector | None]:
        """What a family takes of the model that was read: the language model without its head, the head
        where it has one, and a pretrained projector.
        """
        raise NotImplementedError

    @classmethod
    def of_config(cls, text_config: Any, dtype: torch.dtype) -> nn.Module:
        """transformers' language model of a config, without its head and with fresh weights."""
        from transformers import AutoModel

        return AutoModel.from_config(text_config, dtype=dtype)

    @classmethod
    def open_eyes(cls, model: Any, tokenizer: Any, folder: Path) -> Eyes:
        """What a family sees with, of the model that was read; its language model is taken out of it.

        Raises:
            ValueError: the family sees nothing, or its image processor does not fit.
        """
        raise ValueError(
            f"MLLM folder {folder}: a {type(model).__name__}, which sees no images; use a folder of a LLaVA, "
            "a Qwen-VL or an InternVL"
        )

    @cached_property
    def chat_format(self) -> ChatFormat:
        """How the folder puts chats into tokens. Raises ValueError where it lacks the chat template that the
        family needs.
        """
        return ChatFormat(
            self.tokenizer, self.folder, self.begin_id, self.eyes, self.sees, self.needs_template
        )

    @property
    def layers(self) -> list[nn.Module]:
        """Transformer layers, which are compiled and checkpointed one by one."""
        return list(self.language_model.layers)

    def compile_layers(self, compilation: Compilation) -> None:
        """Compiles the layers one by one, in place."""
        for number, layer in enumerate(self.layers):
            layer.forward = with_own_layer(layer.forward, compilation(layer.forward), number)

    def unfreeze(self) -> None:
        """Trains the language model, and its head where there is one, from now on."""
        self.language_model.requires_grad_(True)
        if self.head is not None:
            self.head.requires_grad_(True)

    @property
    def is_frozen(self) -> bool:
        """Whether no weight of the language model is trained."""
        return not any(p.requires_grad for p in self.language_model.parameters())

    def leave_room(self, num_tokens: int) -> None:
        """Takes prompts that leave room for `num_tokens` in the context from now on.

        Raises:
            ValueError: where there is no room for a prompt beside them.
        """
        self.max_text_tokens = min(self.max_text_tokens, self.context - num_tokens)
        if self.max_text_tokens < 1:
            raise ValueError(
                f"MLLM {self.folder}: its context of {self.context} leaves no room for a prompt beside "
                f"{num_tokens} latent tokens or queries"
            )

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without begin and end tokens; kept, and safe to call from another
        thread.
        """
        known, found = self._ids, {}
        if unknown := [text for text in dict.fromkeys(texts) if text not in known]:
            found = dict(zip(unknown, plain_ids(self.tokenizer, unknown), strict=True))
            if len(known) + len(found) > MAX_CACHED_PROMPTS:
                self._ids = found
            else:
                known.update(found)
        return [found[text] if text in found else known[text] for text in texts]

    def framed(self, ids: Sequence[int]) -> list[int]:
        """A prompt's ids as it is read, with one token more: begin token first, and alone where the prompt is
        empty.
        """
        return [self.begin_id, *ids]

    def check_lengths(self, prompts: Sequence[str]) -> None:
        """Raises PromptTooLong where one is longer than the context, begin token included."""
        for prompt, ids in zip(prompts, self.token_ids(prompts), strict=True):
            if len(ids) + 1 > self.max_text_tokens:
                raise PromptTooLong(prompt, len(ids) + 1, self.max_text_tokens)

    def tokenise(self, prompts: Sequence[str], before: Sequence[int] = ()) -> Prefix:
        """Prompts -> ids and mask on the CPU, left-padded to a multiple of `bucket`, each `framed` together
        with the ids `before` it, for which `leave_room` has left room.

        Raises:
            PromptTooLong: where a prompt is longer than the context.
        """
        self.check_lengths(prompts)
        rows = [self.framed([*before, *ids]) for ids in self.token_ids(prompts)]
        longest = self.max_text_tokens + len(before)
        width = min(-(-max(map(len, rows)) // self.bucket) * self.bucket, longest)
        ids = torch.tensor([[self.pad_id] * (width - len(row)) + row for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return Prefix(ids, torch.arange(width) >= width - lengths[:, None])

    def read(self, prefix: Prefix) -> Float[Tensor, "b m c"]:
        """Last hidden states of the prompts (after the final norm). What stands at padding means nothing."""
        return self.read_layers(prefix, LAST)[0]

    def read_layers(self, prefix: Prefix, layers: Sequence[int]) -> tuple[Float[Tensor, "b m c"], ...]:
        """Hidden states of the prompts in several layers, as transformers counts them: 0 are the embeddings,
        -1 the last layer's after the final norm.
        """
        # without a mask flash attention serves, which a CPU does not have
        run = self.run_unmasked if self.is_causal and prefix.ids.is_cuda else self._run
        return states_of(run(prefix, output_hidden_states=tuple(layers) != LAST), layers)

    def run_unmasked(self, prefix: Prefix, output_hidden_states: bool = False) -> Any:
        """The prompts with their padding after them, where no token that counts looks, and no mask; what
        comes out stands where it does with one.
        """
        padding = (~prefix.mask).sum(1, keepdim=True)
        places = torch.arange(prefix.ids.shape[1], device=prefix.ids.device)
        rows = prefix.ids.gather(1, (places + padding) % prefix.ids.shape[1])
        out = self.language_model(input_ids=rows, use_cache=False, output_hidden_states=output_hidden_states)
        back = partial(take, positions=(places - padding) % prefix.ids.shape[1])
        hidden = tuple(map(back, out.hidden_states)) if output_hidden_states else None
        return type(out)(last_hidden_state=back(out.last_hidden_state), hidden_states=hidden)

    @property
    def key_width(self) -> int:
        """Channels of a token's keys in one layer, all heads together; its values have as many."""
        config: Any = self.language_model.config
        heads: int = config.num_attention_heads
        head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return (getattr(config, "num_key_value_heads", None) or heads) * head_width

    def keys_values(
        self, prefix: Prefix, layers: Sequence[int]
    ) -> tuple[tuple[Float[Tensor, "b m e"], Float[Tensor, "b m e"]], ...]:
        """Keys, rotated where the model rotates them, and values of the prompts in the attention of several
        layers, counted from 1. Only without gradients: they are those of a cache.
        """
        kept = self._run(prefix, use_cache=True).past_key_values.layers
        return tuple((_all_heads(kept[one - 1].keys), _all_heads(kept[one - 1].values)) for one in layers)

    def remember(self, prefix: Prefix) -> Prefix:
        """The prefix with the keys and values of its prompts, which have no gradients."""
        with torch.no_grad():
            cache = self._run(prefix, use_cache=True).past_key_values
        return Prefix(prefix.ids, prefix.mask, KeptPrompts.of(cache, self.folder))

    def _run(self, prefix: Prefix, use_cache: bool = False, output_hidden_states: bool = False) -> Any:
        return self.language_model(
            input_ids=prefix.ids,
            attention_mask=prefix.mask.long(),
            position_ids=prefix.positions,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )

    def read_on(
        self, prefix: Prefix, tokens: Float[Tensor, "b n c"], bidirectional: bool = False
    ) -> Float[Tensor, "b n c"]:
        """Last hidden states of further tokens after the prompts. `bidirectional` lets them all see each
        other; otherwise they are causal, as the prompts always are.
        """
        return self.read_on_layers(prefix, tokens, LAST, bidirectional)[0]

    def read_on_layers(
        self,
        prefix: Prefix,
        tokens: Float[Tensor, "b n c"],
        layers: Sequence[int],
        bidirectional: bool = False,
    ) -> tuple[Float[Tensor, "b n c"], ...]:
        """Hidden states of further tokens in several layers, counted as in `read_layers`."""
        tokens = tokens.to(self.language_model.dtype)
        if self.reads_apart and prefix.kept is None and self.is_frozen:
            prefix = self.remember(prefix)
        read = _read_whole if prefix.kept is None else _read_after
        return read(self.language_model, prefix, tokens, bidirectional, layers)

    def embed(self, ids: Int[Tensor, "b k"]) -> Float[Tensor, "b k c"]:
        """Embeddings of token ids."""
        return self.language_model.get_input_embeddings()(ids)

    def logits(self, states: Float[Tensor, "b k c"]) -> Float[Tensor, "b k v"]:
        """Scores of the next token, float32. The model has to be loaded with its head."""
        assert self.head is not None, "the MLLM was loaded without its head"
        return self.head(states).float()


def _all_heads(kept: Float[Tensor, "b h m e"]) -> Float[Tensor, "b m d"]:
    return rearrange(kept, "b h m e -> b m (h e)")


def states_of(out: Any, layers: Sequence[int]) -> tuple[Tensor, ...]:
    """Hidden states of layers, out of what a transformers model returned."""
    return tuple(out.last_hidden_state if layer == -1 else out.hidden_states[layer] for layer in layers)


def _read_after(
    model: Any, prefix: Prefix, tokens: Tensor, bidirectional: bool, layers: Sequence[int]
) -> tuple[Tensor, ...]:
    """After the prompts whose keys and values are kept. The mask is whole, so that nothing has to ask a GPU
    what it says.
    """
    assert prefix.kept is not None
    num_text, num = prefix.ids.shape[1], tokens.shape[1]
    mask = torch.cat([prefix.mask, prefix.mask.new_ones(tokens.shape[:2])], dim=1)
    seen = mask[:, None, None].expand(-1, 1, num, -1)
    if not bidirectional:
        places = torch.arange(mask.shape[1], device=mask.device)
        seen = seen & (places <= num_text + torch.arange(num, device=mask.device)[:, None])
    out = model(
        inputs_embeds=tokens,
        attention_mask=seen,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, num_text:],
        past_key_values=prefix.kept.cache(),
        use_cache=True,
        output_hidden_states=tuple(layers) != LAST,
    )
    return states_of(out, layers)


def _read_whole(
    model: Any, prefix: Prefix, tokens: Tensor, bidirectional: bool, layers: Sequence[int]
) -> tuple[Tensor, ...]:
    """Prompts and tokens at once, each row rolled until its padding lies at the end, where no token that
    counts looks: the causal LLM takes no mask, so flash attention serves, and no position ids, so nothing
    waits for the GPU to tell what they say.
    """
    rows = torch.cat([model.get_input_embeddings()(prefix.ids), tokens.to(model.dtype)], dim=1)
    length, num_text = rows.shape[1], prefix.ids.shape[1]
    padding = (~prefix.mask).sum(1, keepdim=True)
    order = torch.arange(length, device=rows.device) + padding
    rows = take(rows, order % length)
    mask = None
    if bidirectional:
        mask = see_each_other(num_text - padding, tokens.shape[1], length)
    is_last = tuple(layers) == LAST
    out = model(inputs_embeds=rows, attention_mask=mask, use_cache=False, output_hidden_states=not is_last)
    places = torch.arange(num_text, length, device=rows.device) - padding
    return tuple(take(state, places) for state in states_of(out, layers))


def see_each_other(first: Int[Tensor, "b 1"], num: int, length: int) -> Bool[Tensor, "b 1 l l"]:
    """Which token (row) sees which (column): causal, but the `num` tokens from `first` on see each other."""
    places = torch.arange(length, device=first.device)
    inside = (places >= first) & (places < first + num)
    return ((places[:, None] >= places) | (inside[:, :, None] & inside[:, None, :]))[:, None]


def take(rows: Shaped[Tensor, "b n c"], positions: Int[Tensor, "b m"]) -> Shaped[Tensor, "b m c"]:
    """The tokens of each row at positions of its own, [b, m, c]."""
    return rows.gather(1, positions[..., None].expand(-1, -1, rows.shape[-1]))


def to_the_left(rows: Shaped[Tensor, "b m c"], mask: Bool[Tensor, "b m"]) -> Shaped[Tensor, "b m c"]:
    """Left-padded rows with their padding at the end."""
    length = mask.shape[1]
    order = torch.arange(length, device=mask.device) + (~mask).sum(1, keepdim=True)
    return take(rows, order % length)
