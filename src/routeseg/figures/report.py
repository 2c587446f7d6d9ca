"""A report as one HTML file that needs nothing else: no network, no scripts, images inside.

`Report` gathers headings, text, tables and images in the order given; `write` puts them on a page that
reads well on a screen (light or dark), on a phone and on paper.
"""

from __future__ import annotations

import base64
import numbers
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from routeseg.files import write_atomically

Picture = str | Path | bytes

_NUMBER = re.compile(r"[<>~≈±+\-−]?\s?\d[\d,. ]*(e[+-]?\d+)?(\s?±\s?[\d.]+)?\s?(%|[A-Za-zµ]{1,5}|x|×)?", re.IGNORECASE)
_EMPTY = ("", "-", "–", "—", "nan", "n/a", "absent")  # cells that say there is no number


class Report:
    """Builds the page step by step. All text is taken as text: nothing in it is read as HTML."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._cards: list[str] = []
        self._body: list[str] = []

    def key_numbers(self, items: Sequence[tuple[str, str]]) -> None:
        """Cards at the top of the page, wherever this is called: (value, label) each."""
        for value, label in items:
            self._cards.append(f"<div><dd>{escape(str(value))}</dd><dt>{escape(str(label))}</dt></div>")

    def heading(self, text: str) -> None:
        """Start a section."""
        self._body.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """A paragraph; an empty line in `text` starts another."""
        for part in re.split(r"\n\s*\n", text.strip()):
            self._body.append(f"<p>{escape(part)}</p>")

    def code(self, text: str) -> None:
        """Commands or settings, set in a fixed-width font, line breaks kept."""
        self._body.append(f"<pre><code>{escape(text.strip(chr(10)))}</code></pre>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; columns of numbers stand on the right.

        Whole numbers get thousands separators and other numbers four digits; give text to write them
        otherwise. Raises ValueError if a row is not as long as the header.
        """
        for number, row in enumerate(rows):
            if len(row) != len(header):
                raise ValueError(f"row {number} has {len(row)} cells, the header {len(header)}: give one per column")
        cells = [[_cell(value) for value in row] for row in rows]
        right = [_is_numeric([row[column] for row in cells]) for column in range(len(header))]

        def line(tag: str, values: Sequence[str]) -> str:
            marks = (' class="n"' if numeric else "" for numeric in right)
            inner = (f"<{tag}{mark}>{escape(v)}</{tag}>" for mark, v in zip(marks, values, strict=True))
            return f"<tr>{''.join(inner)}</tr>"

        head = line("th", [str(name) for name in header])
        body = "\n".join(line("td", row) for row in cells)
        self._body.append(
            f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
        )

    def figure(self, picture: Picture, caption: str) -> None:
        """An image over the full width, with a caption: a PNG, JPEG or SVG file, or its bytes.

        Raises ValueError if the file is missing or is no such image.
        """
        self._body.append(_figure(picture, caption))

    def gallery(self, pictures: Sequence[tuple[Picture, str]]) -> None:
        """(image, caption) pairs, as many side by side as fit. Raises ValueError as `figure` does."""
        inner = "\n".join(_figure(picture, caption) for picture, caption in pictures)
        self._body.append(f'<div class="gallery">\n{inner}\n</div>')

    def legend(self, entries: Sequence[tuple[str, Sequence[int]]]) -> None:
        """What colours mean: (name, RGB 0..255) each, side by side."""
        marks = "\n".join(
            f'<li><i style="background:#{bytes(map(int, colour)).hex()}"></i>{escape(str(name))}</li>'
            for name, colour in entries
        )
        self._body.append(f'<ul class="legend">\n{marks}\n</ul>')

    def write(self, path: str | Path) -> None:
        """Write the page, whole or not at all."""
        cards = f"<dl>\n{chr(10).join(self._cards)}\n</dl>\n" if self._cards else ""
        subtitle = f'<p class="subtitle">{escape(self.subtitle)}</p>\n' if self.subtitle else ""
        page = _PAGE.format(
            title=escape(self.title), style=_STYLE, subtitle=subtitle, cards=cards, body="\n".join(self._body)
        )
        write_atomically(path, page.encode("utf-8"))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return f"{int(value):,}"
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        value = float(value)
        if value != value:
            return "–"
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def _is_numeric(cells: Sequence[str]) -> bool:
    said = [cell.strip() for cell in cells if cell.strip().lower() not in _EMPTY]
    return bool(said) and all(_NUMBER.fullmatch(cell) for cell in said)


