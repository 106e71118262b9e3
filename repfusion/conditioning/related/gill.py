"""GILL (arXiv 2305.17216): a frozen language model learns [IMG] tokens, and a mapper takes its states there
to the space of the frozen text encoder that the generator was trained with; the same states retrieve
images.

Faithful (paper and public code) are eight [IMG] tokens, the only rows of the embedding that train, kept at
the mean norm of the others; the mapper (Linear, a 4 + 4 encoder-decoder of four heads with 77 queries,
Linear), which reads states plus embeddings of the [IMG] tokens; its loss, the un-squared L2 distance to the
text encoder's states, a token at a time; captions of images that the language model sees as four tokens, by
cross-entropy; that of the [IMG] tokens after a caption with half the weight, of which the first is the
model's own word that an image is due; InfoNCE of retrieval, 256 wide. The generator sees the text encoder in
training and the mapper in sampling. Ours are that it trains beside the mapper, the blocks' form (RMSNorm,
SwiGLU, normalised queries and keys), that an image is the mean of its latents, that a caption without an
image trains the [IMG] rows by their share of the softmax alone (the rest of its cross-entropy is constant),
and that a head which is not the embedding, as OPT's is, scores the same rows at the mean norm of its own.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from repfusion.conditioning.base import (
    Conditioner,
    Context,
    Losses,
    MethodConfig,
    Prepared,
    conditioning_prompts,
    frozen_reading,
)
from repfusion.conditioning.captioning import CaptionBatch, CaptioningConfig, caption_batch, caption_losses
from repfusion.config import WeightsFolder
from repfusion.inputs import Inputs
from repfusion.layers import Attention, EncoderBlock, RMSNorm
from repfusion.llm.base import LanguageModel, Prefix, PromptTooLong, take
from repfusion.request import Branch, Request

NUM_HEADS = 4
CAPTIONS = CaptioningConfig(weight=1.0, share=1.0)
"""Every image is captioned."""
IMAGE_STATES = "image_states"
"""What `Request.computed` may hold: the states [k, c] at the [IMG] tokens of a dialogue, which then is drawn
in the place of the prompt.
"""


class GillConfig(MethodConfig):
    method: Literal["gill"] = "gill"
    """[IMG] tokens, mapped to the space of the generator's text encoder."""
    second: WeightsFolder
    """Folder of that text encoder, a causal language model, which stays frozen."""
    num_image_tokens: int = Field(default=8, ge=2)
    """[IMG] tokens."""
    num_queries: int = Field(default=77, ge=2)
    """Tokens of the text encoder: its prompts are padded to so many."""
    width: int = Field(default=512, ge=NUM_HEADS)
    """Channels of the mapper."""
    depth: int = Field(default=4, ge=1)
    """Blocks of the mapper's encoder, and as many of its decoder."""
    num_visual: int = Field(default=4, ge=1)
    """Tokens as which the language model sees an image."""
    retrieval_width: int = Field(default=256, ge=1)
    """Channels in which captions and images are compared."""
    image_tokens_weight: float = Field(default=0.5, ge=0)
    """Weight of the [IMG] tokens' cross-entropy; all other losses have 1."""

    @property
    def needs_head(self) -> bool:
        return True

    def tokens_beside(self, num_latents: int) -> int:
        """The [IMG] tokens."""
        return self.num_image_tokens


