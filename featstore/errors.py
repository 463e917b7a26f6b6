"""The two kinds of error every package raises on purpose; `cli` turns them into exit codes.

They live in `featstore` because it is the package all others may import.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

# What a terminal, page or spreadsheet would obey or hide instead of showing it: controls, escape
# sequences, marks of writing direction, line separators, invisible tags, halves of characters.
# The joiners U+200C and U+200D stay: Persian, Hindi and emoji are written with them.
_UNSEEN: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


class UserError(ValueError):
    """The input is wrong and the user can correct it (exit code 2).

    The message is one line: the value, the rule it breaks, the remedy.
    """


class WorkError(RuntimeError):
    """The work failed or a check found damage (exit code 1).

    The message is one line: what failed, where, what to do next.
    """


def safe_text(text: str) -> str:
    """Write control characters, direction marks and lone surrogates as \\xNN, \\uNNNN, \\UNNNNNNNN.

    Everything that is printed, or written into a page or table, goes through this. Text without
    such characters is returned as it is.
    """
    return _UNSEEN.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """`error` as one safe line of at most `limit` characters, for a table, a log or a store."""
    text = safe_text(" ".join(str(error).split()))
    if not text and isinstance(error, BaseException):
        text = type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def quoted(text: str, limit: int = 80) -> str:
    """`one_line` of a name or a line in quotes; `repr` of it would escape its escapes."""
    line = one_line(text, limit)
    mark = '"' if "'" in line and '"' not in line else "'"
    return f"{mark}{line}{mark}"


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with the words that agree with it: "1 view", "2 views".

    `many` is what follows every other number than 1; without it `one` gets an "s". A verb goes
    along: `counted(n, "class has", "classes have")`.
    """
    return f"{number} {one if number == 1 else many or one + 's'}"


def counted_of(number: int, total: int, noun: str, one: str = "is", many: str = "are") -> str:
    """Return a part of a whole with a verb that agrees: "1 of 5 videos is", "2 of 5 videos are"."""
    return f"{number} of {counted(total, noun)} {one if number == 1 else many}"


def meant(name: object, known: Iterable[object], also: Mapping[str, str] | None = None) -> str:
    """Return "did you mean B? " for a name of `known` that is near `name`, or "" without one.

    It stands before the choices in a message. `also` has names, in lower case, under which other
    programs know one of `known`; such a name counts as the one that was meant. A name of `known`
    itself has no other that was meant.
    """
    from difflib import get_close_matches  # only an error needs these
    from shlex import quote

    given = str(name).strip().lower()
    forms = {str(one).lower(): str(one) for one in known}
    if also and given in also:
        near = [also[given]]
    elif str(name) in forms.values():
        near = []
    else:
        # A part of a longer name counts as near, which its share of letters alone would not tell.
        held = [form for form in forms if len(given) > 2 and given in form]
        near = [forms[form] for form in get_close_matches(given, forms, n=3) or held[:3]]
    return f"did you mean {' or '.join(map(quote, near))}? " if near else ""


def one_of(name: object, known: Iterable[object], also: Mapping[str, str] | None = None) -> str:
    """Return the end of a message about an unknown `name`: what was meant, and all choices."""
    choices = [str(one) for one in known]
    listed = f"choose one of {', '.join(choices)}" if choices else "there is none to choose"
    return meant(name, choices, also) + listed