def _figure(picture: Picture, caption: str) -> str:
    text = escape(caption)
    note = f"<figcaption>{text}</figcaption>" if caption else ""
    return f'<figure><img src="{_data_uri(picture)}" alt="{text}">{note}</figure>'


def _data_uri(picture: Picture) -> str:
    if isinstance(picture, bytes):
        name, data = "the image", picture
    else:
        name = str(picture)
        try:
            data = Path(picture).read_bytes()
        except OSError as error:
            raise ValueError(f"{name}: cannot be read ({error.strerror}). Draw the image before the report") from error
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        kind = "png"
    elif data.startswith(b"\xff\xd8\xff"):
        kind = "jpeg"
    elif b"<svg" in data[:2000]:
        kind = "svg+xml"
    else:
        raise ValueError(f"{name}: is no PNG, JPEG or SVG image. Save it as one of these")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


# The policy makes the promise checkable: the browser itself refuses scripts and anything from outside.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
{subtitle}</header>
{cards}{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --ink: #1d2530; --muted: #5d6672; --line: #dde1e6; --soft: #f4f6f8; --page: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ed; --muted: #9aa4b0; --line: #343c46; --soft: #20262e; --page: #161a20; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -0.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.6rem 0 0.8rem; padding-top: 1.1rem;
  letter-spacing: -0.01em;
  border-top: 1px solid var(--line); overflow-wrap: anywhere; }
p { max-width: 46rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
.subtitle { color: var(--muted); font-size: 1.08rem; margin: 0.45rem 0 0; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.8rem;
  margin: 1.8rem 0; }
dl > div { display: flex; flex-direction: column; padding: 0.85rem 1rem; background: var(--soft);
  border: 1px solid var(--line); border-radius: 10px; }
dd { margin: 0; font-size: 1.5rem; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums;
  letter-spacing: -0.01em; overflow-wrap: anywhere; }
dt { color: var(--muted); font-size: 0.85rem; line-height: 1.35; margin-top: 0.15rem; }
.wide { overflow-x: auto; margin: 1rem 0 1.6rem; }
table { border-collapse: collapse; min-width: 50%; font-size: 0.94rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.42rem 0.95rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td:not(.n) { min-width: 6.5rem; }
th:first-child, td:first-child { padding-left: 0.35rem; }
thead th { font-size: 0.85rem; font-weight: 600; color: var(--muted); vertical-align: bottom;
  border-bottom: 2px solid var(--line); }
tbody tr:hover { background: var(--soft); }
.n { text-align: right; white-space: nowrap; }
figure { margin: 1.2rem 0 1.8rem; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #ffffff; border-radius: 8px;
  border: 1px solid var(--line); }
figcaption { color: var(--muted); font-size: 0.9rem; line-height: 1.45; margin: 0.55rem auto 0;
  max-width: 46rem;
  text-align: center; overflow-wrap: anywhere; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
  gap: 1.2rem;
  align-items: start; margin: 1.2rem 0 1.8rem; }
.gallery figure { margin: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1.3rem; list-style: none; margin: 0.8rem 0 1.2rem; padding: 0;
  font-size: 0.92rem; }
.legend li { overflow-wrap: anywhere; }
.legend i { display: inline-block; width: 1rem; height: 1rem; margin-right: 0.45rem; border-radius: 4px;
  vertical-align: -0.14rem; border: 1px solid var(--muted); }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: 0.85rem 1rem;
  overflow-x: auto;
  font: 0.86rem/1.55 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font: inherit; }
@media print {
  :root { --ink: #000000; --muted: #444444; --line: #bbbbbb; --soft: #ffffff; --page: #ffffff; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; }
  figure, tr, dl > div { break-inside: avoid; }
  pre { white-space: pre-wrap; }
}
"""
