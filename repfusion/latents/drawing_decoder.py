"""Features -> pixels, drawn: a small DiT whose flow (diffusion/flow.py) runs over patches of the image or of
a VAE's latents, each token conditioned on the features at its place by token-wise AdaLN (RepFusion, arXiv
2606.14700: its second decoder is a diffusion model that reads the representation).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from repfusion.config import Config
from repfusion.diffusion.flow import initial_noise
from repfusion.diffusion.sampler import Solver, integrate, noise_levels
from repfusion.latents.geometry import VAES, vae_factor
from repfusion.latents.saved import read_decoder, save_decoder
from repfusion.latents.vae import VAEDecoder, bare_vae
from repfusion.layers import ModulatedBlock, TimestepEmbedder, rotary_grid, sin_cos_positions

MLP_RATIO = 4.0


class DrawingDecoderConfig(Config):
    kind: Literal["drawing"] = "drawing"
    """Tells the folder from other decoders'."""
    feature_dim: int = Field(ge=1)
    """Channels of a feature token."""
    grid: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    """Rows and columns of feature tokens."""
    image_size: int = Field(ge=1)
    """Side in px of the square images it draws."""
    patch_size: int = Field(ge=1)
    """Side of the square that a token of the DiT stands for: in px, or in latent pixels of the VAE."""
    vae: dict[str, Any] | None = None
    """config.json of the VAE in whose latents it draws; None draws pixels."""
    hidden_size: int = Field(default=128, ge=4)
    """Width: at least the channels of a DiT token (RAE, arXiv 2510.11690, section 4)."""
    depth: int = Field(default=4, ge=1)
    """Number of blocks."""
    num_heads: int = Field(default=2, ge=1)
    """Attention heads."""
    shift: float = Field(default=1.0, gt=0)
    """Shift of the noise levels, in training as in sampling; 1 leaves them evenly spread."""
    num_steps: int = Field(default=8, ge=1)
    """Steps of the solver from noise to image. The weights depend on neither."""
    solver: Solver = "euler"

    @model_validator(mode="after")
    def _fits(self) -> "DrawingDecoderConfig":
        if self.canvas_side % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide a side of {self.canvas_side}")
        if self.canvas_grid[0] < max(self.grid):
            raise ValueError(
                f"{self.canvas_grid[0]} patches a side for features of {self.grid[0]} x {self.grid[1]} "
                f"tokens, which would be averaged; lower patch_size {self.patch_size}"
            )
        if self.hidden_size < self.canvas_shape[1]:
            raise ValueError(
                f"hidden_size {self.hidden_size} is below the {self.canvas_shape[1]} channels of a patch; "
                f"raise it, or lower patch_size {self.patch_size}"
            )
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} over {self.num_heads} heads must give a head width "
                "divisible by 4"
            )
        return self

    @property
    def canvas_side(self) -> int:
        """Side of what is drawn, in px or in latent pixels. Raises ValueError where the VAE's factor does not
        divide the image's.
        """
        factor = 1 if self.vae is None else vae_factor(self._vae_fields)
        if self.image_size % factor:
            raise ValueError(f"image_size {self.image_size}: not a multiple of {factor}, the VAE's factor")
        return self.image_size // factor

    @property
    def canvas_grid(self) -> tuple[int, int]:
        """Rows and columns of DiT tokens."""
        side = self.canvas_side // self.patch_size
        return side, side

    @property
    def channels(self) -> int:
        """Channels of what is drawn."""
        return 3 if self.vae is None else self._vae_fields["latent_channels"]

    @property
    def canvas_shape(self) -> tuple[int, int]:
        """DiT tokens of an image, and channels of each."""
        return math.prod(self.canvas_grid), self.channels * self.patch_size**2

    @property
    def _vae_fields(self) -> dict[str, Any]:
        assert self.vae is not None
        name = self.vae.get("_class_name")
        if name not in VAES:
            raise ValueError(f"vae: _class_name {name!r}; expected one of {', '.join(VAES)}")
        return VAES[name] | self.vae


