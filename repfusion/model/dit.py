"""The denoiser: noisy latents, noise level and a condition -> velocity.

RepFusion's interface is token-wise AdaLN-Single (arXiv 2606.14700; AdaLN-Single from PixArt-alpha, arXiv
2310.00426): aligned tokens correspond one to one to latent tokens. Cross-attention is the interface for
contexts of any length. The blocks follow RAE's DiT (arXiv 2510.11690): RMSNorm, SwiGLU, rotary positions,
zero-initialised gates and output; of clips the positions have three axes.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from repfusion.conditioning.base import Condition, Context
from repfusion.config import Config
from repfusion.layers import Grid, TimestepEmbedder, rotary_at, rotary_grid, sin_cos_positions
from repfusion.model.blocks.adaln import AdaLNBlock
from repfusion.model.blocks.cross_attention import CrossAttentionBlock
from repfusion.model.blocks.mixed_attention import MixedAttentionBlock
from repfusion.model.denoiser import Denoiser, Prefilled


class DiTConfig(Config):
    hidden_size: int = Field(default=192, ge=1)
    """Width. At least the latent width, or the model cannot fit even one image (RAE, section 4)."""
    depth: int = Field(default=6, ge=1)
    """Number of blocks."""
    num_heads: int = Field(default=3, ge=1)
    """Attention heads; the head width must be a multiple of 4 (2-D rotary pairs)."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Parameters of the SwiGLU layer, counted as a plain MLP of this expansion (its inner width is 2/3 of
    it).
    """
    absolute_positions: bool = True
    """Add fixed sine-cosine positions to the embedded latents, as RAE's DiT does. Rotary positions are
    relative: without these, only a condition that differs from place to place tells where a token stands.
    """


def block_of(config: DiTConfig, aligned_width: int | None, context_widths: tuple[int, ...]) -> AdaLNBlock:
    """A block for exactly the conditions that a conditioner gives.

    Raises:
        ValueError: no block takes such a condition.
    """
    sizes = config.hidden_size, config.num_heads, config.mlp_ratio
    match aligned_width, context_widths:
        case int(), ():
            return AdaLNBlock(*sizes)
        case None, (width,):
            return CrossAttentionBlock(*sizes, width)
        case _:
            raise ValueError(
                f"no DiT block takes aligned tokens of width {aligned_width} beside contexts of widths "
                f"{context_widths}; expected aligned tokens alone (AdaLN) or one context (cross-attention)"
            )


class DiT(Denoiser):
    """Velocity of noisy latents.

    Args: config: widths and depth. latent_dim: channels of a latent token. grid: rows and columns of latent
        tokens, of clips frames before them (patch size 1: a DiT token is a latent token). aligned_width:
        channels of condition tokens that correspond to latent tokens; None where there are none.
        context_widths: channels of the contexts that are attended to.

    Raises:
        ValueError: a width does not divide or is below the latent width, or no block takes such a condition.
    """

    rotary: Tensor

    def __init__(
        self,
        config: DiTConfig,
        latent_dim: int,
        grid: Grid,
        aligned_width: int | None = None,
        context_widths: tuple[int, ...] = (),
    ):
        super().__init__()
        dim, heads = config.hidden_size, config.num_heads
        if dim % heads or (dim // heads) % 4:
            raise ValueError(f"hidden_size {dim} over {heads} heads must give a head width divisible by 4")
        if dim // heads // 2 < len(grid):
            raise ValueError(f"hidden_size {dim} over {heads} heads: {len(grid)} axes need a head width of 8")
        if dim < latent_dim:
            raise ValueError(
                f"hidden_size {dim} is below the latent width {latent_dim}; raise dit.hidden_size to at "
                f"least {latent_dim}"
            )
        self.config = config
        self.grid = grid
        self.after_grid = max(grid)
        """Row, column and frame after the latents' grid, from which positions of contexts count."""
        self.embed = nn.Linear(latent_dim, dim)
        signal_width = aligned_width or (*context_widths, dim)[0]
        self.time = TimestepEmbedder(signal_width)
        self.modulation = nn.Linear(signal_width, 6 * dim)
        self.blocks = nn.ModuleList(
            self.new_block(config, aligned_width, context_widths) for _ in range(config.depth)
        )
        self.final_norm = nn.RMSNorm(dim, elementwise_affine=False, eps=1e-6)
        self.final_table = nn.Parameter(torch.zeros(2, dim))
        self.final_modulation = nn.Linear(signal_width, 2 * dim)
        self.out = nn.Linear(dim, latent_dim)
        self.register_buffer("rotary", rotary_grid(grid, dim // heads), persistent=False)
        positions = sin_cos_positions(grid, dim) if config.absolute_positions else torch.zeros(1, dim)
        self.register_buffer("positions", positions, persistent=False)
        for layer in (self.modulation, self.final_modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @staticmethod
    def new_block(
        config: DiTConfig, aligned_width: int | None, context_widths: tuple[int, ...]
    ) -> AdaLNBlock:
        """A block for these conditions. Raises ValueError where none takes them."""
        return block_of(config, aligned_width, context_widths)

    def prefill(self, contexts: tuple[Context, ...], first: int = 0) -> Prefilled:
        """Keys and values of each context in every block; `first` is the number of the first of them."""
        made = (
            tuple(block.keys_values(number, context.tokens) for block in self.blocks)
            for number, context in enumerate(contexts, first)
        )
        return Prefilled(tuple(made), tuple(context.mask for context in contexts))

    def forward(
        self, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition, static: Prefilled
    ) -> Float[Tensor, "b n d"]:
        """Velocity (noise - latents) at noise level t, [b, n, d]."""
        signal = self.time(t)[:, None, :]
        signal = F.silu(signal if condition.aligned is None else condition.aligned + signal)
        modulation = rearrange(self.modulation(signal), "b k (s d) -> b k s d", s=6)
        contexts = static + self.prefill(condition.contexts, len(static.masks))
        x = self.embed(z_t) + self.positions
        for number, block in enumerate(self.blocks):
            x = block(x, modulation, self.rotary, contexts.of_block(number))
        return self.velocity_of(x, signal)

    def rotary_of(self, context: Context) -> Float[Tensor, "rows m half 2"]:
        """Rotary angles of a context's tokens, in the plane of the latents, which stand at their row and
        column: text follows along the diagonal after the last of these (as Qwen-Image places it, arXiv
        2508.02324), images stand left of them. Of a context that says no positions, one row for all.
        """
        num_axes = len(self.grid)
        if context.positions is None:
            numbers = torch.arange(context.tokens.shape[1], device=self.rotary.device)
            places = self.after_grid + numbers[None, :, None].expand(1, -1, num_axes)
        else:
            places = self._on_axes(context.positions)
            places = places + self.after_grid * (places[..., -1:] >= 0)
        return rotary_at(places, 2 * self.rotary.shape[1]).to(self.rotary.dtype)

    def _on_axes(self, positions: Int[Tensor, "b m a"]) -> Int[Tensor, "b m _"]:
        """Positions on the axes of the latents' grid: in clips, rows and columns alone are text's, whose
        frame counts on as they do, or an image's, which stands beside the first frame.
        """
        if positions.shape[-1] == len(self.grid):
            return positions
        rows, cols = positions.unbind(-1)
        return torch.stack([rows * (cols >= 0), rows, cols], dim=-1)

    def velocity_of(
        self, x: Float[Tensor, "b n d"], signal: Float[Tensor, "b k c"]
    ) -> Float[Tensor, "b n latent"]:
        """The blocks' output, normalised and modulated, as velocity."""
        shift, scale = (
            rearrange(self.final_modulation(signal), "b k (s d) -> b k s d", s=2) + self.final_table
        ).unbind(2)
        return self.out(self.final_norm(x) * (1 + scale) + shift)


class MixedDiT(DiT):
    """A DiT that attends to two contexts, mixed in every block (LLMDiff-Adapter, arXiv 2502.04412). Its
    weights but the blocks' `added` are those of a DiT of the first context.

    Raises:
        ValueError: a width does not divide or is below the latent width, or the conditioner gives anything
            but two contexts.
    """

    @staticmethod
    def new_block(
        config: DiTConfig, aligned_width: int | None, context_widths: tuple[int, ...]
    ) -> MixedAttentionBlock:
        """A block for both contexts. Raises ValueError where the conditioner gives anything else."""
        if aligned_width is not None or len(context_widths) != 2:
            raise ValueError(
                f"mixed are two contexts; the method gives aligned tokens of width {aligned_width} and "
                f"contexts of widths {context_widths}"
            )
        sizes = config.hidden_size, config.num_heads, config.mlp_ratio
        return MixedAttentionBlock(*sizes, *context_widths)


def controlled_dit(
    config: DiTConfig,
    latent_dim: int,
    grid: Grid,
    aligned_width: int | None,
    context_widths: tuple[int, ...],
) -> MixedDiT:
    """A MixedDiT that is frozen but for what its blocks have for the second context; raises as it does."""
    made = MixedDiT(config, latent_dim, grid, aligned_width, context_widths)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(".added." in name)
    return made
