"""T2I-CompBench++ (arXiv 2307.06350): attribute binding by BLIP-VQA, 2-D relations and numeracy by a
detector; ten images of each prompt.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from repfusion.config import Config
from repfusion.evaluation.judges.blip import BlipJudge
from repfusion.evaluation.judges.detectors import load_detector
from repfusion.evaluation.judges.folders import JudgeFolder, version_of
from repfusion.evaluation.judges.vocabulary import check_classes
from repfusion.evaluation.suites.base import Answer, Image, Item, Judge, Scores, Value
from repfusion.evaluation.suites.published.compbench.prompts import (
    ATTRIBUTES,
    CATEGORIES,
    Category,
    Names,
    read_compbench,
    read_phrases,
    truth_of,
)
from repfusion.evaluation.suites.published.compbench.rule import check_compbench
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

TITLES: dict[Category, str] = {
    "color": "colour",
    "shape": "shape",
    "texture": "texture",
    "spatial": "2-D relations",
    "numeracy": "numeracy",
}
RECORDED = 0.1
"""Things that the detector is less sure of are not recorded."""
SHOWN = 6
"""Prompts of each category in the gallery."""
VALUES = (
    Value("overall", "T2I-CompBench++", "headline", meaning="mean over the categories; papers give each"),
    *(Value(f"category/{name}", title, "part") for name, title in TITLES.items()),
    *BESIDE[:1],
)


class CompBenchSuiteConfig(Config):
    kind: Literal["compbench"] = "compbench"
    folder: Path
    """The official `examples/dataset`: `CATEGORY_val.txt`, and `new_objects.txt` for numeracy."""
    categories: tuple[Category, ...] = Field(default=CATEGORIES, min_length=1)
    """What is asked for; of the benchmark's eight, 3-D relations, non-spatial relations and complex prompts
    are not built.
    """
    phrases: Path | None = None
    """Noun phrases and nouns of the prompts, JSON lines with `prompt`, `phrases` and `nouns` as spaCy's
    en_core_web_sm finds them; None goes by a rule of our own.
    """
    blip: JudgeFolder | None = None
    """Folder of a BlipForQuestionAnswering for colour, shape and texture; officially
    blip-vqa-capfilt-large's weights.
    """
    blip_image_size: int | None = Field(default=None, ge=16)
    """Side in px of the images that it sees; officially 480. None is the folder's own."""
    detector: JudgeFolder | None = None
    """Folder of a detector for 2-D relations and numeracy. Officially UniDet, which transformers does not
    have: the numbers of another one are its own.
    """
    threshold: float = Field(default=0.5, ge=RECORDED, lt=1)
    """Things that the detector is not surer of are none."""
    official: bool = False
    """Score as the published scorers do, their quirks included; take no other numbers of prompts than theirs,
    and phrases and nouns from a file alone.
    """
    num_images: int = Field(default=10, ge=1)
    """Images of each prompt."""

    @model_validator(mode="after")
    def _has_judges(self) -> "CompBenchSuiteConfig":
        binding = [name for name in self.categories if name in ATTRIBUTES]
        detected = [name for name in self.categories if name not in ATTRIBUTES]
        for names, field, folder in ((binding, "blip", self.blip), (detected, "detector", self.detector)):
            if names and folder is None:
                raise ValueError(f"{field} is not given, which judges {', '.join(names)}; name its folder")
        tagged = [name for name in self.categories if name != "numeracy"]
        if self.official and self.phrases is None and tagged:
            raise ValueError(
                f"phrases is not given; an official score of {', '.join(tagged)} reads spaCy's phrases and "
                "nouns from a file. Make one, or leave out `official`"
            )
        return self

    @property
    def judges(self) -> list[Path]:
        """Folders of the judges that are asked."""
        needs = {self.blip: True, self.detector: False}
        return [
            folder
            for folder, binds in needs.items()
            if folder is not None and any((name in ATTRIBUTES) == binds for name in self.categories)
        ]


