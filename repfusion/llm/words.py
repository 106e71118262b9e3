"""A text -> its words, and those of them that a language model never read."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from repfusion.display.terminal import printable

WORDS = "words.txt"
"""Beside a tokenizer, where whoever trained the language model left it: all words of its training texts, one
a line, as `words_of` gives them, sorted.
"""
JOINING = "-'\u2019"
"""Punctuation that may stand inside a word."""
SHOWN = 3
"""Prompts that a warning names."""
SHOWN_CHARACTERS = 60
"""Characters of a prompt that a warning shows."""


def words_of(text: str) -> list[str]:
    """The words of a text in any alphabet, case-folded, without punctuation, each once and in order."""
    folded = unicodedata.normalize("NFC", text).casefold()
    spaced = "".join(char if _is_of_a_word(char) else " " for char in folded)
    stripped = (word.strip(JOINING) for word in spaced.split())
    return list(dict.fromkeys(word for word in stripped if word))


def _is_of_a_word(char: str) -> bool:
    """Letters, marks, numbers and symbols are; punctuation and controls are not, but for hyphens and
    apostrophes.
    """
    return char in JOINING or unicodedata.category(char)[0] in "LMNS"


def unknown_words(folder: Path, text: str) -> list[str]:
    """Words of a text that the list of a language model's folder lacks; none where the folder has no list. A
    word with a hyphen is known by its parts too.
    """
    path = folder / WORDS
    if not path.is_file():
        return []
    known = {"", *path.read_text(encoding="utf-8").split()}
    return [word for word in words_of(text) if word not in known and not known.issuperset(word.split("-"))]


def unread(folder: Path, prompts: Sequence[str]) -> str | None:
    """A warning that names the words of prompts which a language model never read; None where it read all."""
    found = {prompt: words for prompt in prompts if (words := unknown_words(folder, prompt))}
    if not found:
        return None
    named = [
        f'{" and ".join(map(repr, words))} in "{prompt[:SHOWN_CHARACTERS]}"'
        for prompt, words in list(found.items())[:SHOWN]
    ]
    if len(found) > SHOWN:
        named.append(f"words in {len(found) - SHOWN} more prompts")
    return printable(f"the model never read {', '.join(named)}: it draws from the other words")
