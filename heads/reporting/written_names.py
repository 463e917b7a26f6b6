"""Class names as pictures write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.textpath import text_to_path

from featstore.errors import safe_text

POINTS: Final = 7.0
"""The size of the letters."""
_LETTERS: Final = 36  # of a class name; longer ones are cut


class WrittenNames:
    """Class names as the picture writes them: cut, without what a font cannot write.

    `texts` are the names, `families` the fonts that are needed for them, `width` is that of the
    longest in inches, and `numbered` the number of names that were replaced by "#" and the class's
    number.
    """

    def __init__(self, names: Sequence[str], labels: Sequence[int]) -> None:
        cut = [" ".join(safe_text(name).split()) for name in names]
        cut = [name if len(name) <= _LETTERS else name[: _LETTERS - 1] + "…" for name in cut]
        usual = findfont(FontProperties())
        self.families = [FontProperties().get_family()[0]]
        lacking = set("".join(cut)) - _letters(usual)
        for font in sorted(fontManager.ttflist, key=lambda font: (font.style, font.weight != 400)):
            if not lacking:
                break
            if known := lacking & _letters(font.fname, font.name):
                lacking -= known
                self.families.append(font.name)
        self.texts = [
            f"#{label}" if lacking.intersection(name) else name
            for name, label in zip(cut, labels, strict=True)
        ]
        self.numbered = sum(bool(lacking.intersection(name)) for name in cut)
        written = FontProperties(family=self.families, size=POINTS)
        measure = text_to_path.get_text_width_height_descent
        self.width = max((measure(t, written, False)[0] for t in self.texts), default=0.0) / 72

    @property
    def words(self) -> str:
        """What the numbers stand for, for people."""
        return f"#: {self.numbered} names that no font here can write, see per-class.csv"


def _letters(file: str, name: str = "") -> set[str]:
    """Return the characters that a font file can write; none if it cannot be read."""
    if name.startswith("Last Resort"):  # boxes for every letter there is; part of matplotlib
        return set()
    try:
        return {chr(code) for code in FT2Font(file).get_charmap()}
    except (OSError, RuntimeError):  # bitmaps, for example coloured emoji
        return set()