class CompBenchSuite:
    """Prompts that put attributes, places and numbers together."""

    values: Sequence[Value] = VALUES
    subject = "images of T2I-CompBench++'s prompts"

    def __init__(self, config: CompBenchSuiteConfig):
        self.config = config

    @property
    def about(self) -> str:
        """Judges and rule."""
        by = "official" if self.config.official else "mended"
        seen = " and ".join(folder.name for folder in self.config.judges)
        return (
            f"by how far {seen} finds in them what is asked for ({by} rule); *T2I-CompBench++* is the mean "
            "over the categories"
        )

    @property
    def judge_version(self) -> str:
        config = self.config
        versions = [version_of(folder) for folder in config.judges]
        return " ".join(["compbench 1", *versions, str(config.blip_image_size)])

    @property
    def rule_version(self) -> str:
        kind = "official" if self.config.official else "mended"
        return f"compbench 1 {kind} {self.config.threshold:g}"

    def items(self) -> list[Item]:
        """The prompts of the categories, each numbered in its file's order: `color/000`.

        Raises:
            ValueError: a file is of another version, a prompt lacks what its category asks for (or, of an
                official score, its line in the file of phrases), or the detector lacks a class.
        """
        config, given = self.config, read_phrases(self.config.phrases)
        names = Names(config.folder / "new_objects.txt") if "numeracy" in config.categories else None
        found = []
        for category in config.categories:
            for number, prompt in enumerate(read_compbench(config.folder, category, config.official)):
                place = f"{config.folder / f'{category}_val.txt'}: prompt {number + 1}"
                if config.official and category != "numeracy" and prompt not in given:
                    raise ValueError(f"{place}, {prompt!r}: {config.phrases} has no line of it; add it")
                truth = truth_of(category, prompt, given, names, place)
                found.append(Item(f"{category}/{number:03d}", Request(prompt), config.num_images, truth))
        fetch(config.judges)
        if config.detector is not None and (classes := {name for one in found for name in classes_of(one)}):
            check_classes(config.detector, classes, str(config.folder))
        return found

    def judge(self, device: str) -> Judge:
        """Answers, for each image, with probabilities of yes or with the things of the classes named."""
        return judge_each(CompBenchJudge(self.config, device))

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> Scores:
        """The mean over the categories of the means over their images. An image that is missing counts as 0;
        officially it does not count.

        Raises:
            ValueError: where items and answers differ in number, or there are none.
        """
        config = self.config
        verdicts = verdicts_of(
            items,
            answers,
            lambda item, one: check_compbench(item.truth, one, config.official, config.threshold),
        )
        kept = judged(items, verdicts, drops_missing=config.official)
        by_category = {
            name: [one for one in kept if one.item.truth["category"] == name] for name in config.categories
        }
        by_category = {name: own for name, own in by_category.items() if own}
        found = {
            f"category/{name}": float(np.mean([v.score for one in own for v in one.verdicts]))
            for name, own in by_category.items()
        }
        prompts = {f"category/{name}": [one.score for one in own] for name, own in by_category.items()}
        strata = {name: [(1.0, own)] for name, own in prompts.items()}
        strata["overall"] = [(1 / len(prompts), own) for own in prompts.values()]
        return scores_of("overall", {"overall": mean(list(found.values())), **found}, items, verdicts, strata)

    def gallery(self, items: Sequence[Item]) -> Mapping[str, Sequence[int]]:
        """The first prompts of each category."""
        places = {
            name: [i for i, item in enumerate(items) if item.truth["category"] == name] for name in TITLES
        }
        return {TITLES[name]: own[:SHOWN] for name, own in places.items() if own}


def classes_of(item: Item) -> list[str]:
    """Classes that a detector looks for, once each."""
    truth = item.truth
    return list(dict.fromkeys(truth.get("things") or [name for name, _ in truth.get("counts", ())]))


class CompBenchJudge:
    """A BLIP and a detector, each loaded where a category asks for it."""

    def __init__(self, config: CompBenchSuiteConfig, device: str):
        self.blip = self.detector = None
        if config.blip is not None and config.blip in config.judges:
            self.blip = BlipJudge(config.blip, device, config.blip_image_size)
        if config.detector is not None and config.detector in config.judges:
            self.detector = load_detector(config.detector, device)

    def __call__(self, item: Item, image: Image) -> Record:
        """Probabilities of yes by phrase, or things by class and the image's size in px."""
        if "phrases" in item.truth:
            assert self.blip is not None
            return {"yes": self.blip(image, item.truth["phrases"])}
        assert self.detector is not None
        found = self.detector(image, classes_of(item))
        objects = {
            name: [
                {"box": [float(edge) for edge in one.box], "score": float(one.score)}
                for one in things
                if one.score > RECORDED
            ]
            for name, things in found.items()
        }
        return {"objects": objects, "size": [image.shape[1], image.shape[0]]}
