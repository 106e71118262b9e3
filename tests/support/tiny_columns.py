"""Data sets of tiny columns, opened and read through."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tiny_training import npy, write_tar

from repfusion.data.batches import batches
from repfusion.data.columns import scan_tar
from repfusion.data.config import MAIN, DatasetConfig
from repfusion.data.dataset import ColumnDataset, Sample
from repfusion.data.mixture import Mixture
from repfusion.data.readers import IMAGE_FEATURES, PROMPT_FEATURES, CaptionArray, Reader, SampleArray
from repfusion.data.recipe import Recipe
from repfusion.diffusion.flow import draw
from repfusion.inputs import Inputs
from repfusion.model.text_to_image import stack

LONG = {f"{i:06d}": f"a long caption of {i}" for i in range(0, 20, 2)}
"""Every second sample of `add_captions` has one."""


READERS: dict[str, Reader] = {IMAGE_FEATURES: SampleArray(), PROMPT_FEATURES: CaptionArray()}
"""Of a model that can use everything that `make_columns` writes."""
SHIFT = 2.0
"""Of the noise levels that `collate` draws."""


def folders(root: Path, *others: str) -> dict[str, Path]:
    """The columns of image features and of these names."""
    return {name: root / name for name in (IMAGE_FEATURES, *others)}


def open_columns(root: Path, *others: str, **changes) -> ColumnDataset:
    return ColumnDataset(root / "curate", folders(root, *others), READERS, **changes)


def add_captions(columns: Path) -> Path:
    """Gives every second sample an alternative caption `long.txt`, and its text features."""
    rng = np.random.default_rng(9)
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        keys = [member.split(".")[0] for member in scan_tar(columns / PROMPT_FEATURES / name)]
        long = [(key, {"long.txt": LONG[key].encode()} if key in LONG else {}) for key in keys]
        write_tar(columns / "captions" / name, long)
        text = []
        for index, key in enumerate(keys):
            members = {"prompt_features.npy": npy(rng.standard_normal((4, 32)).astype(np.float16))}
            if index == 3:
                members = {"prompt_features.ref": f"{keys[0]}.long.prompt_features.npy".encode()}
            if key in LONG:
                members["long.prompt_features.npy"] = npy(rng.standard_normal((9, 32)).astype(np.float16))
            text.append((key, members))
        write_tar(columns / PROMPT_FEATURES / name, text)
    return columns


def open_captioned(root: Path, weights: dict[str, float], *others: str) -> ColumnDataset:
    columns = folders(root, "captions", *others)
    config = DatasetConfig(images=root / "curate", columns=columns, caption_weights=weights)
    return ColumnDataset.open(config, READERS)


def collate(samples: Sequence[Sample], recipe: Recipe, seeds: Sequence[int]) -> Inputs:
    """What a model may make of samples: all that is drawn for them, in the open."""
    columns = {PROMPT_FEATURES: READERS[PROMPT_FEATURES]}
    drawn = [recipe.draw(sample, seed, columns) for sample, seed in zip(samples, seeds, strict=True)]
    features = stack([sample.read(IMAGE_FEATURES) for sample in samples])
    t, noise = draw(seeds, tuple(features.shape[1:]), SHIFT)
    return {
        "captions": [request.prompt for request, _ in drawn],
        "dropped": [branch == "none" for _, branch in drawn],
        "text": [request.computed.get(PROMPT_FEATURES) for request, _ in drawn],
        "features": features,
        "t": t,
        "noise": noise,
    }


@dataclass(frozen=True)
class Row:
    """A sample as a batch holds it."""

    position: int
    dataset: str
    epoch: int
    key: str
    caption: str
    features: list
    t: float
    noise: list
    dropped: bool

    @property
    def randomness(self) -> tuple:
        return self.caption, self.t, self.noise, self.dropped


def iter_rows(mixture: Mixture, first_step: int, num_steps: int, **layout: int) -> Iterator[Row]:
    settings = {"seed": 1, "global_batch_size": 8, "micro_batch_size": 8, **layout}
    steps = {"first_step": first_step, "num_steps": num_steps}
    for parts in batches(mixture, Recipe(condition_dropout=0.3), collate, **steps, **settings):
        for batch in parts:
            made = [batch.inputs[name] for name in ("captions", "features", "t", "noise", "dropped")]
            columns = [one.tolist() if isinstance(one, torch.Tensor) else one for one in made]
            places = [batch.positions, batch.datasets, batch.epochs, batch.keys]
            yield from (Row(*fields) for fields in zip(*places, *columns, strict=True))


def read_rows(
    source: Mixture | ColumnDataset, first_step: int, num_steps: int, world_size: int = 1, **layout: int
) -> list[Row]:
    """Of all ranks, in the order of positions."""
    mixture = Mixture({MAIN: source}) if isinstance(source, ColumnDataset) else source
    rows = [
        row
        for rank in range(world_size)
        for row in iter_rows(mixture, first_step, num_steps, rank=rank, world_size=world_size, **layout)
    ]
    return sorted(rows, key=lambda row: row.position)
