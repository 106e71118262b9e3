"""A folder of image shards -> an index of their embeddings, a file a shard; and back to the images.

INDEX/  00000.safetensors   embeddings [n, r] of the shard's images, in its order
        00000.json          their keys
        index.json          what made them, and of what; written last
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from repfusion.config import Strict, naming, validate
from repfusion.data.columns import MANIFEST, Column, manifest_digest, scan_tar, shard_names
from repfusion.data.readers import IMAGE_FEATURES
from repfusion.data.source_images import IMAGE_EXTENSIONS
from repfusion.files import atomic_path, digest_of, file_sha256, replace_folder, write_json
from repfusion.images.decode import read_pixels
from repfusion.retrieval.embedding import EmbeddingSpace, GillReader
from repfusion.retrieval.search import nearest

INDEX, SCHEMA = "index.json", 1
EMBEDDINGS = "embeddings"
MEMBER = f"{IMAGE_FEATURES}.npy"


class IndexedShard(Strict):
    """A shard of images that an index holds."""

    name: str
    """The tar's file name."""
    num_images: int
    sha256: str
    """Names the file of its embeddings."""


class IndexRecord(Strict):
    """What `index.json` says."""

    index_schema: int = SCHEMA
    space: EmbeddingSpace
    images: str
    """Folder of the image shards."""
    manifest: str | None
    """Name of their data, where their folder has a manifest."""
    width: int
    """Channels of an embedding."""
    shards: tuple[IndexedShard, ...]


@dataclass(frozen=True)
class Hit:
    """An image that was found, and how well it fits: the cosine of the two embeddings."""

    shard: str
    key: str
    score: float


