"""One writer of tables for terminals, markdown and HTML."""

from repfusion.display.tables import aligned, html, markdown

HEAD, ROWS = ("name", "n", "note"), [("one", "1,000", "a"), ("eleven", "2", "")]


def test_columns_are_aligned_and_lines_end_without_spaces():
    assert aligned([HEAD, *ROWS], left=(0, 2)).splitlines() == [
        "name        n  note",
        "one     1,000  a",
        "eleven      2",
    ]
    assert aligned([("a", "b"), ("long", "1")]).splitlines() == ["a     b", "long  1"]


def test_markdown_has_a_rule_below_the_head():
    assert markdown(HEAD, ROWS).splitlines() == [
        "| name | n | note |",
        "|---|---|---|",
        "| one | 1,000 | a |",
        "| eleven | 2 |  |",
    ]


def test_html_sets_numbers_right():
    assert html(("name", "n"), [("one", "<b>1</b>")]) == (
        '<table><thead><tr><th>name</th><th class="n">n</th></tr></thead>'
        '<tbody><tr><td>one</td><td class="n"><b>1</b></td></tr></tbody></table>'
    )