class QueryDecoderBlock(nn.Module):
    """A pre-norm transformer block whose tokens see each other, then a memory."""

    def __init__(self, width: int):
        super().__init__()
        self.among = EncoderBlock(width, NUM_HEADS)
        self.memory_norm = RMSNorm(width, eps=1e-6)
        self.memory_attention = Attention(width, NUM_HEADS)

    def forward(
        self,
        x: Float[Tensor, "b q c"],
        memory: Float[Tensor, "b m c"],
        mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b q c"]:
        """The tokens after the block; `mask` marks the memory's real ones."""
        x = x + self.among.attention(self.among.attention_norm(x))
        attended = self.memory_attention.keys_values(memory)
        x = x + self.memory_attention(self.memory_norm(x), attended=attended, mask=mask)
        return x + self.among.mlp(self.among.mlp_norm(x))


class GillMapper(nn.Module):
    """Tokens of the language model -> as many of the text encoder's as there are queries."""

    def __init__(self, llm_width: int, encoder_width: int, config: GillConfig):
        super().__init__()
        width = config.width
        self.enter = nn.Linear(llm_width, width)
        self.encoder = nn.ModuleList(EncoderBlock(width, NUM_HEADS) for _ in range(config.depth))
        self.encoder_norm = RMSNorm(width, eps=1e-6)
        self.queries = nn.Parameter(torch.randn(config.num_queries, width))
        self.decoder = nn.ModuleList(QueryDecoderBlock(width) for _ in range(config.depth))
        self.decoder_norm = RMSNorm(width, eps=1e-6)
        self.leave = nn.Linear(width, encoder_width)

    def forward(self, tokens: Float[Tensor, "b k c"]) -> Float[Tensor, "b q e"]:
        memory = self.enter(tokens)
        for block in self.encoder:
            memory = block(memory)
        memory = self.encoder_norm(memory)
        x = self.queries.expand(len(tokens), -1, -1)
        for block in self.decoder:
            x = block(x, memory)
        return self.leave(self.decoder_norm(x))


class GillConditioner(Conditioner):
    """The text encoder's states of the prompt in training, the mapper's in sampling.

    Args:
        llm: the language model, with its head; frozen.
        encoder: the text encoder; frozen.
        latent_dim: channels of a latent token.
        config: the method's settings.

    Raises: ValueError: where the MLLM's context is too short for the [IMG] tokens.
    """

    mean_norm: Tensor
    head_norm: Tensor

    def __init__(self, llm: LanguageModel, encoder: LanguageModel, latent_dim: int, config: GillConfig):
        super().__init__()
        self.llm, self.encoder = llm, encoder
        llm.projector = encoder.projector = None  # visual; left in, they would count as trainable
        llm.leave_room(config.num_image_tokens)
        self.num_queries, self.image_tokens_weight = config.num_queries, config.image_tokens_weight
        self.context_widths = (encoder.width,)
        table = llm.language_model.get_input_embeddings().weight.float()
        assert llm.head is not None
        self.register_buffer("mean_norm", table.norm(dim=1).mean()[None], persistent=False)
        head_norm = llm.head.weight.float().norm(dim=1).mean()[None]
        self.register_buffer("head_norm", head_norm, persistent=False)
        self.rows = nn.Parameter(torch.randn(config.num_image_tokens, llm.width))
        self.mapper = GillMapper(llm.width, encoder.width, config)
        self.see = nn.Linear(latent_dim, config.num_visual * llm.width)
        self.of_text = nn.Linear(llm.width, config.retrieval_width)
        self.of_image = nn.Linear(latent_dim, config.retrieval_width)
        self.log_scale = nn.Parameter(torch.tensor([1 / 0.07]).log())  # DeepSpeed takes no scalars

    @property
    def language_models(self) -> tuple[LanguageModel, ...]:
        """The language model and the text encoder."""
        return self.llm, self.encoder

    def collate(
        self, requests: Sequence[Request], branches: Sequence[Branch], seeds: Sequence[int] | None = None
    ) -> Inputs:
        """Prompts as they condition, in the text encoder's tokens; which of them condition; in training what
        is to be said of each image, in sampling the prompts in the language model's tokens, or what the
        requests hold of a dialogue in their place.
        """
        prompts = [one.prompt for one in requests]
        inputs: Inputs = {
            "encoded": self._padded(conditioning_prompts(requests, branches)),
            "full": torch.tensor([branch != "none" for branch in branches]),
        }
        if seeds is not None:
            self.llm.check_lengths(prompts)
            return {**inputs, "said": caption_batch(self.llm, prompts, seeds, CAPTIONS)}
        inputs["prefix"] = self.llm.tokenise(prompts)
        if any(IMAGE_STATES in one.computed for one in requests):
            nothing = torch.zeros(len(self.rows), self.llm.width)
            inputs["said_before"] = torch.stack([one.computed.get(IMAGE_STATES, nothing) for one in requests])
            inputs["has_said"] = torch.tensor([IMAGE_STATES in one.computed for one in requests])
        return inputs

    def _padded(self, prompts: Sequence[str]) -> Int[Tensor, "b q"]:
        rows = [self.encoder.framed(ids) for ids in self.encoder.token_ids(prompts)]
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > self.num_queries:
                raise PromptTooLong(prompt, len(row), self.num_queries)
        ending = [self.encoder.end_id] * self.num_queries
        return torch.tensor([(row + ending)[: self.num_queries] for row in rows])

    def prepare(self, inputs: Inputs, reuse: bool = False) -> Prepared:
        """The text encoder's states, or the mapper's where a prompt is drawn from; an empty prompt is the
        text encoder's own. `reuse` changes nothing: they are static.
        """
        states = self._encoded(inputs["encoded"])
        if "said" not in inputs:
            read = self.read_image_tokens(inputs["prefix"])
            if "said_before" in inputs:
                read = torch.where(inputs["has_said"][:, None, None], inputs["said_before"].to(read), read)
            mapped = self.mapper(read + self.image_tokens)
            states = torch.where(inputs["full"][:, None, None], mapped, states)
        return Prepared(static=(Context(states),))

    def _encoded(self, ids: Int[Tensor, "b q"]) -> Float[Tensor, "b q e"]:
        with frozen_reading(ids.device):
            states = self.encoder.read(Prefix(ids, torch.ones_like(ids, dtype=torch.bool)))
        return states.to(torch.promote_types(states.dtype, torch.float32))

    @property
    def image_tokens(self) -> Float[Tensor, "k c"]:
        """The [IMG] tokens' embeddings, of the mean norm of all others."""
        return F.normalize(self.rows, dim=1) * self.mean_norm

    @property
    def scored_tokens(self) -> Float[Tensor, "k c"]:
        """The [IMG] tokens as the head scores them: of the mean norm of its rows. Of a head that is not the
        embedding itself those may be ten times as long, and no shorter row would ever be the likeliest.
        """
        return F.normalize(self.rows, dim=1) * self.head_norm

    def read_image_tokens(self, prefix: Prefix) -> Float[Tensor, "b k c"]:
        """The last states at the [IMG] tokens after the prompts."""
        return self.llm.read_on(prefix, self.image_tokens.expand(len(prefix.ids), -1, -1))

    def see_images(self, latents: Float[Tensor, "b n d"]) -> Float[Tensor, "b v c"]:
        """The tokens as which the language model sees images, of their clean latents."""
        return self.see(latents.mean(1)).unflatten(1, (-1, self.llm.width))

    def next_scores(self, states: Float[Tensor, "b c"]) -> Float[Tensor, "b v"]:
        """Scores of the next token after last states, float32: the vocabulary's, then the first [IMG]
        token's. The others follow the first and are never chosen.
        """
        image = states.float() @ self.scored_tokens[:1].float().T
        return torch.cat([self.llm.logits(states[:, None])[:, 0], image], dim=1)

    def text_embeddings(self, states: Float[Tensor, "b k c"]) -> Float[Tensor, "b r"]:
        """Captions, by their states at the [IMG] tokens, as retrieval compares them: of unit length."""
        return F.normalize(self.of_text(states[:, -1]), dim=1)

    def image_embeddings(self, latents: Float[Tensor, "b n d"]) -> Float[Tensor, "b r"]:
        """Images, by their clean latents, as retrieval compares them: of unit length."""
        return F.normalize(self.of_image(latents.mean(1)), dim=1)

    def losses(self, inputs: Inputs, latents: Float[Tensor, "b n d"]) -> Losses:
        """Distance of the mapper's tokens to the text encoder's, where the prompt was not dropped, InfoNCE of
        retrieval within the batch, and cross-entropies of captions and [IMG] tokens.
        """
        said, image_tokens = inputs["said"], self.image_tokens
        rows, places = self._written_out(said)
        hidden = self.llm.language_model(inputs_embeds=rows, use_cache=False).last_hidden_state
        states = take(hidden, places)
        distance = (self.mapper(states + image_tokens) - self._encoded(inputs["encoded"])).norm(dim=-1)
        texts, images = self.text_embeddings(states), self.image_embeddings(latents)
        visual = self.see_images(latents)
        return {
            "embedding": torch.where(inputs["full"], distance.mean(1), 0),
            "retrieval": contrasted(texts, images, self.log_scale.exp()),
            "caption": caption_losses(self.llm, visual, said, bidirectional=False, beside=self.scored_tokens),
            "image_tokens": self.image_tokens_weight * self._image_token_losses(hidden, places),
        }

    def _written_out(self, said: CaptionBatch) -> tuple[Float[Tensor, "b l c"], Int[Tensor, "b k"]]:
        """Captions and the [IMG] tokens after them, in the place of the end token, as embeddings with padding
        at the end; and where the [IMG] tokens stand.
        """
        begin = said.ids.new_full((len(said.ids), 1), self.llm.begin_id)
        num = len(self.rows)
        rows = self.llm.embed(torch.cat([begin, said.ids, begin.expand(-1, num - 1)], dim=1))
        places = said.mask.sum(1, keepdim=True) + torch.arange(num, device=begin.device)
        own = self.image_tokens.to(rows.dtype).expand(len(rows), -1, -1)
        return rows.scatter(1, places[..., None].expand_as(own), own), places

    def _image_token_losses(
        self, hidden: Float[Tensor, "b l c"], places: Int[Tensor, "b k"]
    ) -> Float[Tensor, " b"]:
        """Mean cross-entropy of each [IMG] token after the token before it, among all tokens, and the mean
        -log(1 - p) of all [IMG] tokens where the caption goes on.
        """
        known = self.llm.logits(hidden)
        own = hidden.float() @ self.scored_tokens.float().T
        every = torch.cat([known, own], dim=2).logsumexp(2)
        before = places - 1
        due = (every.gather(1, before) - take(own, before).diagonal(dim1=1, dim2=2)).mean(1)
        goes_on = torch.arange(hidden.shape[1], device=hidden.device) < before[:, :1]
        undue = (every - known.logsumexp(2)) * goes_on
        return due + undue.sum(1) / goes_on.sum(1).clamp(min=1)


def contrasted(
    texts: Float[Tensor, "b r"], images: Float[Tensor, "b r"], scale: Float[Tensor, "1"]
) -> Float[Tensor, " b"]:
    """InfoNCE of each pair among all of the batch, from text to image and back (CLIP, arXiv 2103.00020)."""
    scores = scale * (texts[:, None] * images[None]).sum(-1)
    own = torch.arange(len(texts), device=texts.device)
    there, back = (F.cross_entropy(one, own, reduction="none") for one in (scores, scores.T))
    return (there + back) / 2
