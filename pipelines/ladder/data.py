"""Scenes -> the columns that the rows train on: the same images, in each latent space, by the workflow's own
stages.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.build import data_stages
from pipelines.config import WorkflowConfig
from pipelines.dag import Stage
from pipelines.ladder.config import LadderConfig
from pipelines.ladder.rows import SPACES, Space
from pipelines.workflow.run import run

COLUMNS: dict[Space, str] = {"rae": "image_features", "vae": "image_features_vae"}


@dataclass(frozen=True)
class Columns:
    """Folders of captions and of features, and the fingerprint of the images."""

    images: Path
    features: dict[Space, Path]
    fingerprint: str


def stages_of(config: LadderConfig, spaces: Iterable[Space]) -> list[Stage]:
    """Source to curate, then one column of image features for each space.

    Raises:
        ValueError: where an encoder's folder is missing.
    """
    return list(data_stages(_workflow(config, sorted(set(spaces), key=list(COLUMNS).index))))


def _workflow(config: LadderConfig, spaces: Sequence[Space]) -> WorkflowConfig:
    size = config.data.scenes.world.image_size
    encoders = {space: {"path": config.weights / SPACES[space][0], "image_size": size} for space in spaces}
    return WorkflowConfig.model_validate(
        {
            "root": data_root(config),
            "last_stage": COLUMNS[spaces[-1]],
            "source": config.data.scenes,
            "ingest": {"image_size": size},
            "curate": {
                "min_side_px": min(16, size),
                "max_caption_chars": 200,
                "duplicates": "keep",
                # the rows' own: each training looks whether all captions fit
                "max_caption_tokens": None,
            },
            "columns": {
                COLUMNS[space]: {"kind": "image_features", "encoder": encoder}
                for space, encoder in encoders.items()
            },
            # the rows train by themselves; a workflow has a training, which is not reached
            "trainings": {"train": {"model": {"encoder": encoders[spaces[0]]}, "tracking": {"uri": None}}},
            "ray": config.ray,
        }
    )


def data_root(config: LadderConfig) -> Path:
    return config.root / config.name / "data"


def prepare(config: LadderConfig, spaces: Iterable[Space], say: Callable[[str], None] = print) -> Columns:
    """Brings the columns up to date; nothing is made twice.

    Raises:
        ValueError: a folder of weights is missing, or another run is at work there.
        StageError: a stage failed.
    """
    spaces = list(dict.fromkeys(spaces))
    stages = stages_of(config, spaces)
    run(stages, data_root(config), config.ray, say)
    by_name = {stage.name: stage for stage in stages}
    return Columns(
        images=by_name["curate"].folder.path,
        features={space: by_name[COLUMNS[space]].folder.path for space in spaces},
        fingerprint=by_name["curate"].fingerprint,
    )
