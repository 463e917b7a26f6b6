"""CSV cells: nothing runs, nothing hides, and the values come back."""

from __future__ import annotations

import csv
import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import one_line
from featstore.files.tables import (
    csv_bytes,
    csv_line,
    csv_rows,
    plain_cell,
    safe_cell,
    safe_text,
)

# All of Unicode, halves of characters too, with what is dangerous more often than by chance.
TEXT = st.text(
    st.one_of(
        st.sampled_from("=+-@\t\r\n'\"\x1b\x9b\u202e\u2066\u2028\udcff\uff1d ,;0.e"),
        st.characters(exclude_categories=()),
    )
)
DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@given(TEXT)
def test_safe_text_has_no_character_that_acts(text: str) -> None:
    safe = safe_text(text)
    for letter in safe:
        assert unicodedata.category(letter) not in ("Cc", "Cs", "Zl", "Zp")
        assert unicodedata.bidirectional(letter) not in DIRECTIONS
    assert safe_text(safe) == safe
    safe.encode()
    assert one_line(text, 10**6) == safe_text(one_line(text, 10**6))


@pytest.mark.parametrize("text", ["brush hair", "Schießen", "می‌خواهم", "👩‍🚀", "打球", "[red]x"])
def test_what_people_write_stays(text: str) -> None:
    assert safe_text(text) == safe_cell(text) == text


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("-rf", "'-rf"),
        ("  +1+1", "'  +1+1"),
        ("\uff1d1", "'\uff1d1"),
        ("'=1", "''=1"),
        ("\t=1", "\\x09=1"),
        ("\r=1", "\\x0d=1"),
        ("-1.5e-3", "-1.5e-3"),
        ("+5", "+5"),
        (-3, "-3"),
        (float("-inf"), "-inf"),
        (None, ""),
        ("'tis", "'tis"),
        ("\u202egpj", "\\u202egpj"),
    ],
)
def test_a_formula_becomes_text_and_a_number_stays(value: object, cell: str) -> None:
    assert safe_cell(value) == cell


@given(st.lists(st.lists(TEXT, min_size=2, max_size=2)), st.booleans())
def test_what_was_written_is_read_again(rows: list[list[str]], bom: bool) -> None:
    raw = csv_bytes(["key", "=name"], rows, bom=bom)
    assert raw.startswith(b"\xef\xbb\xbf") == bom
    assert csv_rows(raw) == [["key", "=name"], *([*map(safe_text, row)] for row in rows)]
    for row in csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline="")):
        assert not any(cell[:1] in ("=", "@", "\t", "\r") for cell in row)
    lines = [csv_line(row) for row in [["key", "=name"], *rows]]
    assert "".join(lines).encode() == raw.removeprefix(b"\xef\xbb\xbf")


def test_rows_of_earlier_versions_are_read_as_they_are() -> None:
    assert csv_rows(b"key,reason\n-a,=1\n'x,\n") == [["key", "reason"], ["-a", "=1"], ["'x", ""]]
    assert plain_cell("-a") == "-a"


@pytest.mark.parametrize("raw", [b"\xff", b'"open', b'"a"b,c\n'])
def test_other_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"CSV|utf-8"):
        csv_rows(raw)
