"""What a training reads: data sets, the folders of their columns, captions and data sets by weight."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from pydantic import Field, model_validator

from repfusion.config import Config
from repfusion.data.order import shares_of

MAIN = "main"
"""The data set that is not in `mix`."""
CAPTIONS = "captions"
"""The column of alternative captions."""
CAPTION = "txt"
"""The member that holds the main caption; it lies with the image."""
MAIN_CAPTION_ONLY: Mapping[str, float] = MappingProxyType({CAPTION: 1.0})


def check_weights(weights: Mapping[str, float], has_captions: bool) -> dict[str, float]:
    """The positive weights, by name.

    Raises:
        ValueError: a weight is negative or not finite, all are zero, or a name is no caption's.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"caption_weights: {name!r} has weight {weight}; expected a number that is 0 or more"
            )
        if name != CAPTION and not name.endswith(f".{CAPTION}"):
            raise ValueError(
                f"caption_weights: {name!r} names no caption; expected {CAPTION!r}, the main one, "
                f"or NAME.{CAPTION}"
            )
    positive = {name: weights[name] for name in sorted(weights) if weights[name] > 0}
    if not positive:
        raise ValueError(
            f"caption_weights: {dict(weights)} leaves nothing to draw; give one a positive weight"
        )
    if not has_captions and (others := sorted(positive.keys() - {CAPTION})):
        raise ValueError(
            f"caption_weights: {others[0]!r} lies in the captions column, which data.columns does not name"
        )
    return positive


class DatasetConfig(Config):
    """One data set: the folders of its images and of the columns beside them."""

    images: Path
    """Folder of image shards; training reads the captions from it, and where the model conditions on images
    the pictures of editing samples.
    """
    columns: dict[str, Path] = {}
    """Folders of the columns, by name: `image_features` and `prompt_features` (the stages of these names),
    and `captions`, alternative captions, read where `caption_weights` names one. A model reads those that it
    can use; the others are not opened.
    """
    caption_weights: dict[str, float] = dict(MAIN_CAPTION_ONLY)
    """How often each caption is drawn: `txt` is the main one, `NAME.txt` one of the captions column. For a
    sample that lacks some, the weights of those it has count in proportion.
    """
    held_out_share: float = Field(default=0.0, ge=0, le=0.5)
    """What share of the samples training never draws, by a hash of their keys: their captions are what the
    evaluation suite `prompts` asks for, their images what it compares with.
    """
    weight: float = 1.0
    """How often this data set is drawn, relative to the others; at least 1/1024 of the sum."""

    @model_validator(mode="after")
    def _weights_hold(self) -> "DatasetConfig":
        check_weights(self.caption_weights, CAPTIONS in self.columns)
        return self

    @property
    def folders(self) -> dict[str, Path]:
        """The images and the columns, by name."""
        return {"images": self.images, **self.columns}


class DataConfig(DatasetConfig):
    """What a training reads: one data set, `main`, and those mixed into it."""

    mix: dict[str, DatasetConfig] = {}
    """Further data sets, by a name of your choice; the one above is `main`. Their features have to be those
    of the same encoder. Latents are normalised by the statistics of `main`.
    """
    cache_bytes: int = Field(default=2**30, ge=0)
    """Decoded samples kept in memory on each rank, up to this many bytes, shared by the data sets in
    proportion to their weights; 0 reads every sample from its tar each time.
    """
    prefetch_steps: int = Field(default=2, ge=1)
    """Steps read ahead by a thread, so that the loop does not wait for the disk."""

    @model_validator(mode="after")
    def _mix_holds(self) -> "DataConfig":
        for name in self.mix:
            if name == MAIN or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(
                    f"mix: {name!r} cannot name a data set; expected letters, digits, '_' and '-', and not "
                    f"{MAIN!r}, which is the one outside the mix"
                )
        shares_of({name: config.weight for name, config in self.datasets.items()})
        return self

    @property
    def datasets(self) -> dict[str, DatasetConfig]:
        """All of them by name, `main` first."""
        return {MAIN: self, **{name: self.mix[name] for name in sorted(self.mix)}}
