"""What a plan is made of: rows, rungs between them, and the claims that their scores are to show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

Space = Literal["rae", "vae"]
LLM = Literal["llava", "llava_noise_taught", "language", "llava_large"]
"""A folder of weights: perceives clean images, perceives noised latents too, has never seen any, larger."""


@dataclass(frozen=True)
class Row:
    """One method on one language model. `paper` is its score in the paper, None where there is none."""

    name: str
    label: str
    llm: LLM
    conditioning: Mapping[str, Any]
    num_seeds: int = 3
    space: Space = "rae"
    paper: float | None = None
    second: LLM | None = None
    """The second language model, of a method that reads the prompt with two (`second` of its settings)."""
    same_flops_as: str | None = None
    """The row whose FLOPs an image a wider and deeper DiT is to reach."""
    setup: str = ""
    """The experiment of the paper that the score is of; scores of different ones are not compared."""

    @property
    def rewriting(self) -> Mapping[str, Any] | None:
        """How the language model rewrites prompts; None where it does not."""
        return self.conditioning.get("rewriting")


@dataclass(frozen=True)
class Step:
    """A rung: a row, and the one it changes one thing of. `adopted` tells whether the next builds on it."""

    row: str
    change: str
    before: str | None = None
    adopted: bool = True


@dataclass(frozen=True)
class Claim:
    """The first row scores above the second; of four, by more than the third above the fourth. `margin`
    turns it around: the first is not above the second by more than that.
    """

    text: str
    rows: tuple[str, ...]
    margin: float | None = None


@dataclass(frozen=True)
class Plan:
    """A comparison that was written down before it ran."""

    title: str
    about: str
    """What is compared, and of which paper, in the page's first sentence."""
    command: str
    """What makes results and page."""
    listed: tuple[Row, ...]
    """All rows, in the order in which they run: what the tested claims need comes first."""
    ladders: Mapping[str, tuple[Step, ...]]
    claims: tuple[Claim, ...]
    """What is tested, in the plan's order; Holm's correction is over these."""
    described: tuple[Claim, ...] = ()
    """What is compared and not tested."""
    charts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Rows that share a chart beside the ladders' own, by its title."""
    sampled_again: tuple[str, ...] = ()
    """Rows whose final checkpoints are sampled with more and with fewer steps."""

    @cached_property
    def rows(self) -> dict[str, Row]:
        return {row.name: row for row in self.listed}

    def in_order(self, rows: Sequence[str], seeds: Sequence[int] | None = None) -> list[tuple[str, int]]:
        """Rows and seeds, seed by seed, so that one whole ladder stands before the next is begun; where no
        seeds are given, as many as the plan has of each row.
        """
        listed = range(max(row.num_seeds for row in self.listed)) if seeds is None else seeds
        return [
            (row.name, seed)
            for seed in listed
            for row in self.listed
            if row.name in rows and (seeds is not None or seed < row.num_seeds)
        ]

    def ladders_of(self, row: str) -> list[str]:
        return [name for name, steps in self.ladders.items() if row in {step.row for step in steps}]

    def check_rows(self, rows: Sequence[str]) -> None:
        """Raises ValueError, naming them, where rows are none of the plan's."""
        if unknown := [row for row in rows if row not in self.rows]:
            raise ValueError(f"no rows {', '.join(unknown)}; there are {', '.join(self.rows)}")
