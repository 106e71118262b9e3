"""GenEval (arXiv 2310.11513): 553 prompts over six tasks, four images each, judged by a detector and, for
colours, CLIP.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from repfusion.config import Config, Strict
from repfusion.evaluation.judges.colours import COLOURS, ColourJudge
from repfusion.evaluation.judges.detections import Detection
from repfusion.evaluation.judges.detectors import load_detector
from repfusion.evaluation.judges.folders import JudgeFolder, version_of
from repfusion.evaluation.judges.vocabulary import check_classes
from repfusion.evaluation.suites.base import Answer, Count, Image, Item, Judge, Scores, Value
from repfusion.evaluation.suites.published.files import read_json_lines
from repfusion.evaluation.suites.published.geneval_rule import MAX_OBJECTS, GenEvalRule, check_image
from repfusion.evaluation.suites.published.outputs import (
    BESIDE,
    Record,
    judge_each,
    judged,
    mean,
    scores_of,
    verdicts_of,
)
from repfusion.pretrained.cache import fetch
from repfusion.request import Request

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
OFFICIAL = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
"""Prompts of each task in the official file."""
TITLES = {
    "single_object": "single object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colours",
    "position": "position",
    "color_attr": "colour attribution",
}
RECORDED = 0.1
"""Things that the detector is less sure of are not recorded: no rule looks at them."""
SHOWN = 6
"""Prompts of each task in the gallery."""
VALUES = (
    Value("overall", "GenEval", "headline", meaning="images as asked for (mean over tasks)"),
    *(Value(f"task/{tag}", title, "part") for tag, title in TITLES.items()),
    Value("prompts", "prompts", "beside", meaning="prompts with an image as asked for among theirs"),
    *BESIDE[:1],
)


class GenEvalSuiteConfig(Config):
    kind: Literal["geneval"] = "geneval"
    file: Path
    """The official `evaluation_metadata.jsonl`, or lines like its own."""
    detector: JudgeFolder
    """Folder of a Mask2Former (the official one has a Swin-S and COCO's classes), an OWLv2 or a Grounding
    DINO.
    """
    clip: JudgeFolder
    """Folder of a CLIP (text and vision) that tells colours; officially ViT-L/14."""
    official: bool = False
    """Score as the published scorer does, its quirks included, and take no other prompts than its 553."""
    num_images: int = Field(default=4, ge=1)
    """Images of each prompt."""
    max_overlap: float = Field(default=1.0, gt=0, le=1)
    """Intersection over union from which on two boxes of a class count as one; 1 is off, as officially.
    Detectors that are asked in words need about 0.5.
    """


class GenEvalWanted(Strict):
    """What an image has to show, in a line of the file."""

    class_: str = Field(alias="class")
    count: int = Field(ge=1)
    color: Literal[COLOURS] | None = None  # pyright: ignore[reportInvalidTypeForm]
    position: tuple[Literal["left of", "right of", "above", "below"], int] | None = None


class GenEvalUnwanted(Strict):
    """What an image may not show so many of."""

    class_: str = Field(alias="class")
    count: int = Field(ge=1)


class GenEvalLine(Strict):
    """A line of the file: one prompt."""

    tag: Tag
    include: tuple[GenEvalWanted, ...] = Field(min_length=1)
    exclude: tuple[GenEvalUnwanted, ...] = ()
    prompt: str

    def truth(self) -> dict[str, Any]:
        """What the rule reads, as JSON holds it."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"prompt"})

    @property
    def classes(self) -> list[str]:
        """Every class that is named, once."""
        return list(dict.fromkeys(one.class_ for one in (*self.include, *self.exclude)))


def read_geneval(path: Path, official: bool) -> list[GenEvalLine]:
    """The prompts of a file.

    Raises:
        ValueError: a line is not of the format, a relation refers to what does not come before it, or, of an
            official score, the tasks have other numbers of prompts.
    """
    lines = read_json_lines(path, GenEvalLine)
    for number, line in enumerate(lines, 1):
        for place, wanted in enumerate(line.include):
            if wanted.position is not None and not 0 <= wanted.position[1] < place:
                raise ValueError(
                    f"{path}: prompt {number}, {line.prompt!r}: {wanted.class_} is {wanted.position[0]} "
                    f"thing {wanted.position[1]}, which does not come before it"
                )
    found = Counter(line.tag for line in lines)
    if official and found != OFFICIAL:
        raise ValueError(
            f"{path}: {dict(found)} prompts by task; the official file has {OFFICIAL}: another version, or a "
            "part; take the whole file, or leave out `official`"
        )
    return lines


class GenEvalSuite:
    """Prompts of six tasks, judged by what a detector finds."""

    values: Sequence[Value] = VALUES
    subject = "images of GenEval's prompts"

    def __init__(self, config: GenEvalSuiteConfig):
        self.config = config
        self.rule = GenEvalRule(config.official, config.max_overlap)

    @property
    def about(self) -> str:
        """Detector and rule."""
        by = "by the official rule" if self.config.official else "by the mended rule"
        return (
            f"that show what is asked for, {by}, as {self.config.detector.name} and {self.config.clip.name} "
            "see them; *GenEval* is the mean over the six tasks; *prompts* have one such image at least"
        )

    @property
    def judge_version(self) -> str:
        config = self.config
        return f"geneval 1 {version_of(config.detector)} {version_of(config.clip)}"

    @property
    def rule_version(self) -> str:
        kind = "official" if self.config.official else "mended"
        return f"geneval 1 {kind} {self.config.max_overlap:g}"

    def items(self) -> list[Item]:
        """The prompts in the file's order, by numbers as the official folders have them."""
        config = self.config
        lines = read_geneval(config.file, config.official)
        fetch([config.detector, config.clip])
        check_classes(config.detector, {name for line in lines for name in line.classes}, str(config.file))
        return [
            Item(f"{number:05d}", Request(line.prompt), config.num_images, line.truth())
            for number, line in enumerate(lines)
        ]

    def judge(self, device: str) -> Judge:
        """Answers, for each image, with the things of the classes that its prompt names."""
        return judge_each(GenEvalJudge(self.config.detector, self.config.clip, device))

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> Scores:
        """The mean over the tasks of their shares of right images. An image that is missing counts as wrong;
        officially it does not count.

        Raises:
            ValueError: where items and answers differ in number, or there are none.
        """
        verdicts = verdicts_of(items, answers, lambda item, one: check_image(item.truth, one, self.rule))
        kept = judged(items, verdicts, drops_missing=self.config.official)
        tasks = {tag: [one for one in kept if one.item.truth["tag"] == tag] for tag in TITLES}
        shares = {tag: [v.score for one in own for v in one.verdicts] for tag, own in tasks.items() if own}
        counts = {f"task/{tag}": Count(correct=int(sum(own)), total=len(own)) for tag, own in shares.items()}
        found = {f"task/{tag}": float(np.mean(own)) for tag, own in shares.items()}
        prompts = [float(any(v.score for v in one.verdicts)) for one in kept]
        by_prompt = {tag: [one.score for one in tasks[tag]] for tag in shares}
        strata = {f"task/{tag}": [(1.0, own)] for tag, own in by_prompt.items()}
        strata["overall"] = [(1 / len(by_prompt), own) for own in by_prompt.values()]
        return scores_of(
            "overall",
            {"overall": mean(list(found.values())), **found, "prompts": mean(prompts)},
            items,
            verdicts,
            strata,
            counts,
        )

    def gallery(self, items: Sequence[Item]) -> Mapping[str, Sequence[int]]:
        """The first prompts of each task."""
        tags = {tag: [i for i, item in enumerate(items) if item.truth["tag"] == tag] for tag in TITLES}
        return {TITLES[tag]: own[:SHOWN] for tag, own in tags.items() if own}


class GenEvalJudge:
    """A detector, and a CLIP that tells the colours of what has to have one."""

    def __init__(self, detector: Path, clip: Path, device: str):
        self.detector = load_detector(detector, device)
        self.colours = ColourJudge(clip, device)

    def __call__(self, item: Item, image: Image) -> Record:
        """Things by class, each with its box and how sure the detector is, the surest first; cosines to the
        ten colours of those that the rule may look at.
        """
        truth = item.truth
        asked = [one["class"] for one in (*truth["include"], *truth["exclude"])]
        coloured = {one["class"] for one in truth["include"] if "color" in one}
        found = self.detector(image, list(dict.fromkeys(asked)))
        objects = {}
        for name, things in found.items():
            sure = [one for one in things if one.score > RECORDED]
            colours = self.colours(image, sure[:MAX_OBJECTS], name) if name in coloured else []
            objects[name] = [_thing(one) for one in sure]
            for thing, cosines in zip(objects[name], colours, strict=False):
                thing["colours"] = cosines
        return {"objects": objects}


def _thing(one: Detection) -> dict[str, Any]:
    return {"box": [float(edge) for edge in one.box], "score": float(one.score)}
