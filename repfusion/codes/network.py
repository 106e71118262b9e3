"""Features and pixels -> codes of both branches -> pixels: the network that a tokenizer trains (DualViTok;
ILLUME+, arXiv 2504.01934, section 3.1).
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from repfusion.codes.pixel import ConvConfig, ConvDecoder, ConvEncoder, PixelConfig
from repfusion.codes.quantise import SimVQ
from repfusion.codes.semantic import SemanticBranch, SemanticConfig
from repfusion.config import Config

Side = Annotated[int, Field(ge=1)]


class BranchesConfig(Config):
    """Which branches there are, and how large. A branch that is left out (null) has no codes."""

    semantic: SemanticConfig | None = SemanticConfig()
    """Codes of a vision tower's features."""
    pixel: PixelConfig | None = PixelConfig()
    """Codes of the pixels."""
    conv: ConvConfig = ConvConfig()
    """The convolutions from pixels and to pixels."""

    @model_validator(mode="after")
    def _one_is_there(self) -> "BranchesConfig":
        if self.semantic is None and self.pixel is None:
            raise ValueError("semantic and pixel are both null: give the tokenizer one branch or both")
        return self


class TokenizerConfig(BranchesConfig):
    """A tokenizer's network."""

    image_size: int = Field(ge=1)
    """Side in px of its square images."""
    feature_dim: int = Field(ge=1)
    """Channels of the tower's features."""
    feature_grid: tuple[Side, Side]
    """Rows and columns of the tower's tokens."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> "TokenizerConfig":
        if self.image_size % self.conv.factor:
            raise ValueError(
                f"images of {self.image_size} px are no multiple of {self.conv.factor}, the factor of "
                f"{len(self.conv.multipliers)} levels: change conv.multipliers or encoder.image_size"
            )
        return self

    @property
    def pixel_grid(self) -> tuple[int, int]:
        """Rows and columns of what is decoded, and of the pixel branch's codes."""
        side = self.image_size // self.conv.factor
        return side, side

    @property
    def streams(self) -> list["CodeStream"]:
        """The branches' codes in the order of a row, semantic first; no two share an id."""
        found: list[CodeStream] = []
        for name, branch, grid in (
            ("semantic", self.semantic, self.feature_grid),
            ("pixel", self.pixel, self.pixel_grid),
        ):
            if branch is not None:
                last = found[-1] if found else None
                place, first = (0, 0) if last is None else (last.stop, last.first_code + last.num_codes)
                found.append(CodeStream(name, place, first, branch.num_codes, grid))
        return found


@dataclass(frozen=True)
class CodeStream:
    """The codes of one branch: where they stand in a row, and which ids they have."""

    name: str
    start: int
    first_code: int
    num_codes: int
    grid: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def stop(self) -> int:
        """The place after its last."""
        return self.start + self.num_tokens

    @property
    def places(self) -> slice:
        """The part of a row that it takes."""
        return slice(self.start, self.stop)


class Seen(NamedTuple):
    """What the network is shown of images."""

    pixels: Float[Tensor, "b 3 h w"]
    features: Float[Tensor, "b n c"] | None
    """A tower's; None where there is no semantic branch."""
    has_pixels: Bool[Tensor, " b"]
    """Whether the pixel branch is kept, of each image."""


class DualTokenizer(nn.Module):
    """Two branches and the decoder that reads both."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        self.config = config
        self.semantic = self.encoder = self.pixel = None
        grid_channels = 0
        if config.semantic is not None:
            self.semantic = SemanticBranch(config.semantic, config.feature_dim, config.feature_grid)
            grid_channels += config.semantic.width
        if config.pixel is not None:
            self.encoder = ConvEncoder(config.conv, config.pixel.width)
            self.pixel = SimVQ(config.pixel.num_codes, config.pixel.width)
            grid_channels += config.pixel.width
        self.decoder = ConvDecoder(config.conv, grid_channels)

    @property
    def out(self) -> nn.Module:
        """The last layer, at which adversarial gradients are weighed."""
        return self.decoder.out

    def hidden(self, seen: Seen) -> tuple[Float[Tensor, "b c h w"], dict[str, Float[Tensor, ""]]]:
        """What the last layer reads, and the losses of the branches: the cosine distance of the features that
        the semantic codes give again, and the codebooks'.
        """
        losses: dict[str, Tensor] = {}
        semantic = pixel = None
        if self.semantic is not None:
            assert seen.features is not None
            semantic = self.semantic.quantiser(self.semantic.down(seen.features))
            losses["semantic"] = self.semantic.distance(semantic.vectors, seen.features)
            losses["semantic_codebook"] = semantic.loss
        if self.encoder is not None and self.pixel is not None:
            pixel = self.pixel(self.encoder(seen.pixels))
            losses["pixel_codebook"] = pixel.loss
        grid = self.grid(
            None if semantic is None else semantic.vectors,
            None if pixel is None else pixel.vectors * seen.has_pixels[:, None, None],
        )
        return self.decoder.hidden(grid), losses

    def grid(
        self, semantic: Float[Tensor, "b n d"] | None, pixel: Float[Tensor, "b m e"] | None
    ) -> Float[Tensor, "b q r s"]:
        """Both branches' vectors on the grid that is decoded: the semantic ones resized to it."""
        rows, columns = self.config.pixel_grid
        parts = []
        if semantic is not None:
            plane = rearrange(semantic, "b (r c) d -> b d r c", r=self.config.feature_grid[0])
            parts.append(F.interpolate(plane, (rows, columns), mode="bilinear", align_corners=False))
        if pixel is not None:
            parts.append(rearrange(pixel, "b (r c) d -> b d r c", r=rows))
        return torch.cat(parts, dim=1)

    def to_pixels(self, hidden: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        """Pixels, about [0, 1] and not clamped."""
        return self.decoder.out(hidden)

    @torch.no_grad()
    def codes(
        self, pixels: Float[Tensor, "b 3 h w"], features: Float[Tensor, "b n c"] | None
    ) -> Int[Tensor, "b m"]:
        """The row of ids of each image: semantic codes, then pixel codes."""
        found = []
        for stream in self.config.streams:
            if stream.name == "semantic":
                assert self.semantic is not None and features is not None
                own = self.semantic.quantiser.nearest(self.semantic.down(features))
            else:
                assert self.encoder is not None and self.pixel is not None
                own = self.pixel.nearest(self.encoder(pixels))
            found.append(own + stream.first_code)
        return torch.cat(found, dim=1)

    @torch.no_grad()
    def decoded(self, codes: Int[Tensor, "b m"]) -> Float[Tensor, "b 3 h w"]:
        """Pixels of rows of ids, or of the semantic ones alone, as where the pixel branch was dropped."""
        semantic = pixel = None
        for stream in self.config.streams:
            own = codes[:, stream.places] - stream.first_code
            if stream.name == "semantic":
                assert self.semantic is not None
                semantic = self.semantic.quantiser.look_up(own)
            else:
                assert self.pixel is not None
                if own.shape[1]:
                    pixel = self.pixel.look_up(own)
                else:
                    pixel = self.pixel.base.new_zeros(len(codes), stream.num_tokens, self.pixel.width)
        return self.to_pixels(self.decoder.hidden(self.grid(semantic, pixel)))
