"""RepFusion's published TFLOPs per image against ours: the settings under which they agree best.

The paper (arXiv 2606.14700) gives neither the number of steps nor the length of the text, nor says what it
counts. `best_settings` tries every combination of `Settings`; nothing else is fitted, the models are those of
`configs/`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

from torch import nn

from repfusion.config import read_values
from repfusion.diffusion.sampler import SamplerConfig
from repfusion.display.tables import markdown
from repfusion.flops.count import (
    DENOISER,
    LLM,
    Costs,
    Counter,
    between,
    decoder_cost,
    sample_flops,
    train_flops,
)
from repfusion.flops.memory import Frozen, rank_memory, sizes
from repfusion.latents.geometry import is_vae
from repfusion.model.meta import CONFIGS, geometry_folder, meta_decoder, meta_from_config
from repfusion.model.text_to_image import TextToImage
from repfusion.runs.checkpoint import load_model_config
from repfusion.training.engine import EngineConfig

TERA = 1e12
EVALUATIONS = range(24, 41)
TEXT_TOKENS = (*range(4, 16, 2), *range(16, 513, 16))
TEXT = 128
"""Tokens of a prompt in the table of the configurations; ours, the paper gives no mean length."""
NUM_RANKS = 128


@dataclass(frozen=True)
class Figure:
    """The paper's TFLOPs of one model."""

    name: str
    config: str
    """Name of a file in `configs/`."""
    published: int
    """TFLOPs per image."""
    is_dense: bool = False
    """Count the DiT as if every weight acted on every latent token, cross-attention's to the text too."""


FITTED = (
    Figure("RepFusion, 7B + 1.3B", "repfusion_7b_1.3b", 547),
    Figure("timestep queries, 7B + 1.3B", "queries_timestep_7b_1.3b", 552),
    Figure("static queries, 7B + 1.3B", "queries_static_7b_1.3b", 113),
    Figure("TextEmbed, 7B + 8.0B", "text_embed_7b_8b", 559),
)
TRANSFUSION = Figure("Transfusion, 7B", "transfusion_7b", 552)
COMPARED = (
    Figure("TextEmbed, all 8.0B on the latents", "text_embed_7b_8b", 559, is_dense=True),
    TRANSFUSION,
    Figure("RepFusion, 3B + 5.5B", "repfusion_3b_5.5b", 540),
    Figure("RepFusion, 1B + 7.3B", "repfusion_1b_7.3b", 540),
)
"""Not fitted: another count of a row above, language models that the paper does not name, and 540 is 'about'.
"""


@dataclass(frozen=True)
class Settings:
    num_evaluations: int
    """Evaluations of the guided velocity; one a step for Euler's method."""
    num_text_tokens: int
    """Tokens of the prompt; the empty one is padded to as many."""
    halve_causal: bool
    """Whether of causal attention only the scores that the mask leaves are counted."""
    with_decoder: bool
    rereads_prompt: bool
    """Whether timestep queries are counted without keys and values kept of the prompt."""

    def describe(self) -> str:
        parts = (
            f"{self.num_evaluations} guided evaluations",
            f"{self.num_text_tokens} text tokens",
            f"causal attention {'halved' if self.halve_causal else 'in full'}",
            f"{'with' if self.with_decoder else 'without'} the decoder",
            f"timestep queries with the prompt {'read at every step' if self.rereads_prompt else 'kept'}",
        )
        return ", ".join(parts)


@cache
def generator_of(config: str) -> TextToImage:
    return meta_from_config(load_model_config(CONFIGS / f"{config}.yaml"))


@cache
def decoder_flops() -> float:
    model = generator_of("repfusion_7b_1.3b")
    decoder = meta_decoder(model.config, model.grid)
    assert decoder is not None
    return float(decoder_cost(decoder).forward)


@cache
def counted_rows(config: str) -> dict[int, tuple[Costs, Costs]]:
    """What a prompt costs once and at each evaluation, by three numbers of text tokens, which tell all."""
    counter = Counter(generator_of(config))
    return {num_tokens: counter.row(num_tokens) for num_tokens in (2, 3, 4)}


def row_costs(config: str, num_text_tokens: int) -> tuple[dict[str, float], dict[str, float]]:
    """FLOPs by part, once a prompt and at each evaluation. As a count of the denoiser alone has it, keys and
    values of the condition are computed at each.
    """
    rows = counted_rows(config)
    once, each = (
        {
            part: float(cost.forward)
            for part, cost in between({at: row[when] for at, row in rows.items()}, num_text_tokens).items()
        }
        for when in range(2)
    )
    each[DENOISER] += once.pop(DENOISER)
    return once, each


def hidden_scores(model: TextToImage, tokens: int) -> float:
    """FLOPs, in both products of the language model's attention, of what a causal mask hides from tokens
    among each other.
    """
    config: Any = model.conditioner.llm.language_model.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return config.num_hidden_layers * 4 * width * tokens * (tokens - 1) / 2


def halve(model: TextToImage, num_text_tokens: int, once: dict[str, float], each: dict[str, float]) -> None:
    """Takes away what the causal mask hides: of the prompt, and of what is read after it, which where the
    condition is aligned is a token for each latent token.
    """
    once[LLM] -= hidden_scores(model, num_text_tokens)
    conditioner = model.conditioner
    if conditioner.aligned_width is not None and not getattr(conditioner, "bidirectional", False):
        when = each if each[LLM] else once
        when[LLM] -= hidden_scores(model, model.latent_shape[0])


