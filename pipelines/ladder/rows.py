"""The rows of RepFusion's comparisons (arXiv 2606.14700): what each trains, and the paper's GenEval for it.

All rows share data, steps, batch, optimizer and, unless a row says otherwise, the DiT.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from repfusion.diffusion.flow import FlowConfig
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.flops import sample_flops
from repfusion.latents.load import EncoderConfig
from repfusion.model.config import ModelConfig
from repfusion.model.dit import DiTConfig
from repfusion.model.meta import meta_from_config

Space = Literal["rae", "vae"]
LLM = Literal["llava_fluent", "language", "llava_large"]
SPACES: dict[Space, tuple[str, str]] = {"rae": ("vision_tower", "decoder"), "vae": ("vae", "vae")}
"""Folders, in that of the weights, of what encodes and what decodes."""
FLOPS_TOLERANCE = 0.06
"""How far from the asked-for FLOPs a matched DiT may lie, for the sake of its proportions."""


@dataclass(frozen=True)
class Row:
    """One method. `paper` is its GenEval in the paper, None where it has no such figure."""

    name: str
    label: str
    llm: LLM
    space: Space
    conditioning: Mapping[str, Any]
    paper: float | None = None
    same_flops_as: str | None = None
    """The row whose FLOPs an image a wider and deeper DiT is to reach."""
    note: str = ""


@dataclass(frozen=True)
class Step:
    """A rung: a row, and the one it changes one thing of. `adopted` tells whether the next builds on it."""

    row: str
    change: str
    before: str | None = None
    adopted: bool = True


NOISY = {"method": "noisy_latents"}
TUNED = {"method": "noisy_latents", "train_llm": True, "bidirectional": True, "captioning": {}}
TRANSFUSION = {"method": "transfusion"}
STATIC = {"method": "queries"}
TIMED = {"method": "queries", "reads_time": True}
CONNECTED = {"method": "queries", "connector_depth": 2}
TEXT = {"method": "text_embed"}

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("repfusion", "RepFusion", "llava_fluent", "rae", NOISY, 0.70),
        Row("static_queries", "static queries", "llava_fluent", "rae", STATIC, 0.55),
        Row(
            "timestep_queries",
            "timestep queries, read again at every step",
            "llava_fluent",
            "rae",
            TIMED,
            0.54,
            note="as many FLOPs an image as RepFusion, the noisy latents unseen",
        ),
        Row("text_embed_vae", "TextEmbed, VAE", "language", "vae", TEXT, 0.47),
        Row("noisy_vae", "noisy latents into the LLM, VAE", "language", "vae", NOISY, 0.54),
        Row("noisy_rae", "the same in RAE", "language", "rae", NOISY, 0.64),
        Row(
            "noisy_rae_tuned",
            "the same, LLM trained",
            "language",
            "rae",
            TUNED,
            0.65,
            note="caption loss added",
        ),
        Row(
            "tuned",
            "perception-pretrained LLM, trained",
            "llava_fluent",
            "rae",
            TUNED,
            0.68,
            note="caption loss added; the paper's LLM as conditional encoder",
        ),
        Row("transfusion_vae", "Transfusion, VAE", "language", "vae", TRANSFUSION, 0.56),
        Row("transfusion_rae", "Transfusion, RAE", "language", "rae", TRANSFUSION, 0.54),
        Row(
            "transfusion_perception",
            "Transfusion, perception-pretrained LLM",
            "llava_fluent",
            "rae",
            TRANSFUSION,
            0.62,
        ),
        Row(
            "transfusion_large",
            "Transfusion, larger LLM",
            "llava_large",
            "rae",
            TRANSFUSION,
            0.64,
            note="the larger LLaVA is perception-pretrained too",
        ),
        Row("text_embed_rae", "TextEmbed, RAE", "language", "rae", TEXT),
        Row(
            "static_queries_language",
            "static queries, language-only LLM",
            "language",
            "rae",
            STATIC,
            note="with the same LLM reading the noisy latents: claim 1 once more",
        ),
        Row(
            "text_embed_rae_wide",
            "TextEmbed, RAE, larger DiT",
            "llava_fluent",
            "rae",
            TEXT,
            0.66,
            same_flops_as="repfusion",
            note="RepFusion's LLM and FLOPs an image; the paper's DiT is 8B",
        ),
        Row(
            "static_queries_wide",
            "static queries, larger DiT",
            "llava_fluent",
            "rae",
            STATIC,
            same_flops_as="repfusion",
            note="RepFusion's FLOPs an image",
        ),
        Row(
            "connected_queries",
            "static queries with a bidirectional connector",
            "llava_fluent",
            "rae",
            CONNECTED,
            note="MetaQuery's connector, 2 layers",
        ),
        Row(
            "repfusion_cross",
            "RepFusion, cross-attention",
            "llava_fluent",
            "rae",
            {**NOISY, "interface": "cross_attention"},
            0.69,
        ),
        Row("repfusion_large", "RepFusion, larger MLLM", "llava_large", "rae", NOISY),
        Row("static_queries_large", "static queries, larger MLLM", "llava_large", "rae", STATIC),
        Row("timestep_queries_large", "timestep queries, larger MLLM", "llava_large", "rae", TIMED),
    )
}
"""All rows, in the order in which they run: what the first claim needs comes first."""

LADDERS: dict[str, tuple[Step, ...]] = {
    "From TextEmbed": (
        Step("text_embed_vae", "TextEmbed, VAE"),
        Step("noisy_vae", "+ noisy latents into the LLM", "text_embed_vae"),
        Step("noisy_rae", "+ RAE", "noisy_vae"),
        Step("noisy_rae_tuned", "+ train the LLM", "noisy_rae"),
        Step("tuned", "+ perception pretraining", "noisy_rae_tuned"),
        Step("repfusion", "back to a frozen LLM = RepFusion", "tuned"),
    ),
    "From Transfusion": (
        Step("transfusion_vae", "Transfusion, VAE"),
        Step("transfusion_rae", "+ RAE", "transfusion_vae"),
        Step("transfusion_perception", "+ perception pretraining", "transfusion_rae"),
        Step("transfusion_large", "+ larger LLM", "transfusion_perception", adopted=False),
        Step("tuned", "+ LLM as conditional encoder", "transfusion_perception"),
        Step("repfusion", "+ freeze the LLM = RepFusion", "tuned"),
    ),
}


@dataclass(frozen=True)
class Common:
    """What the rows share: where the weights lie, DiT, noise levels, and the image whose FLOPs count."""

    weights: Path
    dit: DiTConfig
    flow: FlowConfig
    sampler: SamplerConfig
    prompt_tokens: int
    image_size: int
    widened: dict[str, DiTConfig] = field(default_factory=dict, compare=False)
    """The DiTs matched so far, by row."""


def model_of(row: Row, common: Common) -> ModelConfig:
    """Raises ValueError where a folder of weights is missing, for a row whose DiT is matched to another's."""
    model = model_with(row.llm, row.space, row.conditioning, common)
    if row.same_flops_as is None:
        return model
    if row.name not in common.widened:
        target = image_flops(model_of(ROWS[row.same_flops_as], common), common)
        common.widened[row.name] = matched_dit(model, target, common)
    return model.model_copy(update={"dit": common.widened[row.name]})


def model_with(
    llm: str, space: Space, conditioning: Mapping[str, Any], common: Common, dit: DiTConfig | None = None
) -> ModelConfig:
    """A method on the folders of weights of a language model and of a latent space; `dit` in the place of the
    common one.
    """
    encoder, decoder = SPACES[space]
    return ModelConfig.model_validate(
        {
            "mllm": common.weights / llm,
            "encoder": EncoderConfig(path=common.weights / encoder, image_size=common.image_size),
            "decoder": common.weights / decoder,
            "conditioning": dict(conditioning),
            "dit": dit or common.dit,
            "flow": common.flow,
        }
    )


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
