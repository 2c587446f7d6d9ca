"""Words in images: class names and file names may have any letters, and no font has them all.

What DejaVu lacks (Chinese, say) is drawn in the first installed font that has all letters of a text. If there is none,
these letters are written as their codes, such as \\u8f66: no boxes, and two names that differ stay different.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ImageFont

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS = "…"
FONT_SUFFIXES = (".ttf", ".otf", ".ttc")


def drawable(text: str) -> tuple[str, Path | None]:
    """The text as it can be drawn, and the file of the font for it; None: the usual one."""
    text = unicodedata.normalize("NFC", text.encode("utf-8", "backslashreplace").decode())  # names may be no UTF-8
    if text.isascii():
        return text, None
    wanted = {ord(letter) for letter in text + DOTS if not letter.isspace()}
    missing = wanted - letters_of(_usual_font())
    if not missing:
        return text, None
    for path in installed_fonts():
        if wanted <= letters_of(path):
            return text, path
    codes = {code: chr(code).encode("ascii", "backslashreplace").decode() for code in missing}
    return text.translate(codes), None


@cache
def letters_of(font: Path) -> frozenset[int]:
    """The code points that a font file has; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(str(font)).get_charmap())
    except Exception:  # a damaged file, or a kind of font that FreeType cannot draw
        return frozenset()


@cache
def installed_fonts() -> tuple[Path, ...]:
    """Files of fonts, those of upright letters of usual weight first; without fonts of coloured images."""
    from matplotlib.font_manager import findSystemFonts

    paths = [Path(name) for name in findSystemFonts() if Path(name).suffix.lower() in FONT_SUFFIXES]
    special = ("bold", "black", "heavy", "light", "thin", "italic", "oblique", "mono", "serif")

    def order(path: Path) -> tuple[int, str]:
        return sum(word in path.name.lower() for word in special), path.name

    return tuple(sorted((path for path in paths if "emoji" not in path.name.lower()), key=order))


@cache
def _usual_font(bold: bool = False) -> Path:
    import matplotlib  # its fonts are at hand everywhere

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return Path(matplotlib.get_data_path(), "fonts", "ttf", name)


@cache
def text_font(size: int, bold: bool = False, path: Path | None = None) -> ImageFont.FreeTypeFont:
    """The usual font, or that of a file, with letters of so many pixels."""
    return ImageFont.truetype(str(path or _usual_font(bold)), size)


def cut(text: str, most: int) -> str:
    """The text, or so many letters from both of its ends: names that differ at the end stay different."""
    return text if len(text) <= most else text[: most // 2] + DOTS + text[len(text) - (most - 1) // 2 :]


def fitted(text: str, size: int, room: float, bold: bool = False) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text on one line that is no longer than `room` pixels, and the font to draw it in."""
    text, path = drawable(" ".join(str(text).split()))
    font, most = text_font(size, bold, path), len(text)
    while most > 1 and font.getlength(cut(text, most)) > room:
        most -= 1
    return cut(text, most), font


def make_drawable(figure: Figure) -> None:
    """Gives every text of a figure the letters and the font that `drawable` says. Words beside ticks only get the font,
    for matplotlib writes them anew: give them as `drawable` says."""
    from matplotlib.text import Text

    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_ticklabels()  # makes those that do not exist yet
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        words, path = drawable(text.get_text())
        if words != text.get_text():
            text.set_text(words)
        if path is not None:
            font = text.get_fontproperties().copy()
            font.set_file(str(path))
            text.set_fontproperties(font)
