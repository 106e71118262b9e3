"""The rows of docs/ladder/plan.md, what each of them trains, and whether it fits into a GPU's memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.ladder.rows import (
    NOISY,
    STATIC,
    TEXT,
    TIMED,
    TUNED,
    Common,
    Space,
    image_flops,
    matched_dit,
    model_with,
)
from repfusion.foundation.config import FoundationConfig
from repfusion.model.config import ModelConfig
from repfusion.model.dit import DiTConfig

Mllm = Literal["llava", "llava_noise_taught", "language", "llava_large"]
BIDIRECTIONAL = {**NOISY, "bidirectional": True}
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


@dataclass(frozen=True)
class PlanRow:
    """One method on one language model, and with how many seeds it is run."""

    name: str
    label: str
    llm: Mllm
    conditioning: Mapping[str, Any]
    num_seeds: int
    space: Space = "rae"
    same_flops_as: str | None = None
    """The row whose FLOPs an image a wider and deeper DiT is to reach."""


ROWS: dict[str, PlanRow] = {
    row.name: row
    for row in (
        PlanRow("repfusion", "RepFusion", "llava", NOISY, 5),
        PlanRow("static_queries", "static queries", "llava", STATIC, 5),
        PlanRow("timestep_queries", "queries read at every step", "llava", TIMED, 5),
        PlanRow("text_embed", "TextEmbed", "llava", TEXT, 3),
        PlanRow("repfusion_noise_taught", "RepFusion", "llava_noise_taught", NOISY, 5),
        PlanRow("static_queries_noise_taught", "static queries", "llava_noise_taught", STATIC, 5),
        PlanRow(
            "timestep_queries_noise_taught", "queries read at every step", "llava_noise_taught", TIMED, 3
        ),
        PlanRow("text_embed_noise_taught", "TextEmbed", "llava_noise_taught", TEXT, 3),
        PlanRow("repfusion_language", "RepFusion, fresh projector", "language", NOISY, 5),
        PlanRow("static_queries_language", "static queries", "language", STATIC, 5),
        PlanRow("timestep_queries_language", "queries read at every step", "language", TIMED, 3),
        PlanRow("text_embed_language", "TextEmbed", "language", TEXT, 3),
        PlanRow("repfusion_bidirectional", "RepFusion, bidirectional", "llava", BIDIRECTIONAL, 3),
        PlanRow(
            "repfusion_noise_taught_bidirectional",
            "RepFusion, bidirectional",
            "llava_noise_taught",
            BIDIRECTIONAL,
            5,
        ),
        PlanRow("repfusion_tuned", "RepFusion, LLM trained, bidirectional", "llava", TUNED, 3),
        PlanRow("repfusion_language_tuned", "RepFusion, LLM trained, bidirectional", "language", TUNED, 3),
        PlanRow("text_embed_vae", "TextEmbed, VAE", "language", TEXT, 3, "vae"),
        PlanRow("repfusion_vae", "RepFusion, VAE", "language", NOISY, 3, "vae"),
        PlanRow(
            "static_queries_wide", "static queries, larger DiT", "llava", STATIC, 3, same_flops_as="repfusion"
        ),
        PlanRow("text_embed_wide", "TextEmbed, larger DiT", "llava", TEXT, 3, same_flops_as="repfusion"),
        PlanRow("repfusion_large", "RepFusion", "llava_large", NOISY, 3),
        PlanRow("static_queries_large", "static queries", "llava_large", STATIC, 3),
    )
}
"""All rows, in the order in which they run."""
SLOWEST = ("static_queries_wide", "repfusion_tuned", "repfusion_large")
"""Rows of which one is the slowest: the largest DiT, the most trained weights, the largest language model."""


def in_order(rows: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Rows and seeds of the plan, seed by seed."""
    return [(name, seed) for seed in seeds for name in ROWS if name in rows and seed < ROWS[name].num_seeds]


def model_of(row: PlanRow, common: Common, dits: Mapping[str, DiTConfig]) -> ModelConfig:
    """The row's model on the weights in `common.weights`; `dits` are those matched in FLOPs, by row."""
    return model_with(row.llm, row.space, row.conditioning, common, dits.get(row.name))


def matched_dits(common: Common) -> dict[str, DiTConfig]:
    """DiTs of the rows that are to take another's FLOPs an image."""
    found = {}
    for row in ROWS.values():
        if row.same_flops_as is not None:
            target = image_flops(model_of(ROWS[row.same_flops_as], common, {}), common)
            found[row.name] = matched_dit(model_of(row, common, {}), target, common)
    return found


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
