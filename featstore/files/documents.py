"""Reads JSON and TOML that may come from anybody: bounded, strict, and refused in one line.

`json` and `tomllib` alone raise RecursionError for deep nesting, take NaN, halves of characters and
a name given twice, and read a file of any size.
"""

from __future__ import annotations

import json
import os
import stat
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, Final

from featstore.errors import UserError, WorkError, one_line, quoted

LISTS_LIMIT: Final = 2**30
"""The most bytes of a file that lists videos; Kinetics-700's 650,000 in plan.json are 0.13 GB."""
SETTINGS_LIMIT: Final = 16 * 2**20
"""The most bytes of a file of settings or results; those with 700 class names are under 0.2 MB."""
RECIPE_LIMIT: Final = 2**18
"""The most bytes of TOML, which is parsed slowly; a recipe has under 4 KB."""
# The deepest file of mote, a zarr.json of a sharded array, has 11 levels. What is nested this deep
# can still be walked, written and shown by functions that call themselves.
DEEPEST: Final = 32


def _not_finite(name: str) -> float:
    raise ValueError(f"it holds {name[:20]}, which is no finite number")


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) != float("inf") else _not_finite(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it has {quoted(twice, 60)} twice in one object")
    return value


# `json.loads` makes a new decoder for options, which would double the time of a short text.
_STRICT: Final = json.JSONDecoder(
    parse_constant=_not_finite, parse_float=_finite, object_pairs_hook=_once
)
_FOREIGN: Final = json.JSONDecoder(object_pairs_hook=_once)


def parse_json(raw: bytes | str, *, foreign: bool = False) -> Any:
    """Return the value of a JSON text in UTF-8; ValueError, in one line, if it is no such text.

    Refused are more than `DEEPEST` levels, a name that an object has twice, and numbers and letters
    that could not be written again: NaN, infinity, half a character. Such numbers and letters are
    taken from a `foreign` text, which programs write that are less strict.
    """
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8-sig")
        value = (_FOREIGN if foreign else _STRICT).decode(text)
    except (ValueError, RecursionError) as error:
        raise _refusal(error) from None
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):
        raise _too_deep()
    if not foreign and "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"it holds half a character (position {error.start})") from error
    return value


def parse_toml(raw: bytes) -> dict[str, Any]:
    """Return the tables of a TOML text in UTF-8; ValueError, in one line, if it is no such text."""
    try:
        tables = tomllib.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _refusal(error) from None
    if _is_deep(tables):
        raise _too_deep()
    return tables


def read_json(
    path: Path,
    remedy: str,
    *,
    limit: int = SETTINGS_LIMIT,
    error: type[UserError | WorkError] = UserError,
    foreign: bool = False,
) -> Any:
    """Read the JSON file at `path`, of at most `limit` bytes; see `parse_json` for `foreign`.

    What is wrong is raised as `error`, in one line that ends with `remedy`.
    """
    raw = read_document(path, remedy, limit=limit, error=error)
    try:
        return parse_json(raw, foreign=foreign)
    except ValueError as reason:
        raise error(
            f"{path} is not JSON that mote reads ({one_line(reason, 160)}); {remedy}"
        ) from None


def read_object(
    path: Path,
    remedy: str,
    *,
    limit: int = SETTINGS_LIMIT,
    error: type[UserError | WorkError] = UserError,
) -> dict[str, Any]:
    """Read a JSON file that holds an object; `error` for any other, as `read_json` raises it."""
    value = read_json(path, remedy, limit=limit, error=error)
    if not isinstance(value, dict):
        raise error(f"{path} holds a {type(value).__name__}, not a JSON object; {remedy}")
    return value


def found_object(path: Path, limit: int = SETTINGS_LIMIT) -> dict[str, Any] | None:
    """Read a note that may be missing or unusable; None unless the file holds a JSON object."""
    try:
        return read_object(path, "", limit=limit)
    except UserError:
        return None


def read_toml(path: Path, remedy: str) -> dict[str, Any]:
    """Read the TOML file at `path`; UserError, in one line that ends with `remedy`."""
    raw = read_document(path, remedy, limit=RECIPE_LIMIT)
    try:
        return parse_toml(raw)
    except ValueError as reason:
        raise UserError(
            f"{path} is not TOML that mote reads ({one_line(reason, 160)}); {remedy}"
        ) from None


def read_document(
    path: Path,
    remedy: str,
    *,
    limit: int = SETTINGS_LIMIT,
    error: type[UserError | WorkError] = UserError,
) -> bytes:
    """Return the bytes of a file of at most `limit` bytes; otherwise `error` with `remedy`.

    A pipe is waited for only where it has a writer, and a device is refused: it never ends.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            os.set_blocking(descriptor, True)
            if stat.S_ISCHR(found.st_mode):
                raise error(f"{path} is a device, not a file; {remedy}")
            raw = b"" if found.st_size > limit else file.read(limit + 1)
            if max(found.st_size, len(raw)) > limit:
                raise error(f"{path} has more than {limit} bytes, too many for its kind; {remedy}")
            return raw
    except OSError as reason:
        raise error(f"{path} cannot be read ({reason.strerror}); {remedy}") from None


def _is_deep(value: Any) -> bool:
    """Return whether lists and objects are nested more than `DEEPEST` levels."""
    inner = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        held = (v.values() if isinstance(v, dict) else v for v in inner)
        inner = [item for items in held for item in items if isinstance(item, dict | list)]
        if not inner:
            return False
    return True


def _refusal(error: ValueError | RecursionError) -> ValueError:
    if isinstance(error, RecursionError):
        return _too_deep()
    if isinstance(error, UnicodeDecodeError):
        return ValueError(f"it is not UTF-8 text (byte {error.start})")
    if "set_int_max_str_digits" in str(error):  # advice for programmers
        return ValueError("it holds a number of thousands of digits")
    return error


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {DEEPEST} levels deep")
