"""Heat maps of numbers between 0 and 1, as SVG text for pages and as a picture for files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image, ImageDraw, ImageFont

from picture3d.view.colors import ramp_colors

_UNKNOWN = "–"


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A table of shares with names; a number that is not finite is one that is not known."""

    title: str
    values: tuple[tuple[float, ...], ...]  # row by row, the first row is drawn at the bottom: depth grows upwards
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_label: str = ""
    column_label: str = ""

    def __post_init__(self) -> None:
        if len(self.values) != len(self.rows) or any(len(row) != len(self.columns) for row in self.values):
            raise ValueError(f"{self.title}: values are not {len(self.rows)} rows of {len(self.columns)}")


def heat_map_svg(heat: HeatMap, *, cell: int = 44) -> str:
    """The map as an ``<svg>`` that scales with its box; every cell carries its number. Text takes the page's colour."""
    left, bottom = 74, 52
    width, height = left + cell * len(heat.columns) + 8, cell * len(heat.rows) + bottom + 6
    font = "font-family:inherit;font-size:12.5px"
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'style="max-width:100%;height:auto;{font}" xmlns="http://www.w3.org/2000/svg"><title>{escape(heat.title)}</title>'
    ]
    for i, (name, row) in enumerate(zip(heat.rows, heat.values, strict=True)):
        y = 6 + cell * (len(heat.rows) - 1 - i)
        parts.append(_text(left - 7, y + cell / 2 + 4, name, "end"))
        for j, value in enumerate(row):
            fill, ink = _cell_colors(value)
            x = left + cell * j
            parts.append(f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" fill="{fill}"/>')
            parts.append(_text(x + (cell - 1) / 2, y + cell / 2 + 4, _number(value), "middle", ink))
    base = 6 + cell * len(heat.rows)
    for j, name in enumerate(heat.columns):
        parts.append(_text(left + cell * j + cell / 2, base + 15, name, "middle"))
    parts.append(_text(left + cell * len(heat.columns) / 2, base + 38, heat.column_label, "middle"))
    middle = 6 + cell * len(heat.rows) / 2
    parts.append(
        f'<text x="14" y="{middle:g}" text-anchor="middle" fill="currentColor" transform="rotate(-90 14 {middle:g})">'
        f"{escape(heat.row_label)}</text></svg>"
    )
    return "".join(parts)


def heat_map_picture(heat: HeatMap, *, cell: int = 64) -> Image.Image:
    """The same on white, for a PNG file."""
    font, small = ImageFont.load_default(cell * 0.3), ImageFont.load_default(cell * 0.27)
    left, top, bottom = int(2.1 * cell), int(0.9 * cell), int(1.5 * cell)
    width = max(left + cell * len(heat.columns) + cell // 2, int(font.getlength(heat.title)) + cell)
    image = Image.new("RGB", (width, top + cell * len(heat.rows) + bottom), "white")
    draw = ImageDraw.Draw(image)
    draw.text((cell // 2, top // 2), heat.title, fill="black", font=font, anchor="lm")
    base = top + cell * len(heat.rows)
    for i, (name, row) in enumerate(zip(heat.rows, heat.values, strict=True)):
        y = base - cell * (i + 1)
        draw.text((left - cell // 6, y + cell // 2), name, fill="black", font=small, anchor="rm")
        for j, value in enumerate(row):
            fill, ink = _cell_colors(value)
            x = left + cell * j
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=fill)
            draw.text((x + cell // 2, y + cell // 2), _number(value), fill=ink, font=small, anchor="mm")
    for j, name in enumerate(heat.columns):
        draw.text((left + cell * j + cell // 2, base + cell // 3), name, fill="black", font=small, anchor="mm")
    draw.text((left + cell * len(heat.columns) // 2, base + cell), heat.column_label, fill="black", font=font, anchor="mm")
    room = int(font.getlength(heat.row_label)) + 4
    side = Image.new("RGB", (room, int(cell * 0.5)), "white")
    ImageDraw.Draw(side).text((room // 2, side.height // 2), heat.row_label, fill="black", font=font, anchor="mm")
    side = side.rotate(90, expand=True)
    image.paste(side, (cell // 5, max(0, top + cell * len(heat.rows) // 2 - side.height // 2)))
    return image


def _cell_colors(value: float) -> tuple[str, str]:
    """Fill and ink of a cell: black on bright, white on dark."""
    fill = ramp_colors([value], limits=(0.0, 1.0))[0]
    bright = float(fill @ [0.299, 0.587, 0.114]) > 130
    return "#{:02x}{:02x}{:02x}".format(*fill), "#10161e" if bright else "#ffffff"


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else _UNKNOWN


def _text(x: float, y: float, text: str, anchor: str, color: str = "currentColor") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'


def _known(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else float(value) for value in values)


def heat_map_of(title: str, values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str]) -> HeatMap:
    """The map of a table from JSON, where what is not known is null; rows belong to one network, columns to another."""
    return HeatMap(title, tuple(_known(row) for row in values), tuple(rows), tuple(columns))