class ImageIndex:
    """An index on disk.

    Raises:
        ValueError: the folder holds none, or `index.json` is damaged.
    """

    def __init__(self, folder: Path):
        path = folder / INDEX
        if not path.is_file():
            raise ValueError(
                f"index {folder}: no {INDEX} here; 'python -m repfusion.retrieval index' writes one"
            )
        with naming(f"index {folder}"):
            self.record = validate(IndexRecord, json.loads(path.read_text()), str(path))
        self.folder = folder
        self._whole: set[str] = set()
        """Shards whose files were compared with their sha256."""

    @property
    def digest(self) -> str:
        """Names its contents, wherever it lies."""
        return digest_of(self.record.model_dump(mode="json", exclude={"images": True}))

    def check(self, space: EmbeddingSpace) -> None:
        """Raises ValueError where another checkpoint or encoder made it."""
        remedy = "make the index again by 'python -m repfusion.retrieval index', or name its own checkpoint"
        space.check(self.record.space, f"index {self.folder}", remedy)

    @cached_property
    def starts(self) -> list[int]:
        """Place of each shard's first image, and the number of all."""
        return [0, *accumulate(one.num_images for one in self.record.shards)]

    def __len__(self) -> int:
        return self.starts[-1]

    def embeddings(self) -> Iterator[Float[Tensor, "n r"]]:
        """The embeddings, a shard at a time. Raises ValueError where a file is missing or damaged."""
        for shard in self.record.shards:
            path = self.folder / f"{Path(shard.name).stem}.safetensors"
            try:
                if shard.name not in self._whole and file_sha256(path) != shard.sha256:
                    raise self._damaged(path, "its sha256 is another")
                self._whole.add(shard.name)
                found = load_file(path)[EMBEDDINGS]
            except (OSError, KeyError, SafetensorError) as error:
                raise self._damaged(path, str(error)) from error
            if found.shape != (shard.num_images, self.record.width):
                raise self._damaged(path, f"holds {tuple(found.shape)}")
            yield found

    def _damaged(self, path: Path, why: str) -> ValueError:
        return ValueError(f"index {self.folder}: {path.name} is not readable ({why}); make the index again")

    def find(self, queries: Float[Tensor, "q r"], num: int) -> list[list[Hit]]:
        """The images nearest to each query, best first."""
        scores, places = nearest(queries, self.embeddings(), num)
        shards = sorted({self._shard_of(place) for place in places.flatten().tolist()})
        keys = {shard: self._keys(shard) for shard in shards}
        return [
            [self._hit(place, score, keys) for place, score in zip(*row, strict=True)]
            for row in zip(places.tolist(), scores.tolist(), strict=True)
        ]

    def _shard_of(self, place: int) -> int:
        return int(np.searchsorted(self.starts, place, side="right")) - 1

    def _keys(self, shard: int) -> list[str]:
        path = self.folder / f"{Path(self.record.shards[shard].name).stem}.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise self._damaged(path, str(error)) from error

    def _hit(self, place: int, score: float, keys: dict[int, list[str]]) -> Hit:
        shard = self._shard_of(place)
        return Hit(self.record.shards[shard].name, keys[shard][place - self.starts[shard]], score)

    def image(self, hit: Hit) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels of an image that was found. Raises ValueError where its shard has gone or changed."""
        path = Path(self.record.images) / hit.shard
        if not path.is_file():
            raise ValueError(
                f"index {self.folder} is of the images in {path.parent}, where {path.name} is missing; put "
                "the shards back, or make the index again"
            )
        members = scan_tar(path)
        for extension in IMAGE_EXTENSIONS:
            if span := members.get(f"{hit.key}.{extension}"):
                with path.open("rb") as stream, naming(f"shard {path}, key {hit.key}"):
                    stream.seek(span[0])
                    return read_pixels(stream.read(span[1]))
        raise ValueError(
            f"shard {path} has no image {hit.key}, which the index {self.folder} found there; make it again"
        )


def build_index(
    reader: GillReader, images: Path, out: Path, column: Path | None = None, batch_size: int = 64
) -> ImageIndex:
    """Writes the index of all images of a folder of shards. In memory is a batch of images, and the
    embeddings of a shard.

    Args:
        reader: the checkpoint.
        images: folder of image shards, such as a workflow's `curate`.
        out: folder that is written; an index that lies there is replaced once the new one is whole.
        column: their column of image features, which spares encoding them; its manifest has to name the
            checkpoint's encoder.
        batch_size: images that are read at once.

    Raises:
        ValueError: no shards; a sample without an image, or with one of another size; a column of another
            encoder; `out` holds something else.
    """
    if out.exists() and not (out / INDEX).is_file() and any(out.iterdir()):
        raise ValueError(f"--out {out} holds other files than an index; choose an empty folder")
    if column is not None:
        check_column(column, reader.space)
    working = out.with_name(f".{out.name}.working")
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    source = _Images(reader, images, column, batch_size)
    shards = [_write_shard(source, name, working) for name in shard_names(images)]
    record = IndexRecord(
        space=reader.space,
        images=str(images.resolve()),
        manifest=manifest_digest(images),
        width=reader.conditioner.of_image.out_features,
        shards=tuple(shards),
    )
    write_json(working / INDEX, record.model_dump(mode="json"))
    replace_folder(working, out)
    return ImageIndex(out)


def check_column(column: Path, space: EmbeddingSpace) -> None:
    """Raises ValueError where the manifest of a column of image features is missing, or names another encoder
    than the checkpoint's.
    """
    if not (column / MANIFEST).is_file():
        raise ValueError(
            f"column {column} has no {MANIFEST}, which says what encoder made it; leave the column out, and "
            "the images are encoded"
        )
    fields = json.loads((column / MANIFEST).read_text()).get("fields", {})
    found = {key.rpartition(".encoder.")[2]: value for key, value in fields.items() if ".encoder." in key}
    wanted = {"path": space.encoder, "layer": space.layer, "image_size": space.image_size}
    for name, expected in wanted.items():
        if found.get(name) != expected:
            raise ValueError(
                f"column {column} was made by another encoder than the checkpoint {space.checkpoint} has: "
                f"{name} {str(found.get(name))[:12]}, expected {str(expected)[:12]}; leave the column "
                "out, and the images are encoded, or name the column that the training read"
            )


class _Images:
    """The embeddings of image shards, one shard at a time."""

    def __init__(self, reader: GillReader, images: Path, column: Path | None, batch_size: int):
        self.reader, self.folder, self.column, self.batch_size = reader, images, column, batch_size

    def embed(self, name: str) -> tuple[list[str], Float[Tensor, "n r"]]:
        """Keys and embeddings of a shard."""
        images = Column(self.folder, optional=IMAGE_EXTENSIONS)
        keys = images.open_shard(name)
        features = None if self.column is None else Column(self.column, required=(MEMBER,))
        if features is not None:
            features.open_shard(name, keys)
        found = []
        for start in range(0, len(keys), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(keys)))
            if features is None:
                found.append(self.reader.of_images([self._pixels(images, row) for row in rows]))
            else:
                found.append(self._of_column(features, rows))
        for one in (images, features):
            if one is not None:
                one.close()
        width = self.reader.conditioner.of_image.out_features
        return [key.decode() for key in keys.tolist()], torch.cat([torch.empty(0, width), *found])

    def _of_column(self, features: Column, rows: Sequence[int]) -> Float[Tensor, "n r"]:
        arrays = [features.read_array(MEMBER, 0, row) for row in rows]
        expected = self.reader.model.latent_shape
        for row, array in zip(rows, arrays, strict=True):
            if array.shape != expected:
                raise ValueError(f"{features.place(0, row)}: features are {array.shape}, expected {expected}")
        return self.reader.of_features(torch.from_numpy(np.stack(arrays)).float())

    def _pixels(self, images: Column, row: int) -> UInt8[np.ndarray, "h w 3"]:
        for extension in IMAGE_EXTENSIONS:
            if (raw := images.read(extension, 0, row)) is not None:
                with naming(images.place(0, row)):
                    pixels, side = read_pixels(raw), self.reader.encoder.image_size
                if pixels.shape[:2] != (side, side):
                    raise ValueError(
                        f"{images.place(0, row)}: the image is {pixels.shape[1]} x {pixels.shape[0]} px, the "
                        f"encoder takes {side} x {side}; resize in 'ingest'"
                    )
                return pixels
        raise ValueError(
            f"{images.place(0, row)}: no image ({', '.join(IMAGE_EXTENSIONS)}); index the folder that "
            "'curate' wrote"
        )


def _write_shard(source: _Images, name: str, folder: Path) -> IndexedShard:
    keys, embeddings = source.embed(name)
    path = folder / f"{Path(name).stem}.safetensors"
    with atomic_path(path) as temporary:
        save_file({EMBEDDINGS: embeddings.contiguous()}, str(temporary))
    write_json(folder / f"{Path(name).stem}.json", keys)
    return IndexedShard(name=name, num_images=len(keys), sha256=file_sha256(path))
