"""How a model reads a column: which member of a sample, and what has to be alike over the data set."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

IMAGE_FEATURES = "image_features"
VIDEO_FEATURES = "video_features"
PROMPT_FEATURES = "prompt_features"
REWRITES = "rewrites"


@runtime_checkable
class Reader(Protocol):
    """A kind of column. A model holds one for each column that it can use, by the column's name."""

    @property
    def is_required(self) -> bool:
        """Whether the model cannot be trained without the column."""
        ...

    @property
    def is_dense(self) -> bool:
        """Whether all members of a data set have one shape and dtype; else all but their first axis."""
        ...

    @property
    def sees_images(self) -> bool:
        """Whether what it holds of an editing sample was made of the source images too."""
        ...

    def member(self, column: str, caption: str) -> str:
        """Extension of the member that belongs to a caption (`txt`, or `NAME.txt`)."""
        ...


@dataclass(frozen=True)
class SampleArray:
    """One array a sample, of one shape and dtype in the whole data set: `KEY.COLUMN.npy`."""

    is_required: bool = True
    is_dense: bool = True
    sees_images: bool = False

    def member(self, column: str, caption: str) -> str:
        return f"{column}.npy"


@dataclass(frozen=True)
class CaptionArray:
    """One array a caption, `[m, d]` with an m of its own: `KEY.COLUMN.npy` belongs to the main caption,
    `KEY.long.COLUMN.npy` to `long.txt`.
    """

    is_required: bool = False
    is_dense: bool = False
    sees_images: bool = False

    def member(self, column: str, caption: str) -> str:
        return f"{caption.removesuffix('txt')}{column}.npy"
