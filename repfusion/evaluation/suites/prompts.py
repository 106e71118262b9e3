"""Prompts of one's own, or captions that training leaves out -> pictures to look at, and how like real images
they are by local encoders; nothing here knows what is shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from repfusion.config import Config
from repfusion.evaluation.suites.base import Answer, Count, Image, Item, Judge, Scores, Value, check_answered
from repfusion.evaluation.suites.captions import Captioned, read_captioned
from repfusion.evaluation.suites.intervals import wilson
from repfusion.evaluation.suites.likeness import frechet_distance, is_covered
from repfusion.files import weights_digest
from repfusion.generation.prompts import read_prompts
from repfusion.images.decode import read_pixels
from repfusion.images.square import square
from repfusion.latents.tower import RepresentationEncoder, pixel_statistics
from repfusion.llm.tokenizer import load_tokenizer, plain_ids
from repfusion.pretrained.weights import load_transformers
from repfusion.request import Request
from repfusion.weights import WEIGHTS

SHOWN = 24
"""Prompts in the gallery."""
DIGITS = 6
"""Decimals of a feature that are kept."""
DRAWN = Value("drawn", "drawn", "headline", meaning="prompts drawn; nothing judged them")
COVERAGE = Value("coverage", "coverage", "headline", meaning="real images that a drawn one is like")
CLIP_SCORE = Value("clip_score", "CLIPScore", "headline", meaning="likeness of image and prompt, by CLIP")
FRECHET = Value(
    "frechet_distance", "Frechet distance", "beside", is_share=False, meaning="to real images; 0 is best"
)


class PromptsSuiteConfig(Config):
    kind: Literal["prompts"] = "prompts"
    file: Path | None = None
    """Prompts, one a line, or .jsonl as `repfusion.generate` reads it; None takes captions of `images`."""
    images: Path | None = None
    """Folder of image shards: real images to compare with, and captions. In a workflow the images that its
    training reads.
    """
    held_out_share: float = Field(default=0.0, ge=0, le=0.5)
    """What share of `images` training leaves out, of which these are taken; 0 takes any. In a workflow the
    training's.
    """
    num_prompts: int = Field(default=64, ge=2)
    """The first so many prompts, and as many real images."""
    encoder: Path = WEIGHTS / "vision_tower"
    """Folder of a vision tower in whose features images are compared (means over its tokens). In a workflow
    the training's encoder.
    """
    layer: int = Field(default=-2, le=-1)
    """The tower's hidden state, as of `model.encoder.layer`."""
    clip: Path | None = None
    """Folder of a CLIP (text and vision) for CLIPScore; None leaves it out."""

    @model_validator(mode="after")
    def _has_prompts(self) -> "PromptsSuiteConfig":
        if self.file is None and self.images is None:
            raise ValueError("neither file nor images; name a file of prompts or a folder of image shards")
        return self


