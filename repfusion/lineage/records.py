"""What a lineage.json and a PNG's text chunk hold, checked: they may be somebody else's, and damaged or
made up.
"""

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from repfusion.display.terminal import printable

R = TypeVar("R", bound=BaseModel)


class FolderRecord(BaseModel):
    """A checkpoint or an export, as it was."""

    path: str | None
    """None where it was left out."""
    digest: str
    step: int | None = None


class ColumnRecord(BaseModel):
    """A column that was read."""

    folder: str | None
    manifest_digest: str | None
    fingerprint: str | None


class TrainingRecord(BaseModel):
    """A checkpoint's lineage.json."""

    run_id: str | None
    tracking_uri: str | None
    git_commit: str | None
    lock_digest: str | None
    init_from: FolderRecord | None = None
    datasets: dict[str, dict[str, ColumnRecord]]


class ExportRecord(BaseModel):
    """An export's lineage.json."""

    checkpoint: FolderRecord
    weights: str
    digests: dict[str, str]
    sources: dict[str, str]
    training: TrainingRecord | None = None


class RowRecord(BaseModel):
    """A row of images of one prompt."""

    prompt: str
    seeds: list[int] = Field(min_length=1)


class RetrievedRecord(BaseModel):
    """Which image was retrieved in the place of one that is drawn."""

    shard: str
    sample: str
    score: float
    folder: str | None
    index: str


class ImageRecord(BaseModel):
    """The text chunk of an image."""

    rows: list[RowRecord] = Field(min_length=1)
    images: list[str] = []
    rewrite: str | Literal[False] | None = None
    num_steps: int
    solver: str
    guidance_scale: float
    image_guidance_scale: float | None = None
    guidance_interval: tuple[float, float]
    checkpoint: FolderRecord
    export: FolderRecord | None = None
    lineage: TrainingRecord | None = None
    retrieved: RetrievedRecord | None = None


def checked(kind: type[R], record: Any, where: str) -> R:
    """The record. Raises ValueError, naming where it lies and the first field that is not as we write it."""
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = printable(".".join(map(str, problem["loc"]))) or "the whole"
        raise ValueError(
            f"{where}: not what this program writes there; {field}: {problem['msg']}; it is "
            "damaged, or by another program"
        ) from error
