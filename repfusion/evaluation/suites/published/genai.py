"""GenAI-Bench by VQAScore (arXiv 2404.01291): how likely a model answers with yes when it is asked whether an
image shows its prompt.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from repfusion.config import Config
from repfusion.evaluation.judges.questions import QuestionJudge, QuestionJudgeConfig
from repfusion.evaluation.suites.base import Answer, Image, Item, Judge, Scores, Value
from repfusion.evaluation.suites.published.files import check_number, read_json_value
from repfusion.evaluation.suites.published.outputs import (
    BESIDE,
    ImageVerdict,
    Record,
    alone,
    first_items,
    judge_each,
    judged,
    mean,
    scores_of,
    verdicts_of,
)
from repfusion.request import Request

NUM_PROMPTS = (1600, 527)
"""Prompts of the whole file, and of the part that people rated."""
ASKED = 'Does this figure show "{}"? Please answer Yes or No.'
YES = "Yes"
SKILLS = ("basic", "advanced")
VALUES = (
    Value("vqascore", "VQAScore", "headline", meaning="probability of Yes (mean over images)"),
    *(Value(f"skill/{name}", name, "part") for name in SKILLS),
    *BESIDE,
)


class GenAISuiteConfig(Config):
    kind: Literal["genai"] = "genai"
    file: Path
    """The official `genai_image.json`: objects with a `prompt`, by id."""
    skills: Path | None = None
    """The official `genai_skills.json`: ids of prompts by skill; None leaves scores by skill out."""
    judge: QuestionJudgeConfig
    """Officially CLIP-FlanT5-XXL, which transformers does not have: the numbers of another judge are its
    own.
    """
    official: bool = False
    """Take no other prompts than the official 1,600 or 527, and leave out images that are missing."""
    num_images: int = Field(default=1, ge=1)
    """Images of each prompt."""


class GenAISuite:
    """Prompts judged by the probability of Yes."""

    values: Sequence[Value] = VALUES
    subject = "images of GenAI-Bench's prompts"

    def __init__(self, config: GenAISuiteConfig):
        self.config = config

    @property
    def about(self) -> str:
        """Judge and question."""
        return (
            f"by how likely {self.config.judge.folder.name} answers Yes to whether they show the prompt "
            "(*VQAScore*)"
        )

    @property
    def judge_version(self) -> str:
        return f"vqascore 1 {self.config.judge.version}"

    @property
    def rule_version(self) -> str:
        return f"vqascore 1{' official' if self.config.official else ''}"

    def items(self) -> list[Item]:
        """The prompts by their ids.

        Raises:
            ValueError: a file is of another version, or skills are of prompts that there are not.
        """
        config, rows = self.config, _rows(self.config.file)
        if config.official:
            check_number(config.file, len(rows), NUM_PROMPTS)
        skills = {} if config.skills is None else _skills(config.skills, rows)
        return [
            Item(
                key,
                Request(prompt),
                config.num_images,
                {"skills": [name for name, keys in skills.items() if key in keys]},
            )
            for key, prompt in rows.items()
        ]

    def judge(self, device: str) -> Judge:
        """Answers, for each image, with the likeliest first token and the probability of Yes."""
        model = QuestionJudge(self.config.judge, device)

        def look(item: Item, image: Image) -> Record:
            (found,) = model.first_words(image, [ASKED.format(item.request.prompt)], [[YES]])
            return {"said": found.said, "yes": found.probabilities[YES][2]}

        return judge_each(look)

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> Scores:
        """The mean over images of the probability of Yes, and by skill.

        Raises:
            ValueError: where items and answers differ in number, or there are none.
        """
        verdicts = verdicts_of(items, answers, lambda item, record: _verdict(record))
        kept = judged(items, verdicts, drops_missing=self.config.official)
        images = [verdict.score for one in kept for verdict in one.verdicts]
        names = list(dict.fromkeys(name for item in items for name in item.truth["skills"]))
        by_skill = {
            f"skill/{name}": [one.score for one in kept if name in one.item.truth["skills"]] for name in names
        }
        by_skill = {name: own for name, own in by_skill.items() if own}
        strata = {name: alone(own) for name, own in by_skill.items()}
        strata |= {"vqascore": alone([one.score for one in kept])} if kept else {}
        values = {"vqascore": mean(images)} | {name: float(np.mean(own)) for name, own in by_skill.items()}
        return scores_of("vqascore", values, items, verdicts, strata)

    def gallery(self, items: Sequence[Item]) -> Mapping[str, Sequence[int]]:
        """The first prompts."""
        return first_items(items)


def _verdict(record: Record) -> ImageVerdict:
    said = record["said"].strip()
    reason = "" if record["yes"] >= 0.5 else f"Yes with probability {record['yes']:.2f}"
    return ImageVerdict(record["yes"], reason, None, 1, int(said.lower() not in ("yes", "no")))


def _rows(path: Path) -> dict[str, str]:
    value = read_json_value(path)
    if not isinstance(value, dict) or not value:
        raise ValueError(f"prompt file {path}: expected prompts by id, as genai_image.json has them")
    rows: dict[str, str] = {}
    for key, one in value.items():
        prompt: Any = one.get("prompt") if isinstance(one, dict) else None
        if not isinstance(prompt, str):
            raise ValueError(f"prompt file {path}: {key}: no `prompt`: another version of the file")
        rows[key] = prompt
    return rows


def _skills(path: Path, rows: Mapping[str, str]) -> dict[str, set[str]]:
    value = read_json_value(path)
    if not isinstance(value, dict) or not all(isinstance(keys, list) for keys in value.values()):
        raise ValueError(f"{path}: expected lists of ids by skill, as genai_skills.json has them")
    if not any(key in rows for keys in value.values() for key in keys):
        raise ValueError(f"{path}: none of its ids is one of the prompts'; take both files of one version")
    return {name: set(keys) for name, keys in value.items()}
