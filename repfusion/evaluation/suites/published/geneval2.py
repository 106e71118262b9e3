"""GenEval 2 (arXiv 2512.16853): 800 prompts, judged by Soft-TIFA: how likely the right answers to questions
about an image's objects, attributes, numbers and relations are.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from repfusion.config import Config, Strict
from repfusion.evaluation.judges.questions import QuestionJudge, QuestionJudgeConfig
from repfusion.evaluation.suites.base import Answer, Image, Item, Judge, Scores, Value
from repfusion.evaluation.suites.published.files import check_number, read_json_lines
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

NUM_PROMPTS = 800
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ASKED = "{} Answer in one word."
SKILLS = ("object", "attribute", "count", "position", "verb")
VALUES = (
    Value("soft_tifa_gm", "GenEval 2", "headline", meaning="Soft-TIFA, geometric mean over questions"),
    *(Value(f"skill/{skill}", skill, "part") for skill in SKILLS),
    Value("soft_tifa_am", "Soft-TIFA AM", "beside", meaning="arithmetic mean over questions"),
    *BESIDE,
)


class GenEval2SuiteConfig(Config):
    kind: Literal["geneval2"] = "geneval2"
    file: Path
    """The official `geneval2_data.jsonl`, or lines like its own."""
    judge: QuestionJudgeConfig
    """Officially Qwen3-VL-8B."""
    official: bool = False
    """Score as the published scorer does, its quirks included, and take no other prompts than its 800."""
    num_images: int = Field(default=1, ge=1)
    """Images of each prompt; officially one."""


class GenEval2Line(Strict):
    """A line of the file: a prompt, questions with their right answers, and what each is about."""

    prompt: str
    atom_count: int
    vqa_list: tuple[tuple[str, str], ...] = Field(min_length=1)
    skills: tuple[str, ...]

    @model_validator(mode="after")
    def _a_skill_a_question(self) -> "GenEval2Line":
        if len(self.skills) != len(self.vqa_list):
            raise ValueError(
                f"{len(self.vqa_list)} questions and {len(self.skills)} skills; expected as many"
            )
        return self


def variants_of(answer: str) -> list[str]:
    """The beginnings that count as an answer: in small and large letters, with and without a space before,
    and of a number also its digits.
    """
    words = [answer, answer.lower(), answer.capitalize()]
    if answer.lower() in NUMBERS:
        words.append(str(NUMBERS.index(answer.lower())))
    return list(dict.fromkeys([*words, *(f" {word}" for word in words)]))


class GenEval2Suite:
    """Prompts with questions whose right answers are known."""

    values: Sequence[Value] = VALUES
    subject = "images of GenEval 2's prompts"

    def __init__(self, config: GenEval2SuiteConfig):
        self.config = config

    @property
    def about(self) -> str:
        """Judge and rule."""
        by = "official" if self.config.official else "mended"
        return (
            f"by how likely {self.config.judge.folder.name} gives the right answers to questions about them "
            f"({by} rule); *GenEval 2* is the mean over prompts of the geometric mean over questions"
        )

    @property
    def judge_version(self) -> str:
        return f"soft_tifa 1 {self.config.judge.version}"

    @property
    def rule_version(self) -> str:
        return f"soft_tifa 1 {'official' if self.config.official else 'mended'}"

    def items(self) -> list[Item]:
        """The prompts in the file's order."""
        lines = read_json_lines(self.config.file, GenEval2Line)
        if self.config.official:
            check_number(self.config.file, len(lines), [NUM_PROMPTS])
        return [
            Item(
                f"{number:04d}",
                Request(line.prompt),
                self.config.num_images,
                {
                    "questions": [list(pair) for pair in line.vqa_list],
                    "skills": list(line.skills),
                    "atom_count": line.atom_count,
                },
            )
            for number, line in enumerate(lines)
        ]

    def judge(self, device: str) -> Judge:
        """Answers, for each image and question, with the likeliest first token, and how likely the answer is
        to begin with each variant of the right one.
        """
        model = QuestionJudge(self.config.judge, device)

        def look(item: Item, image: Image) -> Record:
            pairs = item.truth["questions"]
            asked = [ASKED.format(question) for question, _ in pairs]
            found = model.first_words(image, asked, [variants_of(answer) for _, answer in pairs])
            return {"answers": [{"said": one.said, "variants": one.probabilities} for one in found]}

        return judge_each(look)

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> Scores:
        """Means over prompts of the geometric and the arithmetic mean over questions, and means over
        questions by skill.

        Raises:
            ValueError: where items and answers differ in number, or there are none.
        """
        official = self.config.official
        verdicts = verdicts_of(items, answers, lambda item, record: _verdict(item, record, official))
        kept = judged(items, verdicts, drops_missing=official)
        prompts = [one.score for one in kept]
        atoms, skills = _atoms(items, answers, official)
        values = {"soft_tifa_gm": mean(prompts), "soft_tifa_am": mean(atoms)}
        values |= {f"skill/{skill}": mean(own) for skill, own in skills.items()}
        strata = {"soft_tifa_gm": alone(prompts), "soft_tifa_am": alone(atoms)} if prompts else {}
        return scores_of("soft_tifa_gm", values, items, verdicts, strata)

    def gallery(self, items: Sequence[Item]) -> Mapping[str, Sequence[int]]:
        """The first prompts."""
        return first_items(items)


