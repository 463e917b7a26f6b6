"""Any bytes give a value that can be used and written again, or one line of error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import UserError, WorkError
from featstore.files.documents import (
    DEEPEST,
    found_object,
    parse_json,
    parse_toml,
    read_document,
    read_json,
    read_object,
    read_toml,
)

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
# Pieces of JSON and TOML in any order get further into the parsers than random bytes do.
PIECES = st.lists(
    st.sampled_from(
        [b"9" * 5000, b"[" * 40, b"]" * 40, b"{" * 40, b'{"a":' * 40, b'"\\ud800"', b"1979-05-27"]
        + [bytes([letter]) for letter in b"{}[]:,=.-+#'\"\\ \n\r\t\x00\xffa1e"]
        + b"NaN inf 1e999 true null \xef\xbb\xbf".split()
    )
).map(b"".join)


def outcome(read: Callable[[], Any]) -> tuple[Any, ValueError | None]:
    try:
        return read(), None
    except ValueError as error:
        return None, error


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


@given(VALUES)
def test_what_was_written_is_read(value: Any) -> None:
    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only, allow_nan=False)
        assert parse_json(text.encode()) == parse_json(text) == value


@given(st.binary() | PIECES, st.booleans())
def test_any_bytes_are_a_value_or_an_error(raw: bytes, foreign: bool) -> None:
    found, refusal = outcome(lambda: parse_json(raw, foreign=foreign))
    if refusal is None:
        again = json.dumps(found, allow_nan=foreign, ensure_ascii=foreign).encode()
        assert repr(parse_json(again, foreign=foreign)) == repr(found)
    tables, refusal = outcome(lambda: parse_toml(raw))
    if refusal is None:
        assert json.dumps(tables, default=str)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "Expecting value"),
        (b"\xff{}", "not UTF-8 text (byte 0)"),
        (b"[NaN]", "NaN, which is no finite number"),
        (b"[-Infinity]", "-Infinity"),
        (b"[1e999]", "1e999"),
        (b'"\\ud800"', "half a character"),
        (b'{"b": {"a\\u001b": 1, "a\\u001b": 2}}', r"'a\x1b' twice"),
        (b"9" * 5000, "thousands of digits"),
        (deep(DEEPEST + 1), "more than 32 levels"),
        (deep(10**5), "more than 32 levels"),
        (b'{"a":' * 10**5, "more than 32 levels"),
        (b"[" * 10**5, "more than 32 levels"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    ],
)
def test_what_is_refused(tmp_path: Path, raw: bytes, words: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the words follow
        parse_json(raw)
    assert words in str(refusal.value)
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    for error in (UserError, WorkError):
        with pytest.raises(error) as told:
            read_json(path, "write it again", error=error)
        assert str(told.value).startswith(f"{path} is not JSON that mote reads (")
        assert str(told.value).endswith("; write it again")
    assert found_object(path) is None


def test_the_deepest_that_is_read() -> None:
    assert parse_json(deep(DEEPEST)) is not None
    assert parse_json(json.dumps("[" * 1000)) == "[" * 1000  # in a string they are letters
    assert parse_toml(b"a = " + deep(DEEPEST - 1))


@pytest.mark.parametrize(
    "raw",
    [
        b"a = " + deep(DEEPEST),
        b"a = " + deep(10**4),
        b".".join([b"a"] * 1000) + b" = 1",
        b"[" + b".".join([b"a"] * 1000) + b"]",
        b"a = " + b"{a = " * 500 + b"1" + b"}" * 500,
        b"a = " + b"9" * 5000,
        b"a = 1\na = 2",
        b"\xff",
        b"a",
    ],
)
def test_toml_that_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"is not TOML that mote reads .*; use another$"):
        read_toml(path, "use another")


def test_other_programs_may_write_numbers_and_letters_that_mote_does_not() -> None:
    assert parse_json(b'[1e999, "\\ud800"]', foreign=True) == [float("inf"), "\ud800"]
    with pytest.raises(ValueError, match="twice"):
        parse_json(b'{"a": 1, "a": 2}', foreign=True)


def test_size_and_kind_are_looked_at_before_anything_is_read(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with open(large, "wb") as file:
        file.truncate(2**40)  # sparse: reading it would take a terabyte
    for path, words in (
        (large, "more than 1000 bytes"),
        (tmp_path, "Is a directory"),
        (Path("/dev/zero"), "is a device"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(WorkError, match=words):
            read_document(path, "remedy", limit=1000, error=WorkError)
    os.mkfifo(tmp_path / "pipe")  # nobody will ever write into it
    assert found_object(tmp_path / "pipe") is None


def test_an_object_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[]")
    with pytest.raises(UserError, match="holds a list, not a JSON object; write one"):
        read_object(path, "write one")
    path.write_text('{"a": 1}')
    assert read_object(path, "write one") == found_object(path) == {"a": 1}
