"""One bidirectional transformer over text tokens and image codes (UniDisc, arXiv 2503.20853): normalised
queries and keys, an RMSNorm before and after each half of a block, an embedding a modality.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from repfusion.codes.network import CodeStream
from repfusion.config import Config
from repfusion.layers import Attention, RMSNorm, SwiGLU, rotary_at


class JointTransformerConfig(Config):
    """The transformer over text and codes."""

    hidden_size: int = Field(default=768, ge=4)
    """Width."""
    depth: int = Field(default=12, ge=1)
    """Blocks."""
    num_heads: int = Field(default=12, ge=1)
    """Attention heads."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Inner width of the MLPs over the width."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "JointTransformerConfig":
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of 4 x {self.num_heads} heads; positions of "
                "rows and columns need heads of a multiple of 4 channels"
            )
        return self


@dataclass(frozen=True)
class Section:
    """Tokens of one modality, or of one stream of codes: their places in a sequence and their ids."""

    name: str
    start: int
    stop: int
    first_id: int
    num_ids: int

    @property
    def places(self) -> slice:
        """The part of a sequence that it takes."""
        return slice(self.start, self.stop)


TEXT = "text"


def sections_of(text_length: int, text_ids: int, streams: Sequence[CodeStream]) -> list[Section]:
    """Text first, then each stream of codes, whose ids follow those of the text."""
    found = [Section(TEXT, 0, text_length, 0, text_ids)]
    for stream in streams:
        start, stop = text_length + stream.start, text_length + stream.stop
        found.append(Section(stream.name, start, stop, text_ids + stream.first_code, stream.num_codes))
    return found


def places_of(text_length: int, streams: Sequence[CodeStream]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Rows and columns of all tokens: codes stand on the largest grid, those of a coarser one at the first of
    the places that they cover; text follows along the diagonal after it.
    """
    sides = [max(stream.grid[axis] for stream in streams) for axis in (0, 1)]
    along = torch.arange(text_length)
    rows, columns = [along + sides[0]], [along + sides[1]]
    for stream in streams:
        at = [torch.arange(num) * side // num for num, side in zip(stream.grid, sides, strict=True)]
        own = torch.meshgrid(at[0], at[1], indexing="ij")
        rows.append(own[0].flatten())
        columns.append(own[1].flatten())
    return torch.cat(rows), torch.cat(columns)


class SandwichBlock(nn.Module):
    """A transformer block whose halves are each normalised before and after."""

    def __init__(self, config: JointTransformerConfig):
        super().__init__()
        width = config.hidden_size
        self.attention_norm, self.attention_post = RMSNorm(width, eps=1e-6), RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, config.num_heads)
        self.mlp_norm, self.mlp_post = RMSNorm(width, eps=1e-6), RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width, config.mlp_ratio)

    def forward(self, x: Float[Tensor, "b n d"], rotary: Float[Tensor, "n half 2"]) -> Float[Tensor, "b n d"]:
        x = x + self.attention_post(self.attention(self.attention_norm(x), rotary))
        return x + self.mlp_post(self.mlp(self.mlp_norm(x)))


class JointTransformer(nn.Module):
    """Sequences of ids, or of the mask token, -> scores of what each place holds, of its own section's ids.

    Args:
        config: its sizes.
        text_length: text tokens of a sequence.
        text_ids: how many ids text has.
        streams: the image's codes.
    """

    def __init__(
        self,
        config: JointTransformerConfig,
        text_length: int,
        text_ids: int,
        streams: Sequence[CodeStream],
    ):
        super().__init__()
        self.sections = sections_of(text_length, text_ids, streams)
        self.mask_id = self.sections[-1].first_id + self.sections[-1].num_ids
        width = config.hidden_size
        self.embed = nn.Embedding(self.mask_id + 1, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.modality = nn.Parameter(torch.zeros(len(self.sections), width))
        self.blocks = nn.ModuleList(SandwichBlock(config) for _ in range(config.depth))
        self.norm = RMSNorm(width, eps=1e-6)
        self.heads = nn.ModuleDict({one.name: nn.Linear(width, one.num_ids) for one in self.sections})
        rotary = rotary_at(torch.stack(places_of(text_length, streams), dim=-1), width // config.num_heads)
        kinds = torch.cat(
            [torch.full((one.stop - one.start,), number) for number, one in enumerate(self.sections)]
        )
        self.register_buffer("rotary", rotary, persistent=False)
        self.register_buffer("kinds", kinds, persistent=False)

    @property
    def num_tokens(self) -> int:
        """Tokens of a sequence."""
        return self.sections[-1].stop

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """States of all places, of which those that are to be found hold `mask_id`."""
        x = self.embed(ids) + self.modality[self.kinds]
        for block in self.blocks:
            x = block(x, self.rotary)
        return self.norm(x)

    def scores(self, states: Float[Tensor, "b n d"], section: Section) -> Float[Tensor, "b m k"]:
        """Scores of a section's own ids at its places, float32: what a place cannot hold is not scored."""
        return self.heads[section.name](states[:, section.places]).float()
