"""MLflow's record of a data set: columns of WebDataset shards, each with its folder, manifest and stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.data.dataset_source import DatasetSource
from mlflow.data.dataset_source_registry import get_registered_sources, register_dataset_source

from repfusion.data.columns import manifest_digest
from repfusion.files import digest_of
from repfusion.lineage.describe import describe_column


class WebDatasetSource(DatasetSource):
    """`columns`: name -> {folder, manifest_digest, fingerprint}; the last two None where a folder has no
    manifest. `mlflow.data.get_source(run.inputs.dataset_inputs[0])` gives it back.
    """

    def __init__(self, columns: Mapping[str, Mapping[str, str | None]]):
        self.columns = {name: dict(fields) for name, fields in columns.items()}

    @classmethod
    def of_columns(cls, folders: Mapping[str, Path]) -> "WebDatasetSource":
        return cls({name: describe_column(folder) for name, folder in folders.items()})

    def digest(self) -> str:
        """sha256 that names the data, wherever it lies; of a column without a manifest, its folder."""
        parts = {name: fields["manifest_digest"] or fields["folder"] for name, fields in self.columns.items()}
        return digest_of(parts)

    def load(self) -> dict[str, Path]:
        """The columns' folders, once each is found to hold what the run read.

        Raises:
            ValueError: a folder is gone or holds other data.
        """
        folders = {name: Path(str(fields["folder"])) for name, fields in self.columns.items()}
        for name, folder in folders.items():
            expected = self.columns[name]["manifest_digest"]
            if not folder.is_dir():
                raise ValueError(f"column {name}: {folder} is not there any more")
            if (found := manifest_digest(folder)) != expected:
                raise ValueError(
                    f"column {name}: {folder} holds manifest {found}, the run read {expected}; "
                    "re-run the stages"
                )
        return folders

    def to_dict(self) -> dict[str, Any]:
        return {"columns": self.columns}

    @classmethod
    def from_dict(cls, source_dict: dict[Any, Any]) -> "WebDatasetSource":
        return cls(source_dict["columns"])

    @staticmethod
    def _get_source_type() -> str:
        return "webdataset"

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        return False  # made from columns alone, never guessed from an address

    @classmethod
    def _resolve(cls, raw_source: Any) -> "WebDatasetSource":
        raise NotImplementedError


def register() -> None:
    """Known to MLflow in this process; the package's entry point does the same wherever it is installed."""
    if WebDatasetSource not in get_registered_sources():
        register_dataset_source(WebDatasetSource)
