"""Text that others wrote, as bytes, text or lists of them -> a caption, and the others that a sample has."""

import codecs
import re
from collections.abc import Mapping
from typing import Any, Literal

from pipelines.lists.values import BadEntry, Undecodable

SeveralCaptions = Literal["whole", "first", "all"]
"""What a text of several lines, or a list of texts, means."""
ALL_CAPTIONS = "all_captions"
"""Field of a sample's JSON that keeps all of several captions."""
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    # before those of UTF-16, of which one begins the same way
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order marks, and what text that begins with one is written in."""
LISTS_REMEDY = "source.several_captions to first or all"
_CONTROL = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
"""Control characters other than tab and line ends, and other than NUL, which no text holds."""
_LINE_END = re.compile("\r\n|\r|\n")


def decode_text(data: bytes) -> str:
    """UTF-8, or what a byte order mark says: UTF-16 or UTF-32. The mark goes.

    Raises:
        BadEntry: undecodable_caption.
    """
    mark, encoding = next((one for one in MARKS if data.startswith(one[0])), (b"", "utf-8"))
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise BadEntry("undecodable_caption", str(error)) from error


def clean(text: str) -> str:
    """Text without a byte order mark before it, each control character (tab and line ends stay) as a space.

    Raises:
        BadEntry: undecodable_caption, where there is a NUL, as in UTF-16 that has no mark, or half a
            surrogate pair.
    """
    text = text.removeprefix("\ufeff")
    if (at := text.find("\0")) >= 0:
        raise BadEntry("undecodable_caption", f"a NUL at character {at}: UTF-16 without a mark, or no text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadEntry("undecodable_caption", str(error)) from error
    return _CONTROL.sub(" ", text)


def one_text(value: Any) -> str | None:
    """A cell that holds one text, or none: text, or bytes of it.

    Raises:
        BadEntry: undecodable_caption, or not_text for a value of another kind.
    """
    match value:
        case None:
            return None
        case bytes():
            return clean(decode_text(value))
        case str():
            return clean(value)
        case Undecodable():
            raise BadEntry("undecodable_caption", value.detail)
    raise BadEntry("not_text", f"the caption is a {_name(value)}, expected text")


def all_texts(value: Any) -> list[str]:
    """The captions of a cell: the items of a list, or the lines of a text; without the empty ones, and
    without spaces around them.

    Raises:
        BadEntry: undecodable_caption, or not_text where the cell or an item of it is of another kind.
    """
    found = [one_text(item) for item in value] if isinstance(value, list) else [one_text(value)]
    texts = [text for text in found if text is not None]
    if not isinstance(value, list):
        texts = [line for text in texts for line in _LINE_END.split(text)]
    return [stripped for text in texts if (stripped := text.strip())]


def lists_remedy(several: SeveralCaptions) -> str | None:
    """What to set where a source meets lists of captions; None where it takes them."""
    return LISTS_REMEDY if several == "whole" else None


def read_caption(value: Any, several: SeveralCaptions) -> tuple[str | None, dict[str, list[str]]]:
    """A sample's caption, None where it has none, and what goes into its JSON beside it. With `whole`, a text
    is one caption, with all its lines.

    Raises:
        BadEntry: undecodable_caption, not_text, or several_captions for a list where `whole` is asked for.
    """
    if several == "whole":
        if isinstance(value, list):
            raise BadEntry(
                "several_captions",
                f"the caption is a list of {len(value)}; set {LISTS_REMEDY}",
            )
        return one_text(value), {}
    if value is None:
        return None, {}
    texts = all_texts(value)
    caption = texts[0] if texts else ""
    return caption, {ALL_CAPTIONS: texts} if several == "all" else {}


def _name(value: Any) -> str:
    """The kind of a value as JSON calls it."""
    match value:
        case bool():
            return "truth value"
        case int() | float():
            return "number"
        case Mapping():
            return "struct"
        case list():
            return "list"
    return type(value).__name__
