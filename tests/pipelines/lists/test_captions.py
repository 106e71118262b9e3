"""What becomes of captions as other tools leave them: read, or refused by name; never changed in silence."""

import codecs

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.lists.captions import all_texts, clean, decode_text, one_text, read_caption
from pipelines.lists.values import BadEntry, Undecodable

PLAIN = st.text(st.characters(exclude_categories=("Cc", "Cs")))


@given(PLAIN, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
@example("a red circle", "utf-8-sig")
@example("a red circle", "utf-16")
def test_text_is_read_whatever_its_mark_says(text, encoding):
    data = text.encode(encoding)
    assert decode_text(data) == (text.removeprefix("\ufeff") if encoding == "utf-8" else text)
    for mark, name in ((codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF32_BE, "utf-32-be")):
        assert decode_text(mark + text.encode(name)) == text


@given(PLAIN.filter(lambda text: not text.startswith("\ufeff")))
def test_plain_text_is_not_touched(text):
    assert clean(text) == text == one_text(text.encode())


@given(st.binary())
def test_any_bytes_are_text_or_refused_with_a_reason(data):
    try:
        text = one_text(data)
    except BadEntry as error:
        assert error.reason == "undecodable_caption" and error.detail
    else:
        assert text is not None and text.encode().decode() == text
        assert not any(ord(one) < 32 and one not in "\t\n\r" for one in text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("\ufeffa red circle", "a red circle"),
        ("a red\tcircle\r\n", "a red\tcircle\r\n"),
        ("a\x1b[31mred\x7f circle\x85", "a [31mred  circle "),
        (b"a red circle", "a red circle"),
        (None, None),
        ("", ""),
    ],
)
def test_marks_go_and_control_characters_become_spaces(value, text):
    assert one_text(value) == text


@pytest.mark.parametrize(
    ("value", "reason", "detail"),
    [
        ("a red\0 circle", "undecodable_caption", "a NUL at character 5"),
        ("a red circle".encode("utf-16-le"), "undecodable_caption", "a NUL at character 1: UTF-16 without"),
        ("café".encode("latin-1"), "undecodable_caption", "can't decode byte 0xe9"),
        (b"\xff\xfea", "undecodable_caption", "truncated"),
        ("half \ud800", "undecodable_caption", "surrogates"),
        (Undecodable("as said"), "undecodable_caption", "as said"),
        (5, "not_text", "a number"),
        (True, "not_text", "a truth value"),
        ({"src": "x"}, "not_text", "a struct"),
        (["a"], "several_captions", "a list of 1; set source.several_captions to first or all"),
    ],
)
def test_what_is_no_caption_is_refused_with_its_reason(value, reason, detail):
    with pytest.raises(BadEntry, match=detail) as caught:
        read_caption(value, "whole")
    assert caught.value.reason == reason


LINES = "a red circle\na blue square\r\n\n  a photo of a circle \n"


ITEMS = ["a red circle", "", None, "a blue square", "a photo of a circle"]


@pytest.mark.parametrize("value", [LINES, LINES.encode("utf-16"), ITEMS])
def test_one_of_several_or_all(value):
    texts = ["a red circle", "a blue square", "a photo of a circle"]
    assert read_caption(value, "first") == ("a red circle", {})
    assert read_caption(value, "all") == ("a red circle", {"all_captions": texts})
    assert all_texts(value) == texts


def test_a_text_of_several_lines_stays_whole():
    assert read_caption(LINES, "whole") == (LINES, {})


def test_no_caption_and_an_empty_one_differ():
    assert read_caption(None, "all") == (None, {})
    assert read_caption(" \n", "all") == ("", {"all_captions": []})
    assert read_caption([], "first") == ("", {})
    with pytest.raises(BadEntry, match="a number"):
        read_caption(["a", 5], "first")
    with pytest.raises(BadEntry, match="a list"):
        read_caption(["a", ["b"]], "all")
