"""What a terminal would obey is shown and not done; what people write stays."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repfusion.display.tables import aligned
from repfusion.display.terminal import printable, printable_lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;mine\x07", r"\x1b[2J\x1b]0;mine\x07"),
        ("a\rb\nc\td\x00e\x7f", r"a\rb\nc\td\x00e\x7f"),
        ("\x9b31m", r"\x9b31m"),
        ("a\u202ecb\u202c \u2066x\u2069 \u200fz", r"a\u202ecb\u202c \u2066x\u2069 \u200fz"),
        ("a\u2028b\ufeffc\ue000\U000e0041", r"a\u2028b\ufeffc\ue000\U000e0041"),
        (
            "ein Hündchen, 赤い　円, \U0001f469\u200d\U0001f680 \xa0!",
            "ein Hündchen, 赤い　円, \U0001f469\u200d\U0001f680 \xa0!",
        ),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text, shown):
    assert printable(text) == shown
    assert aligned([(text, "1")]) == f"{shown}  1"


@settings(deadline=None)
@given(st.text(max_size=100))
def test_lines_stay_lines(text):
    shown = printable_lines(text)
    assert shown.split("\n") == [printable(line) for line in text.split("\n")]
    assert printable_lines(shown) == shown
