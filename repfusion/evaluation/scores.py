"""Images and the prompts they were made from -> accuracy per task, overall, and against shuffled prompts."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from repfusion.config import Strict
from repfusion.scenes.captions import TASKS, Prompt, Task
from repfusion.scenes.detector import Verdict, detect, judge
from repfusion.scenes.world import INVERSE


class Count(Strict):
    correct: int
    total: int

    @property
    def share(self) -> float | None:
        return self.correct / self.total if self.total else None


class Scores(Strict):
    """Shares of images that show what their prompt states, in [0, 1]."""

    overall: float
    """Mean over the tasks' accuracies (as GenEval), not over the prompts."""
    per_task: dict[Task, float]
    new_concept: float | None
    """Accuracy over the prompts that name the new shape or colour; None where there are none."""
    shuffled_overall: float
    """`overall` of the same images against other prompts of the same task: what chance and leniency give."""
    num_prompts: int
    counts: dict[str, Count]
    """Correct and total per task, of `new_concept`, and per task against other prompts (`shuffled/TASK`)."""

    def metrics(self) -> dict[str, float]:
        """Flat names for a tracker: `eval/overall`, `eval/task/counting`, ..."""
        named = {"overall": self.overall, "shuffled_overall": self.shuffled_overall}
        named |= {f"task/{task}": value for task, value in self.per_task.items()}
        if self.new_concept is not None:
            named["new_concept"] = self.new_concept
        return {f"eval/{name}": value for name, value in named.items()}


@dataclass(frozen=True)
class ScoredImages:
    """Scores and what they were made of, image by image."""

    scores: Scores
    verdicts: list[Verdict]


def facts(prompt: Prompt) -> object:
    """What a prompt states, whatever its wording and order; equal facts are met by the same images."""
    if prompt.relation is None:
        return frozenset(prompt.wanted)
    return frozenset([(prompt.wanted, prompt.relation), (prompt.wanted[::-1], INVERSE[prompt.relation])])


def shuffled_partners(prompts: list[Prompt], seed: int) -> list[int | None]:
    """For each prompt the index of another of its task with different facts; None where there is none."""
    rng = np.random.default_rng(seed)
    partners: list[int | None] = []
    for prompt in prompts:
        others = [
            index
            for index, other in enumerate(prompts)
            if other.task == prompt.task and facts(other) != facts(prompt)
        ]
        partners.append(others[rng.integers(len(others))] if others else None)
    return partners


def _count(values: list[bool]) -> Count:
    return Count(correct=sum(values), total=len(values))


def _mean_over_tasks(counts: dict[Task, Count]) -> float:
    shares = [count.share for count in counts.values() if count.share is not None]
    return float(np.mean(shares)) if shares else 0.0


def score_images(pixels: Float[np.ndarray, "b 3 h w"], prompts: list[Prompt], seed: int = 0) -> ScoredImages:
    """Scores square RGB images in [0, 1]; `seed` pairs images with shuffled prompts.

    Raises:
        ValueError: where images and prompts differ in number, or there are none.
    """
    if len(pixels) != len(prompts) or not prompts:
        raise ValueError(
            f"{len(pixels)} images and {len(prompts)} prompts; expected as many, and at least one"
        )
    found = [detect(image) for image in pixels]
    verdicts = [judge(things, prompt) for things, prompt in zip(found, prompts, strict=True)]
    own: dict[Task, list[bool]] = {task: [] for task in TASKS}
    shuffled: dict[Task, list[bool]] = {task: [] for task in TASKS}
    for things, prompt, verdict, partner in zip(
        found, prompts, verdicts, shuffled_partners(prompts, seed), strict=True
    ):
        own[prompt.task].append(verdict.correct)
        if partner is not None:
            shuffled[prompt.task].append(judge(things, prompts[partner]).correct)
    per_task = {task: _count(values) for task, values in own.items() if values}
    per_task_shuffled = {task: _count(values) for task, values in shuffled.items() if values}
    new = _count(
        [verdict.correct for verdict, prompt in zip(verdicts, prompts, strict=True) if prompt.is_new]
    )
    scores = Scores(
        overall=_mean_over_tasks(per_task),
        per_task={task: count.correct / count.total for task, count in per_task.items()},
        new_concept=new.share,
        shuffled_overall=_mean_over_tasks(per_task_shuffled),
        num_prompts=len(prompts),
        counts={
            **per_task,
            "new_concept": new,
            **{f"shuffled/{task}": count for task, count in per_task_shuffled.items()},
        },
    )
    return ScoredImages(scores, verdicts)
