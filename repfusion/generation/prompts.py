"""Options of a command line, or a file of prompts -> prompts, each with the seeds that it is drawn from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from repfusion.config import Strict, validate

NUM_SEEDS = 2**64
"""Seeds that a generator of torch takes, from 0."""
Seed = Annotated[int, Field(ge=0, lt=NUM_SEEDS, strict=True)]


@dataclass(frozen=True)
class PromptRow:
    """A prompt and the seeds of its images: one row of a grid."""

    prompt: str
    seeds: tuple[int, ...]


class PromptLine(Strict):
    """A line of a `.jsonl` file of prompts."""

    prompt: str
    """What to draw."""
    seed: Seed | None = None
    """The seed of its one image."""
    seeds: tuple[Seed, ...] | None = Field(default=None, min_length=1)
    """The seeds of its images. Without either, those of the command line."""

    def row(self, seeds: tuple[int, ...]) -> PromptRow:
        """The prompt with its own seeds, or else with the given ones. Raises ValueError where it names both
        one seed and several.
        """
        if self.seed is not None and self.seeds is not None:
            raise ValueError("both seed and seeds; expected one of them")
        own = self.seeds if self.seed is None else (self.seed,)
        return PromptRow(self.prompt, own or seeds)


def chosen_seeds(seeds: Sequence[int], num_images: int | None) -> tuple[int, ...]:
    """The seeds of each prompt: a list as it stands, or `num_images` from the only one on.

    Raises:
        ValueError: a seed that torch does not take, no image, or a list beside a number of images.
    """
    if num_images is not None and num_images < 1:
        raise ValueError(f"--num-images {num_images}: expected at least 1")
    if num_images is not None and len(seeds) > 1:
        raise ValueError(
            f"--num-images {num_images} beside {len(seeds)} seeds; each seed is an image: leave one out"
        )
    found = tuple(range(seeds[0], seeds[0] + (num_images or 1))) if len(seeds) == 1 else tuple(seeds)
    if wrong := [seed for seed in found if not 0 <= seed < NUM_SEEDS]:
        raise ValueError(f"--seed {wrong[0]}: expected 0 to {NUM_SEEDS - 1}")
    return found


def read_prompts(path: Path, seeds: tuple[int, ...]) -> list[PromptRow]:
    """The prompts of a text file, one a line, or of a `.jsonl` file, an object a line: `{"prompt": "a red
    circle", "seeds": [3, 4]}`. Empty lines are passed over; a line without seeds has the given ones.

    Raises:
        ValueError: the file cannot be read, holds no prompt, or has a line that is none; with its number.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts-file {path}: {error}") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"--prompts-file {path}: holds no prompt; expected one a line")
    if path.suffix.lower() != ".jsonl":
        return [PromptRow(line.strip(), seeds) for _, line in lines]
    return [_json_row(line, f"{path}:{number}", seeds) for number, line in lines]


def _json_row(line: str, place: str, seeds: tuple[int, ...]) -> PromptRow:
    try:
        return validate(PromptLine, json.loads(line), place).row(seeds)
    except json.JSONDecodeError as error:
        raise ValueError(f'{place}: no JSON ({error}); expected {{"prompt": "a red circle"}}') from error
    except ValueError as error:
        said = str(error)
        raise ValueError(said if said.startswith(place) else f"{place}: {said}") from error