def soft_scores(record: Record, official: bool) -> list[float]:
    """How likely the right answer to each question is: the sum over its variants of the probability of their
    first token. Officially a token counts as often as variants begin with it, a bare space too (with which
    ' 3' begins where digits are tokens of their own); mended, each once, and no space.
    """
    return [_soft_score(one["variants"].values(), official) for one in record["answers"]]


def _soft_score(variants: Collection[tuple[int, str, float]], official: bool) -> float:
    if official:
        return float(sum(probability for _, _, probability in variants))
    return float(sum({id: likely for id, text, likely in variants if text.strip()}.values()))


def geometric_mean(scores: Sequence[float]) -> float:
    """The geometric mean; 0 where one of the scores is."""
    return 0.0 if min(scores) <= 0 else float(np.exp(np.mean(np.log(scores))))


def _verdict(item: Item, record: Record, official: bool) -> ImageVerdict:
    scores = soft_scores(record, official)
    wrong = [pair[0] for pair, score in zip(item.truth["questions"], scores, strict=True) if score < 0.5]
    pairs = zip(record["answers"], item.truth["questions"], strict=True)
    said = [(one["said"].strip().lower(), answer) for one, (_, answer) in pairs]
    unexpected = sum(not _may_be_said(word, answer) for word, answer in said)
    return ImageVerdict(geometric_mean(scores), "; ".join(wrong), None, len(said), unexpected)


def _may_be_said(word: str, answer: str) -> bool:
    """Whether a first word answers a question of this kind, rightly or wrongly."""
    if answer.lower() in NUMBERS:
        return word in NUMBERS or word.isdigit()
    return word in ("yes", "no") or word == answer.lower()


def _atoms(
    items: Sequence[Item], answers: Sequence[Answer], official: bool
) -> tuple[list[float], dict[str, list[float]]]:
    """Arithmetic means of prompts, and scores of questions by skill; an image that is missing counts as
    `judged` has it.
    """
    means, skills = [], defaultdict(list)
    for item, records in zip(items, answers, strict=True):
        nothing = None if official else [0.0] * len(item.truth["skills"])
        found = [soft_scores(one, official) if "answers" in one else nothing for one in records]
        rows = [row for row in found if row is not None]
        for row in rows:
            for skill, score in zip(item.truth["skills"], row, strict=True):
                skills[skill].append(score)
        if rows:
            means.append(float(np.mean(rows)))
    return means, skills
