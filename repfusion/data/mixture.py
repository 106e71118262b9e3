"""Data sets -> one mixture: what they have to share, and what names their data."""

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from repfusion.data.columns import MANIFEST, manifest_digest
from repfusion.data.config import MAIN, DataConfig
from repfusion.data.dataset import ColumnDataset
from repfusion.data.order import SampleOrder, shares_of
from repfusion.data.readers import Reader

MODEL_FIELD = re.compile(r"\.(encoder\.\w+|mllm)$")
"""Fields of a manifest that say which frozen model made a column; the precision in which it ran makes no
other model of it.
"""


class Mixture:
    """One or several data sets, each drawn in proportion to its weight.

    Args:
        datasets: by name.
        weights: how often each is drawn, relative to the others; alike unless given.

    Raises: ValueError: columns differ in shape, dtype, width or in the model that made them, only some data
        sets have a column, or a weight is too small.
    """

    def __init__(self, datasets: Mapping[str, ColumnDataset], weights: Mapping[str, float] | None = None):
        self.datasets = dict(datasets)
        self.weights = dict.fromkeys(datasets, 1.0) if weights is None else dict(weights)
        shares_of(self.weights)
        first, *others = self.datasets
        for other in others:
            self._check_alike(first, other)
        self.forms = self.datasets[first].forms
        """Shape and dtype of a sample's array of each dense column, by the column's name."""

    @classmethod
    def open(cls, config: DataConfig, readers: Mapping[str, Reader], reads_images: bool = False) -> "Mixture":
        """The data sets of a configuration, with the columns that a model can use (`readers`), and with
        source pictures where it reads images.

        Raises:
            ValueError: a data set does not hold (see `ColumnDataset`) or fit the others.
        """
        weights = {name: dataset.weight for name, dataset in config.datasets.items()}
        with ExitStack() as opened:
            datasets: dict[str, ColumnDataset] = {}
            for name, share in shares_of(weights).items():
                cache_bytes = int(config.cache_bytes * share)
                datasets[name] = ColumnDataset.open(config.datasets[name], readers, cache_bytes, reads_images)
                opened.callback(datasets[name].close)
            mixture = cls(datasets, weights)
            opened.pop_all()
        return mixture

    def _check_alike(self, name: str, other: str) -> None:
        one, two = self.datasets[name], self.datasets[other]
        for column in one.columns.keys() ^ two.columns.keys():
            having, lacking = (name, other) if column in one.columns else (other, name)
            raise ValueError(
                f"data set {lacking!r} has no column {column}, {having!r} has; give it to both or to none"
            )
        for column in one.columns:
            form, other_form = one.forms.get(column), two.forms.get(column)
            if form is not None and other_form is not None and form != other_form:
                raise ValueError(
                    f"data set {other!r}: {column} in {two.folders[column]} are {other_form[0]} "
                    f"{other_form[1]}, those of {name!r} in {one.folders[column]} are {form[0]} {form[1]}; "
                    f"mix columns of one model and size: re-run the '{column}' stage of one of them"
                )
            if one.widths.get(column) != two.widths.get(column):
                raise ValueError(
                    f"data set {other!r}: {column} are {two.widths[column]} wide, those of {name!r} "
                    f"{one.widths[column]}; mix those of one model: re-run the '{column}' stage of one of "
                    "them"
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
        """Folders of the images and of the columns that are read, by data set and name."""
        return {name: dataset.folders for name, dataset in self.datasets.items()}

    @cached_property
    def identity(self) -> dict[str, dict[str, Any]]:
        """What, with a seed, decides which samples and captions a position reads, as JSON values."""
        return {
            name: {
                "num_samples": len(dataset),
                "digests": {column: manifest_digest(folder) for column, folder in dataset.folders.items()},
                "weight": float(self.weights[name]),
                "caption_weights": dict(dataset.weights),
                **({"held_out_share": dataset.held_out_share} if dataset.held_out_share else {}),
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
    """The frozen models that made a column: fields of its manifest without their section's name; empty where
    there is no manifest.
    """
    path = folder / MANIFEST
    fields = json.loads(path.read_bytes()).get("fields", {}) if path.exists() else {}
    found = {name: MODEL_FIELD.search(name) for name in fields}
    return {match[1]: fields[name] for name, match in found.items() if match}
