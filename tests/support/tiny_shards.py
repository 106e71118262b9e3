"""Images -> a folder of WebDataset tars, as a `curate` stage without a manifest."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_shards(folder: Path, images: Sequence[np.ndarray], num_shards: int) -> Path:
    """Each image with the caption `dog KEY`, in turn to the shards."""
    folder.mkdir(parents=True)
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for index, image in enumerate(images[shard::num_shards]):
                key, stream = f"{shard:05d}{index:04d}", io.BytesIO()
                Image.fromarray(image).save(stream, "PNG")
                texts = {"png": stream.getvalue(), "txt": f"dog {key}".encode(), "json": b"{}"}
                for extension, data in texts.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder
