"""T2I-CompBench++'s files -> its prompts, and of each what has to be in the image: noun phrases, two things
and where they are, or things and how many.

The published scorers find these by spaCy's tagger. Here they come from a file that somebody made with it, or
by the rules below, which need no tagger and hold for the sentences that these files are made of.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from repfusion.config import Strict
from repfusion.evaluation.suites.published.files import check_number, read_json_lines, read_text

Category = Literal["color", "shape", "texture", "spatial", "numeracy"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
ATTRIBUTES = ("color", "shape", "texture")
"""Categories of attribute binding."""
NUM_PROMPTS = 300
"""Prompts of each category's official file for evaluation."""
MOST_PHRASES = 8
PASSED_OVER = ("top", "the side", "the left", "the right")
"""Noun phrases that say a place and no thing."""
RELATIONS = (
    "on side of",
    "next to",
    "near",
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
    "on top of",
)
"""The first of these that a prompt holds is its relation."""
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
ONE = ("a", "an", "one")
DETECTED_AS = {
    **dict.fromkeys(("boy", "girl", "man", "woman"), "person"),
    "ship": "boat",
    "telivision": "tv",
    "goldfish": "fish",
    "painting": "picture",
}
"""Things that the official detector calls otherwise; the spelling is the file's."""
BETWEEN = re.compile(
    r"[,.;]|\b(?:and|with|in|on|at|of|near|next to|beside|behind|under|over|is|are|has|have)\b"
)
"""What ends a noun phrase, by our rule."""


class CompBenchPhrases(Strict):
    """A line of the file of phrases: a prompt, its noun phrases (spaCy's `noun_chunks`) and, of a spatial
    one, its nouns (tokens tagged NOUN), all as they stand in the prompt.
    """

    prompt: str
    phrases: tuple[str, ...] = ()
    nouns: tuple[str, ...] = ()


def read_compbench(folder: Path, category: Category, official: bool) -> list[str]:
    """The prompts of a category, from `CATEGORY_val.txt`, a line each.

    Raises:
        ValueError: the file cannot be read, is empty or, of an official score, holds another number of
            prompts.
    """
    path = folder / f"{category}_val.txt"
    prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if official or not prompts:
        check_number(path, len(prompts), [NUM_PROMPTS])
    return prompts


def read_phrases(path: Path | None) -> dict[str, CompBenchPhrases]:
    """The file of phrases by prompt; none without a file. Raises ValueError, with the line, on a bad one."""
    return {} if path is None else {one.prompt: one for one in read_json_lines(path, CompBenchPhrases)}


class Names:
    """Names of the things that are counted: `singular - plural` a line, in the official `new_objects.txt`.

    Raises:
        ValueError: the file cannot be read, or a line is none.
    """

    def __init__(self, path: Path):
        self.singular: dict[str, str] = {}
        """The singular of each name, of singulars too."""
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if not line.strip():
                continue
            one, dash, many = (part.strip().lower() for part in line.partition(" - "))
            if not dash or not one or not many:
                raise ValueError(f"{path}:{number}: {line!r}; expected `singular - plural`")
            self.singular |= {one: self.singular.get(one, one), many: self.singular.get(many, one)}

    def counts(self, prompt: str) -> list[tuple[str, int]]:
        """Things and numbers in a prompt's order: each number word with the name of one or two words that
        follows it.
        """
        words = re.findall(r"[\w'-]+", prompt.lower())
        found = []
        for place, word in enumerate(words):
            if word not in NUMBERS and word not in ONE:
                continue
            ahead = (" ".join(words[place + 1 : place + 1 + length]) for length in (2, 1))
            if (name := next((one for one in ahead if one in self.singular), None)) is not None:
                found.append((self.singular[name], 1 if word in ONE else NUMBERS.index(word) + 1))
        return found


def truth_of(
    category: Category,
    prompt: str,
    given: Mapping[str, CompBenchPhrases],
    names: Names | None,
    place: str,
) -> dict[str, Any]:
    """What the judge and the rule know of a right image, as JSON holds it.

    Args:
        category: the prompt's.
        prompt: as it stands in the file.
        given: lines of the file of phrases, by prompt; a prompt that has none goes by our rule.
        names: of things that are counted; needed by `numeracy` alone.
        place: names file and number in messages.

    Raises:
        ValueError: nothing is found in the prompt.
    """
    line = given.get(prompt)
    if category == "numeracy":
        assert names is not None
        counts = names.counts(prompt)
        found: dict[str, Any] = {"counts": [[DETECTED_AS.get(name, name), number] for name, number in counts]}
        lacks = "a number and a name of new_objects.txt" if not counts else ""
    elif category == "spatial":
        relation = next((one for one in RELATIONS if one in prompt), None)
        things = _things(prompt, relation, line)
        found = {"relation": relation, "things": [DETECTED_AS.get(name, name) for name in things]}
        lacks = "" if relation is not None and things else f"two things and one of {', '.join(RELATIONS)}"
    else:
        phrases = phrases_of(prompt) if line is None else line.phrases
        phrases = [one for one in phrases if one not in PASSED_OVER][:MOST_PHRASES]
        found, lacks = {"phrases": phrases}, "" if phrases else "a noun phrase"
    if lacks:
        raise ValueError(f"{place}, {prompt!r}: expected {lacks}; another version of the file?")
    return {"category": category, **found}


def phrases_of(prompt: str) -> list[str]:
    """Noun phrases by our rule: what is left between commas and the words of BETWEEN."""
    return [part.strip() for part in BETWEEN.split(prompt) if part.strip()]


def _things(prompt: str, relation: str | None, line: CompBenchPhrases | None) -> list[str]:
    """The first and the last noun; by our rule the last words before and after the relation."""
    if line is not None and line.nouns:
        return [line.nouns[0], line.nouns[-1]]
    if relation is None:
        return []
    parts = [re.findall(r"[\w'-]+", part) for part in prompt.split(relation, 1)]
    return [words[-1] for words in parts] if all(parts) else []
