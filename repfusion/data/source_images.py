"""The pictures of a sample: its target, an image (`KEY.png`) or a clip (`KEY.mp4`), and the source pictures
from which that comes, members `KEY.source.png`, `KEY.source2.jpg`, ... of the image shards, in the order in
which the instruction counts them.
"""

import re
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import UInt8

from repfusion.data.columns import Column, rebuild_hint
from repfusion.images.decode import read_pixels
from repfusion.images.limits import BadImage

MEMBER = re.compile(r"source([2-9]|[1-9][0-9]+)?\.(jpg|jpeg|png|webp|mp4)")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of the target where it is an image."""
CLIP_EXTENSION = "mp4"
"""Extension of the target where it is a clip."""
PICTURE_EXTENSIONS = (*IMAGE_EXTENSIONS, CLIP_EXTENSION)
"""Extensions of the target, what the sample shows; one of them."""


def source_member(number: int, extension: str) -> str:
    """Extension of the member that holds source picture `number`, counted from 1."""
    return f"source{'' if number == 1 else number}.{extension}"


def is_source(extension: str) -> bool:
    """Whether a member of that extension is a source picture."""
    return MEMBER.fullmatch(extension) is not None


def is_picture(extension: str) -> bool:
    """Whether a member of that extension is the target or a source picture."""
    return extension in PICTURE_EXTENSIONS or is_source(extension)


def source_members(extensions: Iterable[str]) -> list[str]:
    """Source pictures among a sample's extensions, the first one first.

    Raises:
        ValueError: where one is missing before another, or is there twice.
    """
    found = [(int(match[1] or 1), one) for one in extensions if (match := MEMBER.fullmatch(one))]
    found.sort()
    for place, (number, extension) in enumerate(found, start=1):
        if number != place:
            wanted = f"no source image {place}" if number > place else f"two source images {number}"
            raise ValueError(f"{wanted} beside {extension}")
    return [extension for _, extension in found]


class PictureMembers:
    """The pictures of the samples of a data set's images.

    Args:
        images: the column, opened with `is_picture` for what it has further, or with `is_source` alone where
            they are not read.
        are_read: whether the model conditions on images.
    """

    def __init__(self, images: Column, are_read: bool):
        self.images, self.are_read = images, are_read

    def check_read(self) -> None:
        """Raises ValueError where pictures are not read and a sample has sources: its instruction says
        nothing to a model that does not see what it is about.
        """
        for name, spans in self.images.spans.items():
            for shard in range(len(spans)) if is_source(name) and not self.are_read else ():
                if (has := self.images.has(name, shard)).any():
                    raise ValueError(
                        f"{self.images.place(shard, int(has.argmax()))}: an editing sample, of which the "
                        "model would read the instruction without its source images; take a method that "
                        "reads images, or captions of the targets: caption_weights without 'txt'"
                    )

    def sources(self, shard: int, row: int) -> list[str]:
        """Members of a sample that hold its source pictures, in order; none where pictures are not read.

        Raises:
            ValueError: where one is missing.
        """
        try:
            return source_members(self._held(is_source, shard, row)) if self.are_read else []
        except ValueError as error:
            raise ValueError(self._at(shard, row, str(error))) from error

    def target(self, shard: int, row: int) -> str | None:
        """The member that holds what a sample shows; None where pictures are not read."""
        found = self._held(PICTURE_EXTENSIONS.__contains__, shard, row)
        return next((name for name in PICTURE_EXTENSIONS if name in found), None)

    def read(self, member: str, shard: int, row: int) -> UInt8[np.ndarray, "*f h w 3"]:
        """A picture that is there, decoded; a clip with its frames first. ValueError where it is damaged."""
        raw = self.images.read(member, shard, row)
        assert raw is not None
        try:
            if member.endswith(CLIP_EXTENSION):
                from repfusion.video.fitting import read_clip

                return read_clip(raw).frames
            return read_pixels(raw)
        except BadImage as error:
            raise ValueError(self._at(shard, row, f"{member}: {error}")) from error

    def _held(self, wanted: Callable[[str], bool], shard: int, row: int) -> list[str]:
        """Wanted extensions that a sample has."""
        spans = self.images.spans.items()
        return [name for name, places in spans if wanted(name) and places[shard][row, 0] > 0]

    def _at(self, shard: int, row: int, fault: str) -> str:
        return f"{self.images.place(shard, row)}: {fault}; {rebuild_hint(self.images.path(shard))}"
