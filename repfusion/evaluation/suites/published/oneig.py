"""OneIG's alignment (arXiv 2506.07977): four images of each prompt, judged by questions that depend on each
other.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from repfusion.config import Config
from repfusion.evaluation.judges.questions import QuestionJudgeConfig
from repfusion.evaluation.suites.base import Answer, Item, Judge, Scores, Value
from repfusion.evaluation.suites.published.files import read_csv, read_json_value
from repfusion.evaluation.suites.published.outputs import (
    BESIDE,
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

WORDING = '{}. Please give your answer as either "Yes" or "No" with no additional explanations.'
CLASSES = ("anime", "human", "object")
COLUMNS = ("category", "id", "prompt_en")
FOLDERS = {"Anime_Stylization": "anime", "Portrait": "human", "General_Object": "object"}
"""Categories of the prompts' file that have questions, by the names of the questions' files."""
VALUES = (
    Value("alignment", "OneIG alignment", "headline", meaning="questions answered with yes"),
    *(Value(f"class/{name}", name, "part") for name in CLASSES),
    *BESIDE,
)


class OneIGSuiteConfig(Config):
    kind: Literal["oneig"] = "oneig"
    prompts: Path
    """The official `OneIG-Bench.csv`, or rows like its own: category, id, prompt_en."""
    questions: Path
    """Folder of the official files of questions and what they depend on: anime.json, human.json,
    object.json.
    """
    judge: QuestionJudgeConfig
    """Officially Qwen2.5-VL-7B."""
    official: bool = False
    """Score as the published scorer does: a no takes with it those questions alone that depend on it
    directly, nothing but `Yes` is a yes, and black images and missing ones do not count.
    """
    num_images: int = Field(default=4, ge=1)
    """Images of each prompt; officially a grid of 2 x 2, cut apart."""


class OneIGSuite:
    """Prompts judged by questions that depend on each other."""

    values: Sequence[Value] = VALUES
    subject = "questions about images of OneIG's prompts"
    rule_version: str

    def __init__(self, config: OneIGSuiteConfig):
        self.config = config
        self.rule_version = f"oneig 1 {'official' if config.official else 'mended'}"

    @property
    def about(self) -> str:
        """Judge and rule."""
        by = "official" if self.config.official else "mended"
        return (
            f"that {self.config.judge.folder.name} answers with yes, a question only where those that it "
            f"depends on are ({by} rule); *OneIG alignment* is the mean over prompts"
        )

    @property
    def judge_version(self) -> str:
        return f"yes_no 1 oneig {self.config.judge.version}"

    def items(self) -> list[Item]:
        """The prompts that have questions, by class and id.

        Raises:
            ValueError: a file is of another version, or a prompt's questions are missing.
        """
        config = self.config
        questions = {name: read_json_value(config.questions / f"{name}.json") for name in CLASSES}
        found = []
        for place, row in read_csv(config.prompts, COLUMNS):
            if (name := FOLDERS.get(row["category"])) is None:
                continue
            if row["id"] not in questions[name]:
                raise ValueError(
                    f"{place}: {config.questions / f'{name}.json'} has no questions of prompt {row['id']}; "
                    "take both files of one version"
                )
            truth = _truth(questions[name][row["id"]], f"{config.questions / f'{name}.json'}: {row['id']}")
            found.append(
                Item(
                    f"{name}/{row['id']}",
                    Request(row["prompt_en"]),
                    config.num_images,
                    {**truth, "class": name},
                )
            )
        if not found:
            raise ValueError(
                f"prompt file {config.prompts}: no prompt of the categories {', '.join(FOLDERS)}"
            )
        return found

    def judge(self, device: str) -> Judge:
        """Answers, for each image, with what the model says to each question."""
        return ask_all(self.config.judge, device, WORDING, skips_black=True)

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> Scores:
        """The mean over prompts of the mean over images of the share of questions.

        Raises:
            ValueError: where items and answers differ in number, or there are none.
        """
        verdicts = verdicts_of(items, answers, self._verdict)
        kept = judged(items, verdicts, drops_missing=self.config.official)
        groups = {name: [one.score for one in kept if one.item.truth["class"] == name] for name in CLASSES}
        groups = {f"class/{name}": own for name, own in groups.items() if own}
        prompts = [one.score for one in kept]
        strata = {name: alone(own) for name, own in groups.items()}
        strata |= {"alignment": alone(prompts)} if prompts else {}
        values = {"alignment": mean(prompts)} | {name: mean(own) for name, own in groups.items()}
        return scores_of("alignment", values, items, verdicts, strata)

    def _verdict(self, item: Item, record: Record) -> ImageVerdict:
        official = self.config.official
        numbers = [one["number"] for one in item.truth["questions"]]
        said = [yes_or_no(one) for one in record["said"]]
        yes = [one == "Yes" for one in record["said"]] if official else [one is True for one in said]
        raw = {number: float(one) for number, one in zip(numbers, yes, strict=True)}
        depends = {number: [one for one in own if one in raw] for number, own in depends_of(item).items()}
        scores = zeroed(raw, depends, "parents" if official else "ancestors")
        wrong = [one["question"] for one in item.truth["questions"] if not scores[one["number"]]]
        unexpected = sum(one is None for one in said)
        return ImageVerdict(
            float(np.mean(list(scores.values()))), "; ".join(wrong), None, len(said), unexpected
        )

    def gallery(self, items: Sequence[Item]) -> Mapping[str, Sequence[int]]:
        """The first prompts."""
        return first_items(items)


def _truth(fields: Any, place: str) -> dict[str, Any]:
    """Questions with numbers and what they depend on; in some files both are JSON within JSON.

    Raises:
        ValueError: one of both is missing, or a question has no dependency.
    """
    try:
        questions, depends = (
            {int(number): one for number, one in _parsed(fields[name]).items()}
            for name in ("question", "dependency")
        )
        rows = [
            {"number": number, "question": str(question), "depends": [int(one) for one in depends[number]]}
            for number, question in questions.items()
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{place}: no `question` and `dependency`, each by number ({type(error).__name__}: {error}): "
            "another version of the file"
        ) from error
    if not rows:
        raise ValueError(f"{place}: holds no question")
    return {"questions": rows}


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value
