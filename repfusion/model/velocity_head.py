"""Transfusion's denoiser (arXiv 2408.11039): a linear head on the outputs of the LLM, which denoises
itself.
"""

from jaxtyping import Float
from torch import Tensor, nn

from repfusion.conditioning.base import Condition, Context
from repfusion.layers import RMSNorm
from repfusion.model.denoiser import Denoiser, Prefilled


class VelocityHead(Denoiser):
    """A linear head in the place of a DiT: the LLM's outputs -> velocity; zero at first, as a DiT's."""

    def __init__(self, aligned_width: int, latent_dim: int):
        super().__init__()
        self.norm = RMSNorm(aligned_width, eps=1e-6)
        self.out = nn.Linear(aligned_width, latent_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def prefill(self, contexts: tuple[Context, ...]) -> Prefilled:
        """Nothing: the head attends to no context. Raises ValueError where there is one."""
        if contexts:
            raise ValueError(f"a velocity head takes aligned tokens alone, got {len(contexts)} contexts")
        return Prefilled()

    def forward(
        self, z_t: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition, static: Prefilled
    ) -> Float[Tensor, "b n d"]:
        """The velocity; neither z_t nor t enters but through the condition."""
        assert condition.aligned is not None
        return self.out(self.norm(condition.aligned))
