"""Scores over methods, label shares and seeds, made into a table: mean, spread, and what a method gains over the first one.

    spread   sample standard deviation over seeds, divisor n - 1; none for one seed
    interval half-width of the 95 % confidence interval of the mean, t(n - 1) * spread / sqrt(n); none for one seed
    gain     mean over the seeds that both methods have of (score - score of the first method, same share, same seed), with the
             interval of that mean. Pairs share labelled scenes and first weights, so what a seed does to both cancels out

Source of the quantiles: Student's t, two-sided 95 %, as printed in any table of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Two-sided 95 % quantiles for 1 to 30 degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_T95_BEYOND = 2.042  # for more: a little too wide rather than too narrow


@dataclass(frozen=True, slots=True)
class CellScore:
    """What one fine-tuning reached."""

    method: str
    share: float  # of the labelled scenes, 0..1
    seed: int
    score: float  # 0..1


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds."""

    seeds: int
    mean: float
    spread: float | None  # None for one seed
    interval: float | None  # half-width; None for one seed

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"seeds": self.seeds, "mean": self.mean, "spread": self.spread, "interval": self.interval}


@dataclass(frozen=True, slots=True)
class LabelEfficiencyRow:
    """A method at a share of the labels."""

    method: str
    share: float
    score: Estimate
    gain: Estimate | None  # over the first method; None for the first itself, and where no seed is shared

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        gain = None if self.gain is None else self.gain.to_json()
        return {"method": self.method, "share": self.share, "score": self.score.to_json(), "gain": gain}


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, spread and interval of at least one value.

    Raises:
        ValueError: if there is none.
    """
    if not values:
        raise ValueError("no value to estimate from")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(1, mean, None, None)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = _T95[count - 2] if count - 2 < len(_T95) else _T95_BEYOND
    return Estimate(count, mean, spread, quantile * spread / math.sqrt(count))


def label_efficiency(cells: Sequence[CellScore], methods: Sequence[str]) -> list[LabelEfficiencyRow]:
    """Rows by share, the smallest first, then by method in the order of `methods`; the first one is what gains are over.

    Raises:
        ValueError: if a cell is there twice.
    """
    found: dict[tuple[str, float], dict[int, float]] = {}
    for cell in cells:
        by_seed = found.setdefault((cell.method, cell.share), {})
        if cell.seed in by_seed:
            raise ValueError(f"{cell.method} at {cell.share:g}, seed {cell.seed}, is there twice")
        by_seed[cell.seed] = cell.score
    rows = []
    for share in sorted({cell.share for cell in cells}):
        base = found.get((methods[0], share), {}) if methods else {}
        for method in methods:
            scores = found.get((method, share), {})
            if not scores:
                continue
            gains = [scores[seed] - base[seed] for seed in sorted(scores) if seed in base]
            gain = estimate(gains) if gains and method != methods[0] else None
            rows.append(LabelEfficiencyRow(method, share, estimate([scores[seed] for seed in sorted(scores)]), gain))
    return rows


def markdown_table(rows: Sequence[LabelEfficiencyRow], *, measure: str) -> str:
    """The rows as a Markdown table, in per cent: mean, spread and 95 % interval, and the gain over the first method."""
    lines = [f"| labels | method | seeds | {measure}, % | spread | 95 % | gain | 95 % of the gain |", "|" + "---|" * 8]
    for row in rows:
        gain = ("-", "-") if row.gain is None else (f"{100 * row.gain.mean:+.1f}", _within(row.gain.interval))
        score = row.score
        spread = "-" if score.spread is None else f"{100 * score.spread:.1f}"
        lines.append(
            f"| {row.share:.4g} | {row.method} | {score.seeds} | {100 * score.mean:.1f} | {spread} | {_within(score.interval)} "
            f"| {gain[0]} | {gain[1]} |"
        )
    return "\n".join(lines)


def _within(interval: float | None) -> str:
    return "-" if interval is None else f"+-{100 * interval:.1f}"
