"""The source pictures of a sample, from which its target comes: members `KEY.source.png`, `KEY.source2.jpg`,
... of the image shards, in the order in which the instruction counts them.
"""

import re
from collections.abc import Iterable

MEMBER = re.compile(r"source([2-9]|[1-9][0-9]+)?\.(jpg|jpeg|png|webp)")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of the target, the image that the sample shows; one of them."""


def source_member(number: int, extension: str) -> str:
    """Extension of the member that holds source picture `number`, counted from 1."""
    return f"source{'' if number == 1 else number}.{extension}"


def is_source(extension: str) -> bool:
    """Whether a member of that extension is a source picture."""
    return MEMBER.fullmatch(extension) is not None


def source_members(extensions: Iterable[str]) -> list[str]:
    """Those among a sample's extensions that are source pictures, the first one first.

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