class DrawingDecoder(nn.Module):
    """A decoder that draws: what it makes of features also depends on a seed."""

    positions: Tensor
    rotary: Tensor
    spread: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, config: DrawingDecoderConfig):
        super().__init__()
        self.config = config
        dim, heads, (_, width) = config.hidden_size, config.num_heads, config.canvas_shape
        self.embed = nn.Linear(width, dim)
        self.embed_features = nn.Linear(config.feature_dim, dim)
        self.time = TimestepEmbedder(dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList(ModulatedBlock(dim, heads, MLP_RATIO) for _ in range(config.depth))
        self.final_norm = nn.RMSNorm(dim, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, width)
        for layer in (self.modulation, self.final_modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        grid = config.canvas_grid
        self.register_buffer("positions", sin_cos_positions(grid, dim), persistent=False)
        self.register_buffer("rotary", rotary_grid(grid, dim // heads), persistent=False)
        self.register_buffer("spread", interpolation(config.grid, grid), persistent=False)
        self.register_buffer("mean", torch.full((config.channels,), 0.5))
        self.register_buffer("std", torch.full((config.channels,), 0.5))
        self.vae = None if config.vae is None else _vae_decoder(config)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the feature tokens that it reads."""
        return self.config.grid

    @property
    def feature_dim(self) -> int:
        """Channels of these."""
        return self.config.feature_dim

    @property
    def image_size(self) -> int:
        """Side in px of the images it makes."""
        return self.config.image_size

    def forward(
        self, features: Float[Tensor, "b n d"], seeds: Sequence[int] | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """Pixels, about [0, 1] and not clamped. Row i is a function of its features and of seeds[i], whatever
        rows lie beside it; None is seed 0 in each row.
        """
        seeds = [0] * len(features) if seeds is None else seeds
        if len(seeds) != len(features):
            raise ValueError(f"{len(seeds)} seeds for {len(features)} images; expected one for each")
        noise = initial_noise(seeds, self.config.canvas_shape).to(features.device)
        condition = self.read(features)

        def velocity(z: Tensor, level: float) -> Tensor:
            t = torch.full((len(z),), level, device=z.device)
            return self.velocity(z, t, condition).float()

        levels = noise_levels(self.config.num_steps, self.config.shift).tolist()
        return self.show(integrate(velocity, noise, levels, self.config.solver))

    def read(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b m c"]:
        """The features at the places of the DiT's tokens, interpolated between theirs."""
        return self.spread @ self.embed_features(features)

    def velocity(
        self, z_t: Float[Tensor, "b m k"], t: Float[Tensor, " b"], condition: Float[Tensor, "b m c"]
    ) -> Float[Tensor, "b m k"]:
        """noise - canvas, of a canvas at noise level t; `condition` is what `read` makes of features."""
        signal = F.silu(condition + self.time(t)[:, None])
        modulation = rearrange(self.modulation(signal), "b m (s d) -> b m s d", s=6)
        x = self.embed(z_t) + self.positions + condition
        for block in self.blocks:
            x = block(x, modulation, self.rotary)
        shift, scale = self.final_modulation(signal).chunk(2, dim=-1)
        return self.out(self.final_norm(x) * (1 + scale) + shift)

    def measure_canvas(self, canvas: Float[Tensor, "b c r w"]) -> None:
        """Takes mean and standard deviation of each channel from a VAE's latents, by which canvases are
        normalised; those of pixels are 1/2.
        """
        values = rearrange(canvas.double(), "b c r w -> c (b r w)")
        self.mean.copy_(values.mean(1))
        self.std.copy_(values.std(1).clamp(min=1e-6))

    def paint(self, canvas: Float[Tensor, "b c r w"]) -> Float[Tensor, "b m k"]:
        """Pixels in [0, 1], or a VAE's latent image, as normalised tokens."""
        level = (canvas - self.mean.view(1, -1, 1, 1)) / self.std.view(1, -1, 1, 1)
        size = self.config.patch_size
        return rearrange(level, "b c (r p) (w q) -> b (r w) (p q c)", p=size, q=size)

    def show(self, tokens: Float[Tensor, "b m k"]) -> Float[Tensor, "b 3 h w"]:
        """Normalised tokens as pixels."""
        (rows, columns), size = self.config.canvas_grid, self.config.patch_size
        level = rearrange(tokens, "b (r w) (p q c) -> b c (r p) (w q)", r=rows, w=columns, p=size, q=size)
        canvas = level * self.std.view(1, -1, 1, 1) + self.mean.view(1, -1, 1, 1)
        return canvas if self.vae is None else self.vae(rearrange(canvas, "b c r w -> b (r w) c"))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes a folder that holds all of it, the VAE's decoder too."""
        save_decoder(self, self.config, folder, dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path, on_meta: bool = False) -> "DrawingDecoder":
        """Loads strictly, in float32, frozen and in eval mode.

        Args:
            folder: as written by `save_pretrained`.
            on_meta: shapes without memory: of the weights the headers alone are read.

        Raises: ValueError: where the folder lacks a file, or weights are missing, left over, of another shape
            or not finite.
        """
        return read_decoder(cls, DrawingDecoderConfig, folder, on_meta)


def interpolation(source: tuple[int, int], target: tuple[int, int]) -> Float[Tensor, "m n"]:
    """The weights by which bilinear interpolation makes `target` tokens of `source` tokens: as a matrix,
    whose gradient is the same at every run on a GPU too.
    """
    one_each = rearrange(torch.eye(math.prod(source)), "k (r c) -> k 1 r c", r=source[0])
    return F.interpolate(one_each, target, mode="bilinear", align_corners=False).flatten(1).mT.contiguous()


def _vae_decoder(config: DrawingDecoderConfig) -> VAEDecoder:
    assert config.vae is not None
    return VAEDecoder(bare_vae(config.vae), (config.canvas_side, config.canvas_side))
