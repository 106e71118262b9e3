"""Scenes -> the columns that the rows train on, by the workflow's own stages: the same images in each latent
space, and rewritten captions.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.build import data_stages
from pipelines.config import WorkflowConfig
from pipelines.dag import Stage
from pipelines.ladder.config import LadderConfig
from pipelines.ladder.plans.base import Row, Space
from pipelines.ladder.rows import SPACES
from pipelines.workflow.run import run
from repfusion.data.readers import IMAGE_FEATURES, REWRITES
from repfusion.files import digest_of

COLUMNS: dict[Space, str] = {"rae": "image_features", "vae": "image_features_vae"}


@dataclass(frozen=True)
class Columns:
    """Folders of captions, of features and of rewritings, and the fingerprint of the images."""

    images: Path
    features: dict[Space, Path]
    rewrites: dict[str, Path]
    """A folder of each column, which `rewrites_of` names."""
    fingerprint: str

    def of(self, row: Row) -> dict[str, Path]:
        """The columns that a row reads, by kind."""
        name = rewrites_of(row)
        rewrites = {} if name is None else {REWRITES: self.rewrites[name]}
        return {IMAGE_FEATURES: self.features[row.space], **rewrites}


def rewrites_of(row: Row) -> str | None:
    """Name of the column of rewritings that a row reads; None where it reads none. Rows that ask the same
    language model in the same words share one.
    """
    if row.rewriting is None:
        return None
    asked = {name: row.rewriting[name] for name in sorted(row.rewriting) if name != "share"}
    return f"{REWRITES}_{row.llm}_{digest_of(asked)[:8]}"


def stages_of(config: LadderConfig, rows: Sequence[Row]) -> list[Stage]:
    """Source to curate, then a column of image features for each latent space of the rows, and one of
    rewritings for each language model that rewrites.

    Raises:
        ValueError: where a folder of weights is missing.
    """
    return list(data_stages(_workflow(config, rows)))


def _workflow(config: LadderConfig, rows: Sequence[Row]) -> WorkflowConfig:
    size = config.data.scenes.world.image_size
    spaces = sorted({row.space for row in rows}, key=list(COLUMNS).index)
    encoders = {space: {"path": config.weights / SPACES[space][0], "image_size": size} for space in spaces}
    columns: dict[str, Any] = {
        COLUMNS[space]: {"kind": "image_features", "encoder": encoder} for space, encoder in encoders.items()
    }
    for row in rows:
        if (name := rewrites_of(row)) is not None and row.rewriting is not None:
            asked = {field: value for field, value in row.rewriting.items() if field != "share"}
            mllm = {"mllm": config.weights / row.llm, "mllm_dtype": "float32"}
            columns[name] = {"kind": REWRITES, **mllm, **asked}
    return WorkflowConfig.model_validate(
        {
            "root": data_root(config),
            "last_stage": list(columns)[-1],
            "source": config.data.scenes,
            "ingest": {"image_size": size},
            "curate": {
                "min_side_px": min(16, size),
                "max_caption_chars": 200,
                "duplicates": "keep",
                # the rows' own: each training looks whether all captions fit
                "max_caption_tokens": None,
            },
            "columns": columns,
            # the rows train by themselves; a workflow has a training, which is not reached
            "trainings": {"train": {"model": {"encoder": encoders[spaces[0]]}, "tracking": {"uri": None}}},
            "ray": config.ray,
        }
    )


def data_root(config: LadderConfig) -> Path:
    return config.root / config.name / "data"


def prepare(config: LadderConfig, rows: Iterable[Row], say: Callable[[str], None] = print) -> Columns:
    """Brings the columns up to date; nothing is made twice.

    Raises:
        ValueError: a folder of weights is missing, or another run is at work there.
        StageError: a stage failed.
    """
    rows = list(rows)
    stages = stages_of(config, rows)
    run(stages, data_root(config), config.ray, say)
    by_name = {stage.name: stage for stage in stages}
    return Columns(
        images=by_name["curate"].folder.path,
        features={row.space: by_name[COLUMNS[row.space]].folder.path for row in rows},
        rewrites={name: by_name[name].folder.path for row in rows if (name := rewrites_of(row)) is not None},
        fingerprint=by_name["curate"].fingerprint,
    )
