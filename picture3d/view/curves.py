"""Charts as SVG text: curves over steps, bars, dots on a scale. Numbers in, markup out; no script, no style sheet needed.

Colours are CSS colours or ``var(--name)``; text and axes take ``currentColor`` of the page and so follow its colour scheme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import ArrayLike, NDArray

_FONT = "font-family:inherit;font-size:12.5px"
_SMOOTH_FROM = 60  # curves with more points also get a running mean


def line_chart(
    lines: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    colors: Mapping[str, str],
    title: str,
    x_label: str = "step",
    log: bool = False,
    log_x: bool = False,
    whiskers: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]] | None = None,
    size: tuple[int, int] = (340, 220),
) -> str:
    """Curves of several runs over one pair of axes, as an ``<svg>`` that scales with its box.

    Args:
        lines: run to (x, y); points whose y is not finite, or not positive on a logarithmic axis, are left out.
        colors: run to CSS colour.
        title: read aloud by screen readers and shown by browsers on hovering.
        x_label: below the axis.
        log: logarithmic y axis.
        log_x: logarithmic x axis, with a tick at every x that occurs; all x must be above 0.
        whiskers: run to (x, low, high): a bar from low to high at each x; bars whose ends are not finite are left out.
        size: of the drawing's own units.

    Returns:
        "" if no curve has a point to draw.
    """
    curves = {name: _drawable(x, y, log) for name, (x, y) in lines.items()}
    curves = {name: curve for name, curve in curves.items() if len(curve[0])}
    if not curves:
        return ""
    width, height = size
    left, right, top, bottom = 48, 10, 8, 38
    bars = {name: _finite(*ends) for name, ends in (whiskers or {}).items() if name in curves}
    every_x = np.unique(np.concatenate([c[0] for c in curves.values()]))
    x_limits = every_x[0], every_x[-1]
    ys = np.concatenate([*(c[1] for c in curves.values()), *(end for _, *ends in bars.values() for end in ends)])
    y_ticks = _log_ticks(ys.min(), ys.max()) if log else nice_ticks(_low_end(ys), float(_high_end(ys)), 4)
    y_limits = (min(y_ticks[0], ys.min()), max(y_ticks[-1], ys.max())) if log else (y_ticks[0], y_ticks[-1])
    x_ticks = [t for t in nice_ticks(*x_limits, 4) if x_limits[0] <= t <= x_limits[1] and t == round(t)] or [x_limits[0]]
    if log_x:
        x_ticks = every_x.tolist()
    inset = 14 if whiskers else 0  # room for the outer bars

    def place_x(value: ArrayLike) -> NDArray[np.float64]:
        value, (low, high) = np.asarray(value, float), x_limits
        if log_x:
            value, low, high = np.log10(value), math.log10(low), math.log10(high)
        return left + inset + (value - low) / ((high - low) or 1) * (width - left - right - 2 * inset)

    def place_y(value: ArrayLike) -> NDArray[np.float64]:
        value, low, high = np.asarray(value, float), *y_limits
        if log:
            value, low, high = np.log10(value), math.log10(low), math.log10(high)
        return height - bottom - (np.clip(value, low, high) - low) / ((high - low) or 1) * (height - top - bottom)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" style="{_FONT}"><title>{escape(title)}</title>']
    for tick in y_ticks:
        y = _number(place_y(tick))
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" stroke="currentColor" stroke-opacity=".13"/>'
            f'<text x="{left - 8}" y="{y}" dy=".34em" text-anchor="end" fill="currentColor" fill-opacity=".72">'
            f"{tick_label(tick)}</text>"
        )
    base = height - bottom
    for tick in x_ticks:
        x = _number(place_x(tick))
        parts.append(
            f'<line x1="{x}" x2="{x}" y1="{base}" y2="{base + 4}" stroke="currentColor" stroke-opacity=".4"/>'
            f'<text x="{x}" y="{base + 17}" text-anchor="middle" fill="currentColor" fill-opacity=".72">'
            f"{tick_label(tick)}</text>"
        )
    parts.append(
        f'<line x1="{left}" x2="{width - right}" y1="{base}" y2="{base}" stroke="currentColor" stroke-opacity=".4"/>'
        f'<text x="{width - right}" y="{height - 4}" text-anchor="end" fill="currentColor" fill-opacity=".72">'
        f"{escape(x_label)}</text>"
    )
    for name, (x, y) in curves.items():
        color = escape(colors.get(name, "currentColor"), quote=True)
        smooth = running_mean(y, max(3, len(y) // 25)) if len(y) > _SMOOTH_FROM else None
        if smooth is not None:
            parts.append(_path(place_x(x), place_y(y), color, 1.0, 0.28))
        parts.append(_path(place_x(x), place_y(y if smooth is None else smooth), color, 2.0, 1.0))
    for number, (name, (x, low, high)) in enumerate(bars.items()):
        # Side by side, so that none hides another.
        beside = 5.0 * (number - (len(bars) - 1) / 2)
        color = escape(colors.get(name, "currentColor"), quote=True)
        for at, a, b in zip(place_x(x) + beside, place_y(low), place_y(high), strict=True):
            parts.append(
                f'<path d="M{_number(at - 2)},{_number(a)}h4m-2,0V{_number(b)}m-2,0h4" fill="none" stroke="{color}" '
                'stroke-width="1.5"/>'
            )
    return "".join(parts) + "</svg>"


def spans_decades(lines: Mapping[str, tuple[ArrayLike, ArrayLike]], ratio: float = 10.0) -> bool:
    """Whether curves stay above 0 and change by more than `ratio`: on an even axis most of them would lie on the floor."""
    values = np.concatenate([np.zeros(0), *(np.asarray(y, np.float64).ravel() for _, y in lines.values())])
    values = values[np.isfinite(values)]
    return len(values) > 0 and values.min() > 0 and bool(values.max() > ratio * values.min())


def bar(share: float | None, color: str) -> str:
    """A horizontal bar that fills `share` (0..1) of its box; an empty track where there is no number."""
    track = '<rect width="100%" height="100%" rx="3" fill="currentColor" fill-opacity=".08"/>'
    if share is None or not math.isfinite(share):
        return f'<svg class="bar" aria-hidden="true">{track}</svg>'
    wide = _number(100 * min(max(share, 0.0), 1.0))
    return (
        f'<svg class="bar" aria-hidden="true">{track}'
        f'<rect width="{wide}%" height="100%" rx="3" fill="{escape(color, quote=True)}"/></svg>'
    )


def dots(values: Sequence[tuple[float | None, str]], *, limit: float = 1.0) -> str:
    """Values on a common scale from 0 to `limit`, joined from the least to the greatest; what has no number is left out."""
    known = [(100 * min(max(v / limit, 0.0), 1.0), color) for v, color in values if v is not None and math.isfinite(v)]
    parts = ['<svg class="dots" aria-hidden="true">']
    parts += [
        f'<line x1="{x}%" x2="{x}%" y1="0" y2="100%" stroke="currentColor" stroke-opacity=".1"/>' for x in (0, 25, 50, 75, 100)
    ]
    if known:
        low, high = _number(min(x for x, _ in known)), _number(max(x for x, _ in known))
        parts.append(
            f'<line x1="{low}%" x2="{high}%" y1="50%" y2="50%" stroke="currentColor" stroke-opacity=".35" stroke-width="2"/>'
        )
        parts += [f'<circle cx="{_number(x)}%" cy="50%" r="4.5" fill="{escape(c, quote=True)}"/>' for x, c in known]
    return "".join(parts) + "</svg>"


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) from at most `low` to at least `high`."""
    if not high > low:
        pad = abs(low) * 0.5 or 1.0
        low, high = low - (pad if low != 0 else 0), high + pad
    raw = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_label(value: float) -> str:
    """A number as short as an axis wants it: 0.05, 12, 3k, 2M, 1e-5."""
    size = abs(value)
    if size != 0 and size < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:.6g}"


