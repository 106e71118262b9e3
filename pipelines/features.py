"""Image shards -> a column of prompt features (`KEY.text.npy`, unpadded [m, d], float16) for the text-only
baseline.

Each distinct caption of a shard is encoded once.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipelines.latents import npy_bytes
from pipelines.pool import ActorsConfig, ShardJob
from pipelines.store import ShardCommit, ShardError, Sidecar, read_samples, read_sidecar, tar_shard

PROMPT_TEMPLATE = "{bos}{caption}"


class FeaturesConfig(BaseModel):
    """Encodes captions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    enabled: bool = True
    """Whether to make the column; only the text-only baseline feeds on it."""
    batch_size: int = Field(default=64, ge=1)
    """Captions encoded at once. Counts as changing no bytes."""
    actors: ActorsConfig = ActorsConfig()
    """Its pool. Changes no bytes."""


def fingerprint_fields(mllm_digest: str, mllm_dtype: str) -> dict[str, Any]:
    """What decides the bytes: the MLLM's weights, not their place."""
    return {
        "train.model.mllm": mllm_digest,
        "train.model.mllm_dtype": mllm_dtype,
        "features.dtype": "float16",
        "features.prompt_template": PROMPT_TEMPLATE,
    }


class FeaturesWorker:
    """Makes `NAME.tar` of prompt features; the MLLM is loaded once.

    Args:
        folder: of the stage.
        source: folder of the image shards, whose captions are read.
        config: the stage's.
        mllm: folder of the frozen MLLM.
        mllm_dtype: precision in which it computes.
    """

    def __init__(
        self,
        folder: Path,
        source: Path,
        config: FeaturesConfig,
        mllm: Path,
        mllm_dtype: Literal["float32", "bfloat16"],
    ):
        import torch

        from repfusion.mllm import MLLM

        torch.set_num_threads(max(1, int(config.actors.num_cpus)))
        self.folder, self.source, self.config = folder, source, config
        device = "cuda" if config.actors.num_gpus else "cpu"
        self.mllm = MLLM.from_pretrained(mllm, getattr(torch, mllm_dtype)).to(device)

    def __call__(self, job: ShardJob) -> Sidecar:
        path = self.source / f"{job.name}.tar"
        captions = {
            key: members["txt"].decode().strip()
            for key, members in read_samples(path, read_sidecar(self.source, job.name))
        }
        encoded = self._encode(captions, path)
        with ShardCommit(
            self.folder, job.name, job.fingerprint, job.inputs, ("torch", "transformers")
        ) as commit:
            with tar_shard(commit) as samples:
                for key, caption in captions.items():
                    samples.write(key, {"text.npy": encoded[caption]})
            return commit.commit(f"{job.name}.tar")

    def _encode(self, captions: dict[str, str], path: Path) -> dict[str, bytes]:
        """Distinct captions -> npy bytes; those of like length share a batch, so that little is padded."""
        from repfusion.conditioning.text_embed import encode_text

        distinct = sorted(set(captions.values()), key=lambda caption: (len(caption), caption))
        encoded: dict[str, bytes] = {}
        for start in range(0, len(distinct), self.config.batch_size):
            batch = distinct[start : start + self.config.batch_size]
            try:
                rows = encode_text(self.mllm, batch)
            except ValueError as error:
                advice = "lower curate.max_caption_chars, so that 'curate' drops and counts it"
                raise ShardError(
                    f"shard {path}: a caption does not fit the MLLM: {error} ({advice})"
                ) from error
            for caption, row in zip(batch, rows, strict=True):
                half = row.half().cpu()
                if not half.isfinite().all():
                    raise ShardError(
                        f"shard {path}: prompt features of {caption!r} are not finite in float16"
                    )
                encoded[caption] = npy_bytes(half.numpy())
        return encoded