class PromptsSuite:
    """Prompts that nobody grades."""

    def __init__(self, config: PromptsSuiteConfig, seed: int):
        self.config = config
        self.subject = "prompts of a file"
        if config.file is None:
            self.subject = (
                "captions held out of training" if config.held_out_share else "captions of the data"
            )

    @property
    def values(self) -> Sequence[Value]:
        """CLIPScore picks the best checkpoint where there is a CLIP, else coverage where there are images."""
        config = self.config
        found = [CLIP_SCORE] if config.clip is not None else []
        if config.images is not None:
            return [*found, replace(COVERAGE, role="beside") if found else COVERAGE, FRECHET]
        return found or [DRAWN]

    @property
    def about(self) -> str:
        """What the values are, without a word on what the images show."""
        config, parts = self.config, ["that were drawn, which nobody graded"]
        if config.clip is not None:
            parts.append(
                f"*CLIPScore*: mean cosine of image and prompt by {config.clip.name}, no less than 0"
            )
        if config.images is not None:
            parts.append(
                "*coverage*: real images in whose neighbourhood a drawn one lies (arXiv 2002.09797); *Frechet"
                f" distance* to as many real images; both in the features of {config.encoder.name}. So few "
                "images compare checkpoints, not papers"
            )
        return "; ".join(parts)

    @property
    def judge_version(self) -> str:
        """Names the encoders' weights."""
        config = self.config
        folders = [config.encoder] if config.images is not None else []
        folders += [] if config.clip is None else [config.clip]
        digests = [_digest(folder)[:12] for folder in folders]
        return " ".join(["likeness 1", f"layer {config.layer}", *digests])

    rule_version = "likeness 1"

    def _captioned(self) -> list[Captioned]:
        config = self.config
        if config.images is None:
            return []
        return read_captioned(config.images, config.held_out_share, config.num_prompts)

    def items(self) -> list[Item]:
        config, real = self.config, self._captioned()
        if config.file is None:
            prompts = [(one.key, one.caption) for one in real]
        else:
            rows = read_prompts(config.file, (0,))[: config.num_prompts]
            prompts = [(f"{number:05d}", row.prompt) for number, row in enumerate(rows)]
        truths = [{"real": one.digest} for one in real] + [{}] * max(0, len(prompts) - len(real))
        return [
            Item(key, Request(prompt), truth=truth)
            for (key, prompt), truth in zip(prompts, truths, strict=False)
        ]

    def judge(self, device: str) -> Judge:
        return _Likeness(self.config, self._captioned(), device)

    def score(self, items: Sequence[Item], answers: Sequence[Answer]) -> Scores:
        """Means over the prompts, and the distance of the two sets of images.

        Raises:
            ValueError: where items and answers differ in number, or there are none, or fewer than two images.
        """
        check_answered(items, answers)
        counts = {"drawn": Count(correct=len(answers), total=len(items))}
        found = {"drawn": 1.0}
        if self.config.clip is not None:
            found["clip_score"] = float(np.mean([max(answer["clip"], 0.0) for answer in answers]))
        if self.config.images is not None:
            ours = np.array([answer["drawn"] for answer in answers])
            real = np.array([answer["real"] for answer in answers if "real" in answer])
            covered = is_covered(ours, real)
            counts["coverage"] = Count(correct=sum(covered), total=len(covered))
            found["coverage"] = float(np.mean(covered))
            found["frechet_distance"] = frechet_distance(ours, real)
        names = [value.name for value in self.values]
        return Scores(
            headline=names[0],
            values={name: found[name] for name in names},
            counts={name: one for name, one in counts.items() if name in names},
            intervals={"coverage": wilson(counts["coverage"])} if "coverage" in names else {},
        )

    def gallery(self, items: Sequence[Item]) -> Mapping[str, Sequence[int]]:
        """The first prompts."""
        return {"": range(min(SHOWN, len(items)))}


class _Likeness:
    """Features of drawn and real images, and their likeness to prompts.

    Args:
        config: which encoders.
        real: the real images; an item whose truth names one answers for that too.
        device: where the encoders compute.
    """

    def __init__(self, config: PromptsSuiteConfig, real: Sequence[Captioned], device: str):
        self.real, self.device = {one.digest: one.image for one in real}, device
        self.encoder, self.clip = None, None
        if config.images is not None:
            encoder = RepresentationEncoder.from_pretrained(config.encoder, config.layer)
            self.encoder = encoder.to(device)
        if config.clip is not None:
            self.clip = _Clip(config.clip, device)

    def __call__(self, items: Sequence[Item], images: Sequence[Sequence[Image]]) -> list[Answer]:
        answers: list[dict[str, Any]] = []
        for item, (image, *_) in zip(items, images, strict=True):
            answer: dict[str, Any] = {}
            if self.encoder is not None:
                answer["drawn"] = self._features(image)
                if "real" in item.truth:
                    answer["real"] = self._features(read_pixels(self.real[item.truth["real"]]))
            if self.clip is not None:
                answer["clip"] = self.clip(item.request.prompt, image)
            answers.append(answer)
        return answers

    def _features(self, image: Image) -> list[float]:
        """The mean over the encoder's tokens."""
        assert self.encoder is not None
        pixels = torch.from_numpy(square(image, self.encoder.image_size)).to(self.device)
        features = self.encoder.encode_images(pixels[None]).features
        return [round(float(value), DIGITS) for value in features[0].mean(0)]


class _Clip:
    """The cosine of a text and an image by a CLIP of transformers."""

    def __init__(self, folder: Path, device: str):
        from transformers import CLIPModel

        self.model = load_transformers(CLIPModel, folder, "CLIP").to(device)
        self.tokenizer = load_tokenizer(folder)
        self.most = self.model.config.text_config.max_position_embeddings
        mean, std = (torch.tensor(one, device=device).view(3, 1, 1) for one in pixel_statistics(folder))
        self.mean, self.std, self.device = mean, std, device

    @torch.no_grad()
    def __call__(self, prompt: str, image: Image) -> float:
        side = self.model.config.vision_config.image_size
        pixels = torch.from_numpy(square(image, side)).to(self.device).movedim(-1, 0).float() / 255
        (ids,) = plain_ids(self.tokenizer, [prompt])
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        text = torch.tensor([[begin, *ids[: self.most - 2], end]], device=self.device)
        found = self.model(input_ids=text, pixel_values=((pixels - self.mean) / self.std)[None])
        return round(float((found.text_embeds * found.image_embeds).sum()), DIGITS)


@cache
def _digest(folder: Path) -> str:
    """Names the weights of an encoder; read once a process."""
    return weights_digest(folder)
