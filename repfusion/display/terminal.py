"""Text that somebody else wrote -> text that a terminal shows and does not obey."""

import unicodedata

HARMLESS = "\u200c\u200d"
"""Invisible characters that emoji and scripts are joined with."""
OBEYED = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Categories of what moves the cursor, starts an escape sequence, turns the direction of writing or
ends a line.
"""


def printable(text: str) -> str:
    """One line: what a terminal would obey is written as Python writes it, such as \\x1b and \\u202e."""
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in OBEYED and char not in HARMLESS
        else char
        for char in text
    )


def printable_lines(text: str) -> str:
    """Lines of text, each made printable; line feeds stay."""
    return "\n".join(map(printable, text.split("\n")))
