"""Options of a command line, or a JSON file -> turns of texts and images, read and checked.

{"turns": [[{"say": "a red circle"}, {"image": "a.png"}], [{"say": "draw it in blue"}]]}
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from pydantic import Field, model_validator

from repfusion.config import Strict, validate
from repfusion.generate import read_images

SAY, IMAGE, REPLY = "--say", "--image", "--reply"


class PartLine(Strict):
    """A text or an image of a turn, as a file holds it."""

    say: str | None = None
    image: Path | None = None
    """A file, beside the one that names it where it is no whole path."""

    @model_validator(mode="after")
    def _is_one(self) -> "PartLine":
        if (self.say is None) == (self.image is None):
            raise ValueError('expected either "say" or "image"')
        return self


class DialogueFile(Strict):
    """What somebody says and shows; the model replies after each turn."""

    turns: tuple[tuple[PartLine, ...], ...] = Field(min_length=1)


@dataclass(frozen=True)
class TurnPart:
    """A text, or an image, and what messages call it."""

    place: str
    text: str | None = None
    image: UInt8[np.ndarray, "_ _ 3"] | None = None
    file: str | None = None


Turn = Sequence[TurnPart]


def given_turns(parts: Sequence[tuple[str, str]]) -> list[Turn]:
    """Turns of options in their order; `--reply` ends one, and so does the end. Raises ValueError where a
    turn is empty, or an image cannot be read.
    """
    turns: list[list[TurnPart]] = [[]]
    for option, value in parts:
        if option == REPLY:
            turns.append([])
        else:
            number = f"turn {len(turns)}, part {len(turns[-1]) + 1}"
            turns[-1].append(said(number, value) if option == SAY else shown(number, Path(value)))
    if len(turns) > 1 and not turns[-1]:
        turns.pop()
    check_turns(turns)
    return list(turns)


def read_turns(path: Path) -> list[Turn]:
    """Turns of a JSON file. Raises ValueError, with the file's name, where it is no such file or an image
    cannot be read.
    """
    try:
        found = validate(DialogueFile, json.loads(path.read_text(encoding="utf-8-sig")), str(path))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f'{path}: {error}; expected {{"turns": [[{{"say": "..."}}]]}}') from error
    turns = [
        [_part(f"{path}: turn {number}, part {count}", one, path.parent) for count, one in enumerate(line, 1)]
        for number, line in enumerate(found.turns, 1)
    ]
    check_turns(turns)
    return list(turns)


def _part(place: str, line: PartLine, folder: Path) -> TurnPart:
    if line.say is not None:
        return said(place, line.say)
    assert line.image is not None
    return shown(place, folder / line.image)


def said(place: str, text: str) -> TurnPart:
    """A text."""
    return TurnPart(f"{place} ({text[:40]!r})", text=text)


def shown(place: str, path: Path) -> TurnPart:
    """An image of a file. Raises ValueError where it cannot be read."""
    return TurnPart(f"{place} ({path})", image=read_images([path])[0], file=str(path))


def check_turns(turns: Sequence[Turn]) -> None:
    """Raises ValueError where nothing is said or shown in a turn."""
    for number, turn in enumerate(turns, 1):
        if not turn:
            raise ValueError(f"turn {number} is empty; expected --say TEXT or --image FILE")
