"""The rows of docs/ladder/plan.md: what each trains, with how many seeds, and the paper's score of it (arXiv
2606.14700).

All rows share data, steps, batch, optimizer and, unless a row says otherwise, the DiT.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
LLM = Literal["llava", "llava_noise_taught", "language", "llava_large"]
"""A folder of weights: perceives clean images, perceives noised latents too, has never seen any, larger."""
SPACES: dict[Space, tuple[str, str]] = {"rae": ("vision_tower", "decoder"), "vae": ("vae", "vae")}
"""Folders, in that of the weights, of what encodes and what decodes."""
FLOPS_TOLERANCE = 0.06
"""How far from the asked-for FLOPs a matched DiT may lie, for the sake of its proportions."""


@dataclass(frozen=True)
class Row:
    """One method on one language model. `paper` is its GenEval in the paper, None where there is none."""

    name: str
    label: str
    llm: LLM
    conditioning: Mapping[str, Any]
    num_seeds: int = 3
    space: Space = "rae"
    paper: float | None = None
    same_flops_as: str | None = None
    """The row whose FLOPs an image a wider and deeper DiT is to reach."""


@dataclass(frozen=True)
class Step:
    """A rung: a row, and the one it changes one thing of. `adopted` tells whether the next builds on it."""

    row: str
    change: str
    before: str | None = None
    adopted: bool = True


NOISY = {"method": "noisy_latents"}
BIDIRECTIONAL = {**NOISY, "bidirectional": True}
CROSS = {**NOISY, "interface": "cross_attention"}
TUNED = {**BIDIRECTIONAL, "train_llm": True, "captioning": {}}
TRANSFUSION = {"method": "transfusion"}
STATIC = {"method": "queries"}
TIMED = {"method": "queries", "reads_time": True}
CONNECTED = {"method": "queries", "connector_depth": 2}
TEXT = {"method": "text_embed"}
REREAD = "queries read at every step"
TRAINED = "LLM trained"

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("repfusion", "RepFusion", "llava", NOISY, 5, paper=0.70),
        Row("static_queries", "static queries", "llava", STATIC, 5, paper=0.55),
        Row("timestep_queries", REREAD, "llava", TIMED, 5, paper=0.54),
        Row("text_embed", "TextEmbed", "llava", TEXT),
        Row("repfusion_noise_taught", "RepFusion, noise-taught", "llava_noise_taught", NOISY, 5),
        Row("static_queries_noise_taught", "static queries, noise-taught", "llava_noise_taught", STATIC, 5),
        Row("timestep_queries_noise_taught", f"{REREAD}, noise-taught", "llava_noise_taught", TIMED),
        Row("text_embed_noise_taught", "TextEmbed, noise-taught", "llava_noise_taught", TEXT),
        Row("repfusion_language", "noisy latents, language-only LLM", "language", NOISY, 5, paper=0.64),
        Row("static_queries_language", "static queries, language-only LLM", "language", STATIC, 5),
        Row("timestep_queries_language", f"{REREAD}, language-only LLM", "language", TIMED),
        Row("text_embed_language", "TextEmbed, language-only LLM", "language", TEXT),
        Row("repfusion_bidirectional", "RepFusion, bidirectional", "llava", BIDIRECTIONAL),
        Row(
            "repfusion_noise_taught_bidirectional",
            "RepFusion, noise-taught, bidirectional",
            "llava_noise_taught",
            BIDIRECTIONAL,
            5,
        ),
        Row("repfusion_tuned", f"RepFusion, {TRAINED}", "llava", TUNED, paper=0.68),
        Row(
            "repfusion_language_tuned",
            f"noisy latents, language-only {TRAINED}",
            "language",
            TUNED,
            paper=0.65,
        ),
        Row("text_embed_vae", "TextEmbed, VAE", "language", TEXT, space="vae", paper=0.47),
        Row("repfusion_vae", "noisy latents, VAE", "language", NOISY, space="vae", paper=0.54),
        Row("static_queries_wide", "static queries, larger DiT", "llava", STATIC, same_flops_as="repfusion"),
        Row(
            "text_embed_wide",
            "TextEmbed, larger DiT",
            "llava",
            TEXT,
            paper=0.66,
            same_flops_as="repfusion",
        ),
        Row("repfusion_large", "RepFusion, larger MLLM", "llava_large", NOISY),
        Row("static_queries_large", "static queries, larger MLLM", "llava_large", STATIC),
        Row("repfusion_cross", "RepFusion, cross-attention", "llava", CROSS, paper=0.69),
        Row("connected_queries", "static queries, bidirectional connector", "llava", CONNECTED),
        Row("transfusion_vae", "Transfusion, VAE", "language", TRANSFUSION, space="vae", paper=0.56),
        Row("transfusion_language", "Transfusion, language-only LLM", "language", TRANSFUSION, paper=0.54),
        Row("transfusion", "Transfusion", "llava", TRANSFUSION, paper=0.62),
        Row("transfusion_large", "Transfusion, larger MLLM", "llava_large", TRANSFUSION, paper=0.64),
    )
}
"""All rows, in the order in which they run: what the tested claims need comes first."""

LADDERS: dict[str, tuple[Step, ...]] = {
    "From TextEmbed": (
        Step("text_embed_vae", "TextEmbed, VAE"),
        Step("repfusion_vae", "+ noisy latents into the LLM", "text_embed_vae"),
        Step("repfusion_language", "+ RAE", "repfusion_vae"),
        Step("repfusion_language_tuned", "+ train the LLM", "repfusion_language"),
        Step("repfusion_tuned", "+ perception pretraining", "repfusion_language_tuned"),
        Step("repfusion", "back to a frozen LLM = RepFusion", "repfusion_tuned"),
    ),
    "From Transfusion": (
        Step("transfusion_vae", "Transfusion, VAE"),
        Step("transfusion_language", "+ RAE", "transfusion_vae"),
        Step("transfusion", "+ perception pretraining", "transfusion_language"),
        Step("transfusion_large", "+ larger LLM", "transfusion", adopted=False),
        Step("repfusion_tuned", "+ LLM as conditional encoder", "transfusion"),
        Step("repfusion", "+ freeze the LLM = RepFusion", "repfusion_tuned"),
    ),
}


def in_order(rows: Sequence[str], seeds: Sequence[int] | None = None) -> list[tuple[str, int]]:
    """Rows and seeds, seed by seed, so that one whole ladder stands before the next is begun; where no seeds
    are given, as many as the plan has of each row.
    """
    listed = range(max(row.num_seeds for row in ROWS.values())) if seeds is None else seeds
    return [
        (name, seed)
        for seed in listed
        for name in ROWS
        if name in rows and (seeds is not None or seed < ROWS[name].num_seeds)
    ]


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
    return ModelConfig.model_validate(
        {
            "mllm": common.weights / row.llm,
            "encoder": EncoderConfig(path=common.weights / encoder, image_size=common.image_size),
            "decoder": common.weights / decoder,
            "conditioning": dict(row.conditioning),
            "dit": dits.get(row.name, common.dit),
            "flow": common.flow,
        }
    )


def matched_dits(common: Common, rows: Sequence[str] = tuple(ROWS)) -> dict[str, DiTConfig]:
    """DiTs of those of the rows that are to take another's FLOPs an image.

    Raises:
        ValueError: a folder of weights is missing.
    """
    found = {}
    for row in map(ROWS.__getitem__, rows):
        if row.same_flops_as is not None:
            target = image_flops(model_of(ROWS[row.same_flops_as], common, {}), common)
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