def running_mean(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Mean over up to `reach` values before and after; windows are cut at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _drawable(x: ArrayLike, y: ArrayLike, log: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    good = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not log))
    return x[good], y[good]


def _finite(x: ArrayLike, low: ArrayLike, high: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    columns = [np.asarray(column, np.float64) for column in (x, low, high)]
    good = np.isfinite(columns[0]) & np.isfinite(columns[1]) & np.isfinite(columns[2])
    return tuple(column[good] for column in columns)


def _low_end(values: NDArray[np.float64]) -> float:
    """The axis begins at 0 unless everything happens far above it."""
    low, high = float(values.min()), float(values.max())
    return low if low < 0 or low > 0.6 * high else 0.0


def _high_end(values: NDArray[np.float64]) -> float:
    """The first few values of a loss may not squeeze the rest: past three times the 95th percentile they leave the picture."""
    high, usual = float(values.max()), float(np.percentile(values, 95))
    return min(high, 3 * usual) if usual > 0 else high


def _log_ticks(low: float, high: float) -> list[float]:
    for marks in ((1,), (1, 3), (1, 2, 5)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [round(m * 10.0**p, 15) for p in powers for m in marks]
        below = [t for t in ticks if t <= low * 1.0001] or [ticks[0]]
        above = [t for t in ticks if t >= high * 0.9999] or [ticks[-1]]
        kept = [t for t in ticks if below[-1] <= t <= above[0]]
        if len(kept) >= 4:
            break
    return kept


def _path(x: NDArray[np.float64], y: NDArray[np.float64], color: str, width: float, opacity: float) -> str:
    if len(x) == 1:
        return f'<circle cx="{_number(x[0])}" cy="{_number(y[0])}" r="3" fill="{color}"/>'
    points = " ".join(f"{_number(a)},{_number(b)}" for a, b in zip(x, y, strict=True))
    return (
        f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="{width:g}" stroke-opacity="{opacity:g}" '
        'stroke-linejoin="round" stroke-linecap="round"/>'
    )


def _number(value: float | NDArray[np.float64]) -> str:
    return f"{float(value):.1f}".rstrip("0").rstrip(".")
