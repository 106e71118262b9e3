"""Data sets -> one mixture: what they have to share, and what names their data."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from repfusion.data.columns import MANIFEST, manifest_digest
from repfusion.data.dataset import MAIN, ColumnDataset, DataConfig
from repfusion.data.order import SampleOrder, shares_of


class Mixture:
    """One or several data sets, each drawn in proportion to its weight.

    Args:
        datasets: by name.
        weights: how often each is drawn, relative to the others; alike unless given.

    Raises:
        ValueError: features differ in shape, dtype or encoder, only some have text features or these differ
            in width or MLLM, or a weight is too small.
    """

    def __init__(self, datasets: Mapping[str, ColumnDataset], weights: Mapping[str, float] | None = None):
        self.datasets = dict(datasets)
        self.weights = dict.fromkeys(datasets, 1.0) if weights is None else dict(weights)
        shares_of(self.weights)
        first, *others = self.datasets
        for other in others:
            self._check_alike(first, other)
        self.shape, self.dtype = self.datasets[first].shape, self.datasets[first].dtype
        self.has_text = self.datasets[first].text is not None

    @classmethod
    def open(cls, config: DataConfig) -> "Mixture":
        """Raises ValueError where a data set does not hold (see `ColumnDataset`) or fit the others."""
        weights = {name: dataset.weight for name, dataset in config.datasets.items()}
        with ExitStack() as opened:
            datasets: dict[str, ColumnDataset] = {}
            for name, share in shares_of(weights).items():
                cache_bytes = int(config.cache_bytes * share)
                datasets[name] = ColumnDataset.open(config.datasets[name], cache_bytes)
                opened.callback(datasets[name].close)
            mixture = cls(datasets, weights)
            opened.pop_all()
        return mixture

    def _check_alike(self, name: str, other: str) -> None:
        one, two = self.datasets[name], self.datasets[other]
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            raise ValueError(
                f"data set {other!r}: features in {two.features.folder} are {two.shape} {two.dtype}, "
                f"those of {name!r} in {one.features.folder} are {one.shape} {one.dtype}; mix features of "
                "one encoder and image size: re-run the 'latents' stage of one of them"
            )
        if (one.text is None) != (two.text is None):
            having, lacking = (name, other) if two.text is None else (other, name)
            raise ValueError(
                f"data set {lacking!r} has no text features, {having!r} has; give `text` of both or of none"
            )
        if one.text_width != two.text_width:
            raise ValueError(
                f"data set {other!r}: text features are {two.text_width} wide, those of {name!r} "
                f"{one.text_width}; mix those of one MLLM: re-run the 'features' stage of one of them"
            )
        for column, folder in one.folders.items():
            if column in two.folders:
                self._check_makers(name, folder, other, two.folders[column])

    @staticmethod
    def _check_makers(name: str, folder: Path, other: str, other_folder: Path) -> None:
        """Features of the same shape may still be another model's: manifests say."""
        one, two = models_of(folder), models_of(other_folder)
        for field in sorted(one.keys() & two.keys()):
            if one[field] != two[field]:
                raise ValueError(
                    f"data set {other!r}: {other_folder} was made with {field} {two[field]}, "
                    f"{folder} of {name!r} with {one[field]}; re-run the '{folder.name}' stage of one of them"
                )

    def __len__(self) -> int:
        """Samples of all data sets together."""
        return sum(self.num_samples.values())

    @cached_property
    def num_samples(self) -> dict[str, int]:
        return {name: len(dataset) for name, dataset in self.datasets.items()}

    @property
    def folders(self) -> dict[str, dict[str, Path]]:
        """Of each data set the columns that are read."""
        return {name: dataset.folders for name, dataset in self.datasets.items()}

    @cached_property
    def identity(self) -> dict[str, dict[str, Any]]:
        """What, with a seed, decides which samples and captions a position reads, as JSON values."""
        return {
            name: {
                "num_samples": len(dataset),
                "digest": manifest_digest(dataset.features.folder),
                "weight": float(self.weights[name]),
                "caption_weights": dict(dataset.weights),
            }
            for name, dataset in self.datasets.items()
        }

    def order(self, seed: int) -> SampleOrder:
        return SampleOrder(seed, self.num_samples, self.weights)

    def label(self, name: str, key: str) -> str:
        """A key as messages show it: `photos/000123` for a data set of the mix."""
        return key if name == MAIN else f"{name}/{key}"

    def close(self) -> None:
        for dataset in self.datasets.values():
            dataset.close()


def models_of(folder: Path) -> dict[str, Any]:
    """The frozen models that made a column, by the fields of its manifest; empty where it has none."""
    path = folder / MANIFEST
    fields = json.loads(path.read_bytes()).get("fields", {}) if path.exists() else {}
    wanted = ("train.model.encoder.", "train.model.mllm")
    # the precision in which an MLLM ran makes no other model of it
    return {key: fields[key] for key in fields if key.startswith(wanted) and not key.endswith("_dtype")}
