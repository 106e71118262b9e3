"""DPG-Bench (arXiv 2403.05135): long prompts, each with questions that depend on each other, four images."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from repfusion.config import Config
from repfusion.evaluation.judges.questions import QuestionJudgeConfig
from repfusion.evaluation.suites.base import Answer, Count, Item, Judge, Scores, Value
from repfusion.evaluation.suites.published.files import check_number, read_csv
from repfusion.evaluation.suites.published.outputs import (
    BESIDE,
    MISSING,
    ImageVerdict,
    Record,
    alone,
    first_items,
    judged,
    mean,
    scores_of,
    verdicts_of,
)
from repfusion.evaluation.suites.published.yes_no import ask_all, depends_of, yes_or_no, zeroed
from repfusion.request import Request

NUM_PROMPTS = 1065
COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
CATEGORIES = ("global", "entity", "attribute", "relation", "other")
VALUES = (
    Value("dpg", "DPG-Bench", "headline", meaning="questions answered with yes (mean over prompts)"),
    *(Value(f"category/{name}", name, "part") for name in CATEGORIES),
    *BESIDE,
)


class DPGSuiteConfig(Config):
    kind: Literal["dpg"] = "dpg"
    file: Path
    """The official `dpg_bench.csv`, or rows like its own."""
    judge: QuestionJudgeConfig
    """Officially mPLUG-large, which transformers does not have: the numbers of another judge are its own."""
    wording: str = "{} Answer with yes or no."
    """How a question is put, in the place of `{}`; mPLUG is asked the bare question."""
    official: bool = False
    """Score as the published scorer does, its quirks included, and take no other prompts than its 1,065."""
    num_images: int = Field(default=4, ge=1)
    """Images of each prompt; officially a grid of 2 x 2, cut apart."""

    @field_validator("wording")
    @classmethod
    def _has_a_place(cls, wording: str) -> str:
        if wording.count("{}") != 1:
            raise ValueError(f"{wording!r} has no place for the question; expected one {{}}")
        return wording


def read_dpg(path: Path, official: bool) -> dict[str, dict[str, Any]]:
    """The prompts of a file by their ids: `text`, and `questions` with number, what they depend on, and
    category. Officially the first row of data is passed over.

    Raises:
        ValueError: a column is missing, a number or a dependency is none, a question comes twice, or one
            depends on itself.
    """
    prompts: dict[str, dict[str, Any]] = {}
    for number, (place, row) in enumerate(read_csv(path, COLUMNS)):
        if official and number == 0:
            continue
        prompt = prompts.setdefault(row["item_id"], {"text": row["text"], "questions": []})
        question = _question(row, place)
        if question["number"] in [one["number"] for one in prompt["questions"]]:
            raise ValueError(f"{place}: item {row['item_id']} has question {question['number']} twice")
        prompt["questions"].append(question)
    if official:
        check_number(path, len(prompts), [NUM_PROMPTS])
    return prompts


def _question(row: Mapping[str, str], place: str) -> dict[str, Any]:
    try:
        number = int(row["proposition_id"])
        depends = [int(one) for one in row["dependency"].split(",")]
    except ValueError as error:
        raise ValueError(
            f"{place}: proposition_id {row['proposition_id']!r} and dependency {row['dependency']!r}; "
            "expected a number, and numbers between commas"
        ) from error
    if number in depends:
        raise ValueError(f"{place}: question {number} depends on itself")
    return {
        "number": number,
        "depends": depends,
        "question": row["question_natural_language"],
        "category": row["tuple"].partition("(")[0].strip(),
    }


class DPGSuite:
    """Long prompts, judged by questions that depend on each other."""

    values: Sequence[Value] = VALUES
    subject = "questions about images of DPG-Bench's prompts"

    def __init__(self, config: DPGSuiteConfig):
        self.config = config

    @property
    def about(self) -> str:
        """Judge and rule."""
        by = "official" if self.config.official else "mended"
        return (
            f"that {self.config.judge.folder.name} answers with yes, a question only where those that it "
            f"depends on are ({by} rule); *DPG-Bench* is the mean over prompts"
        )

    @property
    def judge_version(self) -> str:
        return f"yes_no 1 {self.config.wording!r} {self.config.judge.version}"

    @property
    def rule_version(self) -> str:
        return f"dpg 1 {'official' if self.config.official else 'mended'}"

    def items(self) -> list[Item]:
        """The prompts in the file's order, by the file's ids. A question that depends on one that the file
        lacks does not, mended; officially its prompt fails.
        """
        config = self.config
        prompts = read_dpg(config.file, config.official)
        return [
            Item(key, Request(one["text"]), config.num_images, {"questions": one["questions"]})
            for key, one in prompts.items()
        ]

    def judge(self, device: str) -> Judge:
        """Answers, for each image, with what the model says to each question."""
        return ask_all(self.config.judge, device, self.config.wording)

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> Scores:
        """The mean over prompts of the mean over images of the share of questions, and shares by category:
        `category/entity`, and of the finer ones that the file has, `fine/entity - whole`.

        Raises:
            ValueError: where items and answers differ in number, or there are none.
        """
        official = self.config.official
        verdicts = verdicts_of(items, answers, self._verdict)
        pairs = [one for one in zip(items, answers, strict=True) if not official or not self._fails(*one)]
        counted = {item.key for item, _ in pairs}
        kept = [one for one in judged(items, verdicts, drops_missing=False) if one.item.key in counted]
        prompts = [one.score for one in kept]
        values = {"dpg": mean(prompts)}
        for prefix, found in self._categories(pairs).items():
            values |= {f"{prefix}/{name}": mean(own) for name, own in sorted(found.items())}
        strata = {"dpg": alone(prompts)} if prompts else {}
        counts = {"prompts": Count(correct=len(kept), total=len(items)), "orphans": _orphans(items)}
        return scores_of("dpg", values, items, verdicts, strata, counts)

    def _verdict(self, item: Item, record: Record) -> ImageVerdict:
        scores = self._scores(item, record)
        said = [yes_or_no(one) for one in record["said"]]
        wrong = [one["question"] for one in item.truth["questions"] if not scores[one["number"]]]
        unexpected = sum(one is None for one in said)
        return ImageVerdict(
            float(np.mean(list(scores.values()))), "; ".join(wrong), None, len(said), unexpected
        )

    def _scores(self, item: Item, record: Record) -> dict[int, float]:
        """Scores of an image's questions by number, with those zeroed that a no takes with it."""
        raw, depends = self._raw(item, record), depends_of(item)
        known = {number: [one for one in own if one in raw] for number, own in depends.items()}
        return zeroed(raw, known, "in_order" if self.config.official else "ancestors")

    def _fails(self, item: Item, records: Answer) -> bool:
        """Whether the published scorer fails at an item, which it then leaves out: an image is not there, or
        it comes to a question that depends on one that it did not read.
        """
        try:
            for record in records:
                if MISSING in record:
                    return True
                zeroed(self._raw(item, record), depends_of(item), "in_order")
        except KeyError:
            return True
        return False

    def _raw(self, item: Item, record: Record) -> dict[int, float]:
        """Officially nothing but `yes`, to the letter, is a yes."""
        numbers = [one["number"] for one in item.truth["questions"]]
        yes = [one == "yes" if self.config.official else yes_or_no(one) is True for one in record["said"]]
        return {number: float(one) for number, one in zip(numbers, yes, strict=True)}

    def _categories(self, pairs: Sequence[tuple[Item, Answer]]) -> dict[str, dict[str, list[float]]]:
        """Scores of questions by category, coarse and fine: officially of the last image alone, before a no
        takes others with it; mended, of all images and after.
        """
        coarse, fine = defaultdict(list), defaultdict(list)
        for item, records in pairs:
            for record in records[-1:] if self.config.official else records:
                for one, score in self._by_question(item, record):
                    fine[one["category"]].append(score)
                    coarse[one["category"].partition("-")[0].strip()].append(score)
        return {"category": coarse, "fine": fine}

    def _by_question(self, item: Item, record: Record) -> list[tuple[Mapping[str, Any], float]]:
        questions = item.truth["questions"]
        if MISSING in record:
            return [(one, 0.0) for one in questions]
        scores = self._raw(item, record) if self.config.official else self._scores(item, record)
        return [(one, scores[one["number"]]) for one in questions]

    def gallery(self, items: Sequence[Item]) -> Mapping[str, Sequence[int]]:
        """The first prompts."""
        return first_items(items)


def _orphans(items: Sequence[Item]) -> Count:
    """Questions that depend on one that the file lacks, of all."""
    found = [(one, depends) for depends in map(depends_of, items) for one in depends.values()]
    lost = sum(any(parent and parent not in depends for parent in one) for one, depends in found)
    return Count(correct=lost, total=len(found))
