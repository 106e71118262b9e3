"""Rows of a plan -> models on shared weights; a DiT that takes another row's FLOPs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.ladder.plans.base import Plan, Row, Space
from repfusion.diffusion.flow import FlowConfig
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.flops import sample_flops
from repfusion.latents.load import EncoderConfig
from repfusion.model.config import ModelConfig
from repfusion.model.dit import DiTConfig
from repfusion.model.meta import meta_from_config

SPACES: dict[Space, tuple[str, str]] = {"rae": ("vision_tower", "decoder"), "vae": ("vae", "vae")}
"""Folders, in that of the weights, of what encodes and what decodes."""
FLOPS_TOLERANCE = 0.06
"""How far from the asked-for FLOPs a matched DiT may lie, for the sake of its proportions."""


@dataclass(frozen=True)
class Common:
    """What the rows share: where the weights lie, DiT, noise levels, and the image whose FLOPs count."""

    weights: Path
    dit: DiTConfig
    flow: FlowConfig
    sampler: SamplerConfig
    prompt_tokens: int
    image_size: int


def model_of(row: Row, common: Common, dits: Mapping[str, DiTConfig]) -> ModelConfig:
    """The row's model; `dits` are those matched in FLOPs, by row."""
    encoder, decoder = SPACES[row.space]
    second = {} if row.second is None else {"second": common.weights / row.second}
    return ModelConfig.model_validate(
        {
            "mllm": common.weights / row.llm,
            "encoder": EncoderConfig(path=common.weights / encoder, image_size=common.image_size),
            "decoder": common.weights / decoder,
            "conditioning": {**row.conditioning, **second},
            "dit": dits.get(row.name, common.dit),
            "flow": common.flow,
        }
    )


def matched_dits(plan: Plan, common: Common, rows: Sequence[str] | None = None) -> dict[str, DiTConfig]:
    """DiTs of those of the rows (None: all) that are to take another's FLOPs an image.

    Raises:
        ValueError: a folder of weights is missing.
    """
    found = {}
    for row in map(plan.rows.__getitem__, plan.rows if rows is None else rows):
        if row.same_flops_as is not None:
            target = image_flops(model_of(plan.rows[row.same_flops_as], common, {}), common)
            found[row.name] = matched_dit(model_of(row, common, {}), target, common)
    return found


def image_flops(model: ModelConfig, common: Common) -> float:
    """FLOPs of one image without the decoder, which is the same for all rows of a latent space."""
    return sample_flops(meta_from_config(model), common.prompt_tokens, common.sampler)


def matched_dit(model: ModelConfig, target: float, common: Common) -> DiTConfig:
    """A DiT grown in width and depth until an image takes `target` FLOPs: of those within 6% the one whose
    proportions are nearest to the common one's; where there is none, the nearest in FLOPs.
    """
    base = model.dit
    head = base.hidden_size // base.num_heads

    def flops(dit: DiTConfig) -> float:
        return image_flops(model.model_copy(update={"dit": dit}), common)

    found: list[tuple[bool, float, DiTConfig]] = []
    for heads in range(base.num_heads, 8 * base.num_heads + 1):
        wide = base.model_copy(update={"hidden_size": heads * head, "num_heads": heads})
        # blocks are alike: FLOPs are linear in depth
        least = flops(wide)
        block = flops(wide.model_copy(update={"depth": base.depth + 1})) - least
        depth = max(base.depth, round(base.depth + (target - least) / block))
        off = abs((least + (depth - base.depth) * block) / target - 1)
        skew = abs(heads / base.num_heads - depth / base.depth)
        is_near = off <= FLOPS_TOLERANCE
        found.append((not is_near, skew if is_near else off, wide.model_copy(update={"depth": depth})))
        if least > target:
            break
    return min(found, key=lambda one: one[:2])[2]
