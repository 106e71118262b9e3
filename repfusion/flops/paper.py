"""RepFusion's published TFLOPs per image against ours: the settings under which they agree best.

The paper (arXiv 2606.14700) gives neither the number of steps nor the length of the text, nor says what it
counts. `best_settings` tries every combination of `Settings`; nothing else is fitted, the models are those of
`configs/`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import yaml

from repfusion.engine import EngineConfig
from repfusion.flops.count import DENOISER, decoder_cost, row_costs, train_flops
from repfusion.flops.memory import frozen_bytes, rank_memory, sizes
from repfusion.flops.tables import markdown
from repfusion.meta import CONFIGS, load_model_config, meta_decoder, meta_from_config
from repfusion.model import Generator

TERA = 1e12
EVALUATIONS = range(24, 41)
TEXT_TOKENS = range(16, 513, 16)
TRAINING_TEXT_TOKENS = 128
NUM_RANKS = 128


@dataclass(frozen=True)
class Row:
    name: str
    config: str
    """Of `configs/`."""
    published: int
    """TFLOPs per image."""


FITTED = (
    Row("RepFusion, 7B + 1.3B", "repfusion_7b_1.3b", 547),
    Row("timestep queries, 7B + 1.3B", "queries_timestep_7b_1.3b", 552),
    Row("static queries, 7B + 1.3B", "queries_static_7b_1.3b", 113),
    Row("TextEmbed, 7B + 8.0B", "text_embed_7b_8b", 559),
)
COMPARED = (
    Row("Transfusion, 7B", "transfusion_7b", 552),
    Row("RepFusion, 3B + 5.5B", "repfusion_3b_5.5b", 540),
    Row("RepFusion, 1B + 7.3B", "repfusion_1b_7.3b", 540),
)
"""Not fitted: which language models the paper took is not known, and 540 is 'about'."""


@dataclass(frozen=True)
class Settings:
    num_evaluations: int
    """Of the guided velocity; one a step for Euler's method."""
    num_text_tokens: int
    """Of the prompt; the empty one is padded to it."""
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
def generator_of(config: str) -> Generator:
    return meta_from_config(load_model_config(CONFIGS / f"{config}.yaml"))


@cache
def decoder_flops() -> float:
    generator = generator_of("repfusion_7b_1.3b")
    decoder = meta_decoder(generator.config, generator.grid)
    assert decoder is not None
    return float(decoder_cost(decoder).forward)


@cache
def once_and_each(config: str, num_text_tokens: int, halve: bool, rereads: bool) -> tuple[float, float]:
    row = row_costs(generator_of(config), num_text_tokens, halve, rereads)
    return float(sum(row.once.values())), float(sum(row.each.values()))


def image_flops(row: Row, settings: Settings) -> float:
    """Of one guided image: two rows."""
    rereads = settings.rereads_prompt and row.config.startswith("queries_timestep")
    once, each = once_and_each(row.config, settings.num_text_tokens, settings.halve_causal, rereads)
    return 2 * (once + settings.num_evaluations * each) + settings.with_decoder * decoder_flops()


def difference(row: Row, settings: Settings) -> float:
    """Ours over the published figure, less 1."""
    return image_flops(row, settings) / TERA / row.published - 1


def best_settings(rows: Sequence[Row], evaluations: Iterable[int] = EVALUATIONS) -> Settings:
    """Those whose largest relative difference over the rows is the smallest."""
    yes_no = (False, True)
    tried = (Settings(*one) for one in product(evaluations, TEXT_TOKENS, yes_no, yes_no, yes_no))
    return min(tried, key=lambda settings: max(abs(difference(row, settings)) for row in rows))


def num_layers(row: Row) -> int:
    return len(generator_of(row.config).conditioner.mllm.language_model.layers)


def layers_for(row: Row, settings: Settings) -> float:
    """How many layers of its width the language model of `row` needs for the published figure."""
    return num_layers(row) / (1 + difference(row, settings))


def fit_markdown() -> str:
    """Every row under the settings that fit all of `FITTED` best, and under those that fit best the rows that
    have the same DiT.
    """
    chosen = best_settings(FITTED), best_settings(FITTED[:3])
    rows = [("TFLOPs per image", "paper", "A", "A - paper", "B", "B - paper")]
    for row in (*FITTED, *COMPARED):
        cells = [row.name, ("about " if row.published == 540 else "") + str(row.published)]
        for settings in chosen:
            cells += [f"{image_flops(row, settings) / TERA:.1f}", f"{100 * difference(row, settings):+.1f}%"]
        rows.append(tuple(cells))
    lines = [f"- **{name}**: {settings.describe()}." for name, settings in zip("AB", chosen, strict=True)]
    larger = COMPARED[0]
    lines.append(
        f"- Transfusion's {larger.published} would take {layers_for(larger, chosen[0]):.0f} layers of "
        f"LLaMA-7B's width in place of {num_layers(larger)} (under A)."
    )
    return "\n\n".join((markdown(rows), "\n".join(lines)))


def training_markdown() -> str:
    """Each configuration's parameters, FLOPs of training, and bytes of a rank."""
    rows = [
        (
            "configuration",
            "trained",
            "of it DiT",
            "TFLOPs a sample",
            "ZFLOPs in all",
            "a rank, ZeRO 2, GB",
            "a rank, ZeRO 3, GB",
        )
    ]
    for path in sorted(CONFIGS.glob("*.yaml")):
        generator = generator_of(path.stem)
        fields = yaml.safe_load(path.read_text())
        flops = train_flops(generator, TRAINING_TEXT_TOKENS, has_text_features=False)
        total = flops * fields["num_steps"] * fields["global_batch_size"]
        trained = sum(size.num_trainable for size in sizes(generator).values())
        held = [
            rank_memory(trained, frozen_bytes(generator, engine), engine, NUM_RANKS).device
            for engine in (EngineConfig(zero_stage=2), EngineConfig(zero_stage=3))
        ]
        denoiser = sizes(generator)[DENOISER].num_parameters
        rows.append(
            (
                path.stem,
                f"{trained / 1e9:.2f}B",
                f"{denoiser / 1e9:.2f}B",
                f"{flops / TERA:.1f}",
                f"{total / 1e21:.2f}",
                *(f"{one / 1e9:.1f}" for one in held),
            )
        )
    return markdown(rows)


def paper_markdown() -> str:
    """What docs/flops.md holds of this."""
    training = (
        f"Training with {TRAINING_TEXT_TOKENS} text tokens a sample; bytes of one of {NUM_RANKS} ranks, the "
        "frozen language model whole on each, without activations:"
    )
    return "\n\n".join((fit_markdown(), training, training_markdown()))
