"""Image shards -> a column of discrete codes (`KEY.codes.npy`, int32 [n]) and `tokenizer.json`, which says
whose they are.
"""

from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipelines.dag import Place, ShardStage, Stage
from pipelines.runtime.pool import ActorsConfig, ShardJob
from pipelines.shards.arrays import npy_parts
from pipelines.shards.manifest import ShardTable
from pipelines.shards.storage import Folder
from pipelines.shards.store import ShardCommit, Sidecar, read_sidecar
from pipelines.shards.tars import tar_shard
from pipelines.stages.image_features import image_batches
from repfusion.codes.column import CODES, TOKENIZER_FILE, TokenizerMark
from repfusion.config import Config, WeightsFolder, naming
from repfusion.files import json_bytes


class CodesConfig(Config):
    """A column of what a tokenizer makes of the images."""

    kind: Literal["codes"] = "codes"
    tokenizer: WeightsFolder | None = None
    """Folder of the tokenizer, or stage:tokenizer; None takes that of the trainings that read the column."""
    batch_size: int = Field(default=64, ge=1)
    """Images encoded at once. Counts as changing no bytes: what it does change is below float32's rounding,
    and a code where two are equally near. Where a batch exceeds a GPU's memory, its halves are encoded, with
    a warning.
    """
    actors: ActorsConfig = ActorsConfig()
    """The pool that encodes, in float32. Changes no bytes."""

    @property
    def stands_alone(self) -> bool:
        """Whether the column can be made though no training reads it."""
        return self.tokenizer is not None


class CodesWorker:
    """Makes `NAME.tar` of codes; the tokenizer is loaded once.

    Args:
        folder: of the stage.
        source: folder of the image shards.
        config: the stage's.
        tokenizer: folder of the tokenizer.
    """

    concurrency: ClassVar[int] = 2
    """While one shard is encoded, another is read, decoded, written and committed."""

    def __init__(self, folder: Folder, source: Folder, config: CodesConfig, tokenizer: Path):
        import torch

        from repfusion.codes.tokenizer import ImageTokenizer
        from repfusion.devices.placing import BatchRoom, find_device

        torch.set_num_threads(max(1, int(config.actors.num_cpus)))
        self.folder, self.source, self.config = folder, source, config
        key = f"columns.{folder.name}"
        self.device = find_device(config.actors.num_gpus > 0, "float32", key)
        self.tokenizer = ImageTokenizer.from_pretrained(tokenizer, with_tower=True).to(self.device)
        self._room = BatchRoom(config.batch_size, self.device, f"{key}.batch_size")
        self._computing = Lock()

    def __call__(self, job: ShardJob) -> Sidecar:
        import numpy as np
        import torch

        sidecar = read_sidecar(self.source, job.name)
        size = self.tokenizer.image_size
        batches = image_batches(self.source, job.name, sidecar, size, self.config.batch_size)
        libraries = ("torch", "transformers")
        with ShardCommit(self.folder, job.name, job.fingerprint, job.inputs, libraries) as commit:
            with tar_shard(commit) as samples:
                for keys, images in batches:
                    with self._computing:
                        parts = self._room(self._encode, torch.from_numpy(images))
                    for key, row in zip(keys, np.concatenate(parts), strict=True):
                        samples.write(key, {f"{CODES}.npy": npy_parts(row)})
            return commit.commit(f"{job.name}.tar")

    def _encode(self, images: Any) -> Any:
        return self.tokenizer.encode_images(images.to(self.device)).int().cpu().numpy()


def codes_stage(
    name: str,
    config: CodesConfig,
    tokenizer: Path,
    key: str,
    images: Stage,
    made_by: Stage | None,
    place: Place,
) -> ShardStage:
    """The stage of a column of codes.

    Args:
        name: of the column.
        config: its section.
        tokenizer: folder of the tokenizer.
        key: where the configuration says what it is.
        images: the stage whose images are encoded.
        made_by: the stage that makes the tokenizer; None where its folder is there.
        place: of the workflow.

    Raises:
        ValueError: there is no such folder.
    """

    def finish(folder: Folder, shards: ShardTable) -> list[str]:
        folder.write(TOKENIZER_FILE, json_bytes(TokenizerMark.of(tokenizer).model_dump(mode="json")))
        return [TOKENIZER_FILE]

    def check() -> None:
        from repfusion.codes.tokenizer import ImageTokenizer

        if made_by is None:
            with naming(key):
                ImageTokenizer.from_pretrained(tokenizer, with_tower=True, on_meta=True)

    digest = "stage:tokenizer" if made_by is not None else place.digests.folder(tokenizer, key)
    return ShardStage(
        name,
        {f"columns.{name}.tokenizer": digest, f"columns.{name}.dtype": "int32"},
        place.data / name,
        (images,) if made_by is None else (images, made_by),
        CodesWorker,
        {"source": images.folder, "config": config, "tokenizer": tokenizer},
        config.actors,
        finish=finish,
        check=check,
    )
