"""Which caption and images a sample is seen with, and what of them conditions: functions of the sample's seed
alone.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from pydantic import Field, model_validator

from repfusion.config import Config
from repfusion.data.dataset import Sample
from repfusion.data.order import fraction, hash64
from repfusion.data.readers import Reader
from repfusion.diffusion.flow import DROPPED, uniforms
from repfusion.request import Branch, Request

RECONSTRUCTIONS = (
    "keep the image as it is",
    "show the same image",
    "the same image again",
    "leave it as it is",
    "change nothing",
)
"""What a sample is asked for that is shown its own image."""


def draw_caption(
    captions: Mapping[str, tuple[str, ...]], weights: Mapping[str, float], seed: int
) -> tuple[str, str]:
    """Name and text of the caption that a sample is seen with: a name by weight, then one of its variants,
    all alike.
    """
    names = list(captions)
    if len(names) == 1 and len(captions[names[0]]) == 1:
        return names[0], captions[names[0]][0]
    variant, fraction = divmod(hash64("caption", seed), 2**32)
    bounds = list(accumulate(weights[name] for name in names))
    name = names[bisect_right(bounds[:-1], fraction / 2**32 * bounds[-1])]
    return name, captions[name][variant % len(captions[name])]


@dataclass(frozen=True)
class Recipe:
    """How a training shows its samples; `RecipeConfig` says what each share is."""

    condition_dropout: float = 0.0
    reconstruction_share: float = 0.0
    text_dropout: float = 0.0
    image_dropout: float = 0.0

    def draw(self, sample: Sample, seed: int, columns: Mapping[str, Reader]) -> tuple[Request, Branch]:
        """The request that a sample is seen with, and how much of it conditions.

        Args:
            sample: the sample; only the members that are used are read.
            seed: 64 bits of the sample in its epoch.
            columns: how columns of conditioning are read that the method can use, by name.
        """
        name, caption = draw_caption(sample.captions, sample.weights, seed)
        if float(uniforms([seed])[0, DROPPED]) < self.condition_dropout:
            return Request(caption), "none"
        if sample.num_sources:
            share = fraction("images", seed)
            if share < self.text_dropout:
                return Request(caption, sample.sources()), "images"
            has_images = share >= self.text_dropout + self.image_dropout
        elif (shown := self._reconstruction(sample, seed)) is not None:
            return shown, "full"
        else:
            has_images = False
        # what was written in sight of the images belongs to them, and is left out with them
        is_blind = sample.num_sources > 0 and not has_images
        readable = [column for column, reader in columns.items() if not (is_blind and reader.sees_images)]
        arrays = {column: sample.read(column, name) for column in readable}
        computed = {column: torch.tensor(array) for column, array in arrays.items() if array is not None}
        return Request(caption, sample.sources() if has_images else (), computed=computed), "full"

    def _reconstruction(self, sample: Sample, seed: int) -> Request | None:
        """A request for the very image that it shows; None where the sample is shown with its caption."""
        if self.reconstruction_share == 0 or fraction("reconstruction", seed) >= self.reconstruction_share:
            return None
        if (target := sample.target()) is None:
            return None
        text = RECONSTRUCTIONS[hash64("reconstruct", seed) % len(RECONSTRUCTIONS)]
        return Request(text, (target,))


class RecipeConfig(Config):
    """The section of a training that says how samples are shown. All is drawn from a sample's seed."""

    condition_dropout: float = Field(default=0.1, ge=0, le=1)
    """Fraction of samples trained on the empty prompt, for classifier-free guidance."""
    reconstruction_share: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the samples without source images, of those that keep their condition, that are shown
    their own image and an instruction to keep it as it is (UniFusion: about 0.03). Like the two below, for
    methods that read images.
    """
    text_dropout: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the editing samples, of those that keep their condition, trained on their source images
    without the instruction: the middle branch of guidance with a scale for text and one for images.
    """
    image_dropout: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the editing samples, likewise, trained on the instruction without its images, as it is
    where a rewriting of it was made of them.
    """

    @model_validator(mode="after")
    def _drops_leave_something(self) -> "RecipeConfig":
        if self.text_dropout + self.image_dropout > 1:
            raise ValueError(
                f"text_dropout {self.text_dropout:g} and image_dropout {self.image_dropout:g} are more than "
                "1 together; lower one"
            )
        return self

    @property
    def shares_of_images(self) -> dict[str, float]:
        """The shares above 0 that only methods that read images know, by name."""
        names = ("reconstruction_share", "text_dropout", "image_dropout")
        return {name: share for name in names if (share := getattr(self, name))}

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            self.condition_dropout, self.reconstruction_share, self.text_dropout, self.image_dropout
        )
