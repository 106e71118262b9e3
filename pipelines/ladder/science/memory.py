"""Whether the foundation and the rows fit into a GPU's memory."""

from repfusion.foundation.config import FoundationConfig
from repfusion.model.dit import DiTConfig

ACTIVATION_BYTES = 34
"""Bytes that the backward pass keeps of a token in a layer, for each channel, in 16 bits and without the
attention's square (Korthikanti et al., arXiv 2205.05198, equation 1).
"""
MODULATION_BYTES = 24
"""What AdaLN keeps besides: six modulations, and their sums with a block's own."""

TEXT_TOKENS = 16
"""About as many as a text has."""
BLOCK = 12
"""Weights of a transformer's layer, in squares of its width."""
STATE_BYTES = 20
"""Bytes of a trained weight, its gradient, two moments and its average."""


def foundation_bytes(config: FoundationConfig) -> tuple[float, float]:
    """About what training the foundation holds on a GPU: whatever the batch is, and for each scene of it."""
    n, texts = config.num_tokens, config.texts_per_scene * (config.num_tokens + 2 * TEXT_TOKENS) * 2
    image = 3 * config.image_size**2 + n * config.vision_width * 2
    weights = BLOCK * (
        config.text_width**2 * config.text_layers + config.large_width**2 * config.large_layers
    )
    seen = (
        (n + 2 * TEXT_TOKENS) * config.text_width * config.text_layers
        + n * config.vision_width * config.vision_layers
        + n * config.decoder_width * config.decoder_depth
    )
    return float(config.num_scenes * (image + texts) + STATE_BYTES * weights), float(seen * ACTIVATION_BYTES)


def row_bytes(config: FoundationConfig, dit: DiTConfig, num_scenes: int) -> tuple[float, float]:
    """About what training the largest row holds, as `foundation_bytes`: of the larger LLaVA, with a DiT of
    twice the width.
    """
    n = config.num_tokens
    widths = ((config.text_width, config.text_layers), (config.large_width, config.large_layers))
    llm = max(width * layers for width, layers in widths)
    wide = 2 * dit.hidden_size
    weights = BLOCK * (max(width**2 * layers for width, layers in widths) + wide**2 * dit.depth)
    read = llm * (n + TEXT_TOKENS) * ACTIVATION_BYTES
    drawn = wide * dit.depth * n * (ACTIVATION_BYTES + MODULATION_BYTES)
    return float(num_scenes * n * config.vision_width * 2 + STATE_BYTES * weights), float(read + drawn)


class NotEnoughMemory(ValueError):
    """A GPU on which the plan does not fit."""


def check_memory(fixed: float, per_sample: float, batch_size: int, free: float, what: str) -> None:
    """Raises NotEnoughMemory, which says the batch that fits, where so much is not free."""
    needed, gib = fixed + batch_size * per_sample, 2**30
    if needed <= free:
        return
    most = int((free - fixed) / per_sample)
    fits = f"batch_size={most} would fit" if most > 0 else "no batch of any size would fit"
    raise NotEnoughMemory(
        f"{what} takes about {needed / gib:.1f} GiB with batches of {batch_size}, {free / gib:.1f} GiB of "
        f"the GPU are free; {fits}: give batch_size=..., a smaller --config, or a larger GPU"
    )
