"""WISE (arXiv 2503.07265): 1,000 prompts that take knowledge of the world, judged by a model that is told
what they mean: the legacy score of consistency, realism and aesthetics, or WISE Verified's yes or no.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from repfusion.config import Config, Strict
from repfusion.evaluation.judges.questions import QuestionJudge, QuestionJudgeConfig
from repfusion.evaluation.suites.base import Answer, Image, Item, Judge, Scores, Value
from repfusion.evaluation.suites.published.files import check_number, read_json_value, read_text, row_of
from repfusion.evaluation.suites.published.outputs import (
    BESIDE,
    ImageVerdict,
    Record,
    first_items,
    judge_each,
    judged,
    mean,
    scores_of,
    verdicts_of,
)
from repfusion.evaluation.suites.published.yes_no import yes_or_no
from repfusion.files import digest_of
from repfusion.request import Request

NUM_PROMPTS = 1000
LAST_IDS = {"culture": 400, "time": 567, "space": 700, "biology": 800, "physics": 900, "chemistry": 1000}
"""The largest prompt_id of each category, in order."""
WEIGHTS = {
    "legacy": dict(zip(LAST_IDS, (0.4, 0.167, 0.133, 0.1, 0.1, 0.1), strict=True)),
    "verified": dict(zip(LAST_IDS, (0.4, 0.12, 0.12, 0.12, 0.12, 0.12), strict=True)),
}
"""What each category is weighed with, by version."""
PARTS = {"consistency": 0.7, "realism": 0.2, "aesthetic quality": 0.1}
"""What the legacy score is made of; each is 0, 1 or 2."""
BEST = 2
SAID = re.compile(r"(consistency|realism|aesthetic quality)\W*(\d+)", re.IGNORECASE)
PROTOCOLS = {
    "legacy": (
        "Judge this image strictly, each from 0 (fails) over 1 (in part) to 2 (flawless): Consistency, "
        "whether it shows all that the prompt means; Realism, whether it could be a photograph; Aesthetic "
        'Quality. Prompt: "{prompt}" What it means: "{explanation}" Answer with three lines alone, such as '
        "Consistency: 1"
    ),
    "verified": (
        'Does this image show what the prompt "{prompt}" means, which is: "{explanation}"? '
        "Answer with yes or no."
    ),
}
"""What the judge is asked where no protocol is given."""
MAX_NEW_TOKENS = {"legacy": 64, "verified": 8}
VALUES = (
    Value("wiscore", "WISE", "headline", meaning="weighted mean over categories"),
    *(Value(f"category/{name}", name, "part") for name in LAST_IDS),
    *BESIDE,
)


class WISESuiteConfig(Config):
    kind: Literal["wise"] = "wise"
    files: tuple[Path, ...] = Field(min_length=1)
    """The official JSON files: cultural_common_sense, spatio-temporal_reasoning, natural_science."""
    judge: QuestionJudgeConfig
    """Officially GPT-4o-2024-05-13 (legacy) or Qwen3.5 (verified), neither of which is a folder that is read:
    the numbers of another judge are its own.
    """
    version: Literal["legacy", "verified"] = "legacy"
    """Papers before April 2026 report `legacy`."""
    protocol: Path | None = None
    """File of what the judge is asked, with `{prompt}` and `{explanation}` in it, such as the official text;
    None takes a short one.
    """
    official: bool = False
    """Take no other prompts than the official 1,000, and leave out images that are missing."""
    num_images: int = Field(default=1, ge=1)
    """Images of each prompt; officially one."""


class WISERow(Strict, extra="ignore"):
    """A prompt of the file."""

    prompt_id: int = Field(ge=1, le=NUM_PROMPTS)
    Prompt: str
    Explanation: str

    @property
    def category(self) -> str:
        """The category by the number, as the published scorer tells it."""
        return next(name for name, last in LAST_IDS.items() if self.prompt_id <= last)


def read_wise(files: Sequence[Path], official: bool) -> list[WISERow]:
    """The prompts of all files, by number.

    Raises:
        ValueError: a file is no list, a row lacks a field, or a number comes twice.
    """
    rows: dict[int, WISERow] = {}
    for path in files:
        value = read_json_value(path)
        if not isinstance(value, list):
            raise ValueError(
                f"prompt file {path}: holds a {type(value).__name__}, expected a list of prompts"
            )
        for number, one in enumerate(value, 1):
            row = row_of(WISERow, one, f"{path}: prompt {number}")
            if row.prompt_id in rows:
                raise ValueError(f"{path}: prompt {number}: prompt_id {row.prompt_id} comes twice")
            rows[row.prompt_id] = row
    if official:
        check_number(", ".join(map(str, files)), len(rows), [NUM_PROMPTS])
    return [rows[number] for number in sorted(rows)]


class WISESuite:
    """Prompts that take knowledge, judged by a model that is told what they mean."""

    values: Sequence[Value] = VALUES
    subject = "images of WISE's prompts"

    def __init__(self, config: WISESuiteConfig):
        self.config = config

    @property
    def about(self) -> str:
        """Version and judge."""
        how = {
            "legacy": "scored for consistency, realism and aesthetics",
            "verified": "that show what the prompt means, yes or no",
        }[self.config.version]
        return f"{how} by {self.config.judge.folder.name} (*WISE {self.config.version}*)"

    @property
    def _protocol(self) -> str:
        """Raises ValueError where a given one lacks a place."""
        path = self.config.protocol
        if path is None:
            return PROTOCOLS[self.config.version]
        text = read_text(path)
        if missing := [place for place in ("{prompt}", "{explanation}") if place not in text]:
            raise ValueError(f"protocol {path}: lacks {' and '.join(missing)}, where the prompt's texts go")
        return text

    @property
    def judge_version(self) -> str:
        return f"wise 1 {digest_of(self._protocol)[:12]} {self.config.judge.version}"

    @property
    def rule_version(self) -> str:
        return f"wise 1 {self.config.version}{' official' if self.config.official else ''}"

    def items(self) -> list[Item]:
        """The prompts by their numbers."""
        return [
            Item(
                str(row.prompt_id),
                Request(row.Prompt),
                self.config.num_images,
                {"category": row.category, "explanation": row.Explanation},
            )
            for row in read_wise(self.config.files, self.config.official)
        ]

    def judge(self, device: str) -> Judge:
        """Answers, for each image, with what the model writes."""
        model, protocol = QuestionJudge(self.config.judge, device), self._protocol
        most = MAX_NEW_TOKENS[self.config.version]

        def look(item: Item, image: Image) -> Record:
            texts = {"{prompt}": item.request.prompt, "{explanation}": item.truth["explanation"]}
            # one pass: a prompt may spell a place
            asked = re.sub(r"\{(?:prompt|explanation)\}", lambda found: texts[found[0]], protocol)
            return {"said": model.written(image, [asked], most)[0]}

        return judge_each(look)

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> Scores:
        """The weighted mean over categories of means over prompts. Of a part of the prompts, the weights of
        the categories that there are, made to sum to 1.

        Raises:
            ValueError: where items and answers differ in number, or there are none.
        """
        rule = _legacy if self.config.version == "legacy" else _verified
        verdicts = verdicts_of(items, answers, lambda item, record: rule(record["said"]))
        kept = judged(items, verdicts, drops_missing=self.config.official)
        groups = {
            name: [one.score for one in kept if one.item.truth["category"] == name] for name in LAST_IDS
        }
        groups = {name: own for name, own in groups.items() if own}
        weights = WEIGHTS[self.config.version]
        total = sum(weights[name] for name in groups)
        strata = {f"category/{name}": [(1.0, own)] for name, own in groups.items()}
        values = {f"category/{name}": mean(own) for name, own in groups.items()}
        if groups:
            strata["wiscore"] = [(weights[name] / total, own) for name, own in groups.items()]
            values["wiscore"] = sum(weights[name] / total * mean(own) for name, own in groups.items())
        return scores_of("wiscore", values, items, verdicts, strata)

    def gallery(self, items: Sequence[Item]) -> Mapping[str, Sequence[int]]:
        """The first prompts."""
        return first_items(items)


def _legacy(said: str) -> ImageVerdict:
    """(0.7 consistency + 0.2 realism + 0.1 aesthetics) / 2, of three numbers from 0 to 2."""
    found = {name.lower(): int(number) for name, number in SAID.findall(said)}
    if found.keys() != PARTS.keys() or max(found.values()) > BEST:
        return ImageVerdict(0.0, f"unexpected answer {said[:60]!r}", None, 1, 1)
    score = sum(weight * found[name] for name, weight in PARTS.items()) / BEST
    reason = ", ".join(f"{name} {number}" for name, number in found.items() if number < BEST)
    return ImageVerdict(score, reason, None, 1)


def _verified(said: str) -> ImageVerdict:
    answer = yes_or_no(said)
    if answer is None:
        return ImageVerdict(0.0, f"unexpected answer {said[:60]!r}", None, 1, 1)
    return ImageVerdict(float(answer), "" if answer else "answered with no", None, 1)
