"""The two kinds of error every package raises on purpose; `cli` turns them into exit codes.

They live in `featstore` because it is the package all others may import.
"""

from __future__ import annotations


class UserError(ValueError):
    """The input is wrong and the user can correct it (exit code 2).

    The message is one line: the value, the rule it breaks, the remedy.
    """


class WorkError(RuntimeError):
    """The work failed or a check found damage (exit code 1).

    The message is one line: what failed, where, what to do next.
    """


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """`error` as one line of at most `limit` characters, for a table, a log or a store."""
    text = " ".join(str(error).split())
    if not text and isinstance(error, BaseException):
        text = type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