def dense_flops(model: TextToImage) -> float:
    """FLOPs of a DiT whose every weight acts on every latent token."""
    tokens, config = model.latent_shape[0], model.config.dit
    layers = (layer for layer in model.denoiser.modules() if isinstance(layer, nn.Linear))
    weights = sum(layer.weight.numel() for layer in layers)
    return float(2 * weights * tokens + config.depth * 4 * config.hidden_size * tokens**2)


@cache
def once_and_each(row: Figure, num_text_tokens: int, halves: bool, rereads: bool) -> tuple[float, float]:
    """FLOPs of a prompt and of an evaluation."""
    model = generator_of(row.config)
    once, each = row_costs(row.config, num_text_tokens)
    if halves:
        halve(model, num_text_tokens, once, each)
    if rereads:
        each[LLM] += once.pop(LLM)
    if row.is_dense:
        each[DENOISER] = dense_flops(model)
    return sum(once.values()), sum(each.values())


def image_flops(row: Figure, settings: Settings) -> float:
    """FLOPs of one guided image: two rows."""
    rereads = settings.rereads_prompt and row.config.startswith("queries_timestep")
    once, each = once_and_each(row, settings.num_text_tokens, settings.halve_causal, rereads)
    return 2 * (once + settings.num_evaluations * each) + settings.with_decoder * decoder_flops()


def difference(row: Figure, settings: Settings) -> float:
    """Ours over the published figure, less 1."""
    return image_flops(row, settings) / TERA / row.published - 1


def best_settings(rows: Sequence[Figure], evaluations: Iterable[int] = EVALUATIONS) -> Settings:
    """The settings whose largest relative difference over the rows is the smallest."""
    yes_no = (False, True)
    tried = (Settings(*one) for one in product(evaluations, TEXT_TOKENS, yes_no, yes_no, yes_no))
    return min(tried, key=lambda settings: max(abs(difference(row, settings)) for row in rows))


def num_layers(row: Figure) -> int:
    return len(generator_of(row.config).conditioner.llm.language_model.layers)


def layers_for(row: Figure, settings: Settings) -> float:
    """How many layers of its width the language model of `row` needs for the published figure."""
    return num_layers(row) / (1 + difference(row, settings))


def fit_markdown() -> str:
    """Every row under the settings that fit all of `FITTED` best (A), those that fit best the rows that have
    the same DiT (B), and those that fit best the rows whose language model reads at every step (C).
    """
    chosen = tuple(best_settings(rows) for rows in (FITTED, FITTED[:3], FITTED[:2]))
    rows = []
    for row in (*FITTED, *COMPARED):
        cells = [row.name, ("about " if row.published == 540 else "") + str(row.published)]
        for settings in chosen:
            cells += [f"{image_flops(row, settings) / TERA:.1f}", f"{100 * difference(row, settings):+.1f}%"]
        rows.append(cells)
    lines = [f"- **{name}**: {settings.describe()}." for name, settings in zip("ABC", chosen, strict=True)]
    needed = layers_for(TRANSFUSION, chosen[0])
    lines.append(
        f"- Transfusion's {TRANSFUSION.published} would take {needed:.0f} layers of LLaMA-7B's width in "
        f"place of {num_layers(TRANSFUSION)} (under A)."
    )
    head = ("TFLOPs per image", "paper", "A", "", "B", "", "C", "")
    return "\n\n".join((markdown(head, rows), "\n".join(lines)))


def sizes_markdown() -> str:
    """Each configuration's parameters, FLOPs of training and of an image, and bytes of a rank."""
    head = ["configuration", "trained", "of it denoiser", "TFLOPs a sample", "ZFLOPs in all"]
    head += ["TFLOPs an image", "a rank, ZeRO 2, GB", "a rank, ZeRO 3, GB"]
    rows = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        model, fields = generator_of(path.stem), read_values(path)
        flops = train_flops(model, TEXT, has_text_features=False)
        found = sizes(model)
        decoded = 0 if is_vae(geometry_folder(model.config.decoder)) else decoder_flops()
        trained = sum(size.num_trainable for size in found.values())
        row = [
            path.stem,
            f"{trained / 1e9:.2f}B",
            f"{found[DENOISER].num_trainable / 1e9:.2f}B",
            f"{flops / TERA:.1f}",
            f"{flops * fields['num_steps'] * fields['global_batch_size'] / 1e21:.2f}",
            f"{(sample_flops(model, TEXT) + decoded) / TERA:.1f}",
        ]
        for stage in (2, 3):
            engine = EngineConfig(zero_stage=stage)
            held = rank_memory(trained, Frozen.of(model, engine), engine, NUM_RANKS)
            row.append(f"{held.device / 1e9:.1f}")
        rows.append(row)
    return markdown(head, rows)


def paper_markdown() -> str:
    """What docs/flops.md holds of this."""
    about = (
        f"The configurations with {TEXT} text tokens: a training sample, the whole training, an image of "
        f"{SamplerConfig().num_steps} guided Euler steps with its decoder, unless that is a VAE, and "
        f"what one of {NUM_RANKS} ranks holds without activations, the frozen language model whole on each:"
    )
    return "\n\n".join((fit_markdown(), about, sizes_markdown()))
