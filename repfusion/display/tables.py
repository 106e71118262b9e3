"""Rows of cells -> a table: aligned for a terminal, markdown, or HTML."""

from collections.abc import Collection, Iterable, Sequence

from repfusion.display.terminal import printable

Cells = Sequence[str]


def aligned(rows: Sequence[Cells], left: Collection[int] = (0,)) -> str:
    """Lines of text; the columns `left` are set left, the others right. A heading is a row like any other.
    What a terminal would obey is escaped.
    """
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Cells) -> str:
        sides = (
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(sides).rstrip()

    return "\n".join(map(line, rows))


def markdown(head: Cells, rows: Iterable[Cells]) -> str:
    """Cells are markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def html(head: Cells, rows: Iterable[Cells], numeric_from: int = 1) -> str:
    """Cells are HTML; columns from `numeric_from` on are set right."""

    def line(cells: Cells, tag: str) -> str:
        sides = ("" if i < numeric_from else ' class="n"' for i in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{s}>{c}</{tag}>" for c, s in zip(cells, sides, strict=True)) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"
