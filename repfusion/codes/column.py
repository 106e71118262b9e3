"""A column of codes on disk: the tokenizer that made it, and who may read it."""

from pathlib import Path

from pydantic import ValidationError

from repfusion.codes.tokenizer import read_folder
from repfusion.config import Strict
from repfusion.files import weights_digest

CODES = "codes"
"""Kind of the column, and the name of its members: KEY.codes.npy, int32 [n]."""
TOKENIZER_FILE = "tokenizer.json"
"""Beside the column's shards: whose codes they are."""


class TokenizerMark(Strict):
    """What a column says of the tokenizer that made its codes."""

    digest: str
    """sha256 of the tokenizer's weights."""
    num_tokens: int
    """Codes of an image."""
    vocabulary: int
    """How many codes there are."""

    @classmethod
    def of(cls, folder: Path) -> "TokenizerMark":
        """The mark of a tokenizer's folder. Raises ValueError where it is none."""
        last = read_folder(folder).network.streams[-1]
        digest = weights_digest(folder)
        return cls(digest=digest, num_tokens=last.stop, vocabulary=last.first_code + last.num_codes)


def check_column(column: Path, tokenizer: Path) -> None:
    """Whether the codes of a column are those of a tokenizer's folder.

    Raises:
        ValueError: the column does not say whose codes it holds, or they are another tokenizer's.
    """
    path, wanted = column / TOKENIZER_FILE, TokenizerMark.of(tokenizer)
    try:
        found = TokenizerMark.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ValueError(
            f"{column}: no readable {TOKENIZER_FILE}, which says whose codes these are; run the stage of the "
            f"column '{column.name}' again"
        ) from error
    if found != wanted:
        raise ValueError(
            f"{column}: its codes ({found.num_tokens} an image, of {found.vocabulary}) are those of the "
            f"tokenizer of weights {found.digest[:12]}; {tokenizer} ({wanted.num_tokens} of "
            f"{wanted.vocabulary}) has weights {wanted.digest[:12]}: point model.tokenizer at the one that "
            f"made the column, or make the column '{column.name}' by this one"
        )
