"""The rooms of the code and the arrows between them, as docs/rooms.md tells them and as they are.

A room is a folder, or a file that lies directly in a package. A folder inside a room belongs to
it, unless the page lists that folder on its own.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "featstore", "heads", "cli")
PAGE = ROOT / "docs" / "rooms.md"
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def dotted(path: Path) -> str:
    """The name that a file is imported by; `__init__` is its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {dotted(path) for path in MODULES}


def imported_modules(path: Path) -> set[str]:
    """Dotted names of everything a module imports, inside functions as well.

    Of `from a import b` it is `a.b` where that is a module of ours, else `a`.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively: write the package's name"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & NAMES
            names |= inner or {str(node.module)}
    return names


def table(page: str) -> dict[str, set[str]]:
    """Room -> the rooms it may import, from the rows ``| `room` | what | `a` `b` |``."""
    rows = re.findall(r"^\| `([\w.]+)` \|.*\|([^|]*)\|$", page, re.MULTILINE)
    return {room: set(re.findall(r"`([\w.]+)`", allowed)) for room, allowed in rows}


def room_of(name: str, rooms: set[str]) -> str:
    """The room of a module: the nearest listed name that holds it."""
    while name not in rooms and "." in name:
        name = name.rpartition(".")[0]
    return name


def arrows(rooms: set[str]) -> dict[str, set[str]]:
    """Room -> the rooms it imports, read from all modules."""
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for path in MODULES:
        room = room_of(dotted(path), rooms)
        ours = {name for name in imported_modules(path) if name.partition(".")[0] in PACKAGES}
        found.setdefault(room, set()).update(room_of(name, rooms) for name in ours)
        found[room].discard(room)
    return found


def written_anew(page: str) -> str:
    """The page with the last column of every row as the code has it, in the order of the rows."""
    order = list(table(page))
    found = arrows(set(order))

    def row(match: re.Match[str]) -> str:
        names = sorted(found.get(match[2], ()), key=order.index)
        return f"{match[1]} {' '.join(f'`{name}`' for name in names)} |"

    return re.sub(r"^(\| `([\w.]+)` \|.*\|)[^|]*\|$", row, page, flags=re.MULTILINE)


if __name__ == "__main__":
    PAGE.write_text(written_anew(PAGE.read_text()))
