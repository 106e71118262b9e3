"""A folder of image shards -> captions that training leaves out, and the real images that they are of."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from repfusion.data.columns import scan_tar, shard_names
from repfusion.data.order import hash64, is_held_out
from repfusion.data.source_images import IMAGE_EXTENSIONS
from repfusion.tars import split_name


@dataclass(frozen=True)
class Captioned:
    """A sample of the data set, as it is stored."""

    key: str
    caption: str
    image: bytes

    @property
    def digest(self) -> str:
        """sha256 of the image's file."""
        return hashlib.sha256(self.image).hexdigest()


def read_captioned(images: Path, held_out_share: float, number: int) -> list[Captioned]:
    """The first so many samples that training holds out (where it holds out none, of all), from shards in an
    order of their names' hashes, so that a source that is sorted is seen everywhere.

    Raises:
        ValueError: the folder holds no shards, or no such sample.
    """
    found: list[Captioned] = []
    for name in sorted(shard_names(images), key=lambda name: hash64("shard", name)):
        found += _of_shard(images / name, held_out_share)
        if len(found) >= number:
            break
    if not found:
        raise ValueError(
            f"{images}: none of its samples is held out by held_out_share {held_out_share:g}; raise it, or "
            "give more images"
        )
    return found[:number]


def _of_shard(path: Path, share: float) -> Iterator[Captioned]:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for member, span in scan_tar(path).items():
        if (name := split_name(member)) is not None:
            samples.setdefault(name[0], {})[name[1]] = span
    with path.open("rb") as stream:

        def read(span: tuple[int, int]) -> bytes:
            stream.seek(span[0])
            return stream.read(span[1])

        for key, members in samples.items():
            extension = next((one for one in IMAGE_EXTENSIONS if one in members), None)
            if extension is None or "txt" not in members or (share and not is_held_out(key, share)):
                continue
            caption = read(members["txt"]).decode(errors="replace").strip()
            if caption:
                yield Captioned(key, caption, read(members[extension]))
