"""The rows of an experiment, read back, and the page and drawing made of them. No run folder is needed for either."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from picture3d.errors import DataError
from picture3d.evaluation.label_efficiency import CellScore, label_efficiency
from picture3d.files import read_json_object
from picture3d.view.experiment_section import efficiency_chart
from picture3d.view.report_data import ExperimentView, FrozenEncoder, ReportData

KIND = "label-efficiency"
SCRATCH = "scratch"
PROBED = ("probe_miou", "knn_miou", "rank")  # what a row says of its frozen encoder, if that was asked for
MAX_BYTES = 1 << 22
_COLORS = ("#6b7280", "#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b8a800")

Cells = Sequence[tuple[CellScore, dict[str, Any]]]


def is_experiment(folder: Path) -> bool:
    """Whether `experiment label-efficiency` made this folder."""
    path = folder / "experiment.json"
    return path.is_file() and read_json_object(path, max_bytes=MAX_BYTES).get("kind") == KIND


def read_cells(out: Path, first: Sequence[str]) -> tuple[list[str], list[tuple[CellScore, dict[str, Any]]]]:
    """All finished cells of a folder, and their methods: those in `first` first, then others by name.

    Raises:
        DataError: if a row cannot be read.
    """
    cells = []
    for path in sorted((out / "cells").glob("*.json")):
        row = read_json_object(path, max_bytes=MAX_BYTES)
        try:
            cell = CellScore(str(row["method"]), float(row["share"]), int(row["seed"]), float(row["score"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: not a row of this experiment ({error!r}). Remove it, and the cell is done again."
            ) from None
        cells.append((cell, row))
    found = {cell.method for cell, _ in cells}
    return [m for m in first if m in found] + sorted(found - set(first)), cells


def experiment_page(out: Path, first: Sequence[str] = ()) -> ReportData:
    """The page of an experiment's folder, from its finished rows alone: it needs none of the run folders.

    Args:
        out: folder of the experiment.
        first: methods in their order, the one that gains are over first; those not named follow by name.

    Raises:
        DataError: if there is no finished row, or one cannot be read.
        ConfigError: if the folder holds no experiment.
    """
    common = read_json_object(out / "experiment.json", max_bytes=MAX_BYTES)
    methods, cells = read_cells(out, first or (SCRATCH,))
    if not cells:
        raise DataError(f"{out}: no cell is finished; run `picture3d experiment label-efficiency` to its end first")
    rows = label_efficiency([cell for cell, _ in cells], methods)
    data = common.get("data", "")
    seeds = sorted({cell.seed for cell, _ in cells})
    return ReportData(
        title="What pre-training is worth",
        summary=(
            f"{len(methods)} ways to begin ({', '.join(methods)}), fine-tuned with the same budget and the same settings on "
            f"nested shares of the labelled scenes, over {len(seeds)} seed{'s' if len(seeds) > 1 else ''}, and scored on "
            "scenes that none of the trainings has seen."
        ),
        experiment=ExperimentView(
            rows=rows,
            frames={cell.share: int(row["labelled_frames"]) for cell, row in cells},
            cells=[
                (cell.method, cell.share, cell.seed, cell.score, float(row["seconds"]["finetune"]))
                for cell, row in sorted(
                    cells, key=lambda found: (found[0].share, methods.index(found[0].method), found[0].seed)
                )
            ],
            measure=str(cells[0][1]["measure"]),
            by_class=_by_class(cells, rows[0].share, methods),
            encoders=_frozen_encoders(cells, methods),
            seconds=_seconds(cells, methods),
        ),
        environment=next((row["environment"] for _, row in cells if "environment" in row), {}),
        configs={"experiment": {**common, "data": Path(str(data)).name}},
    )


def curves_svg(view: ExperimentView) -> str:
    """The curve of the page as a drawing of its own."""
    colors = {method: _COLORS[i % len(_COLORS)] for i, method in enumerate(view.methods)}
    legend = "".join(
        f'<text x="66" y="{24 + 16 * i}" fill="{colors[method]}">{escape(method)}</text>'
        for i, method in enumerate(view.methods)
    )
    chart = efficiency_chart(view, colors)
    return chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace("</svg>", legend + "</svg>")


def _by_class(cells: Cells, share: float, methods: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Method -> class -> mean over the seeds that have a number."""
    found: dict[str, dict[str, float | None]] = {}
    for method in methods:
        several = [row["by_class"] for cell, row in cells if (cell.method, cell.share) == (method, share)]
        if several:
            found[method] = {name: _mean([by[name] for by in several]) for name in several[0]}
    return found


def _frozen_encoders(cells: Cells, methods: Sequence[str]) -> list[FrozenEncoder]:
    found = []
    for method in methods:
        by_seed = {cell.seed: row for cell, row in cells if cell.method == method and "probe_miou" in row}
        if by_seed:
            linear, near, rank = (_mean([row.get(name) for row in by_seed.values()]) for name in PROBED)
            found.append(FrozenEncoder(method, len(by_seed), linear, near, rank))
    return found


def _seconds(cells: Cells, methods: Sequence[str]) -> dict[str, tuple[float | None, float | None]]:
    """Mean seconds of each method's pre-training and fine-tuning."""
    found = {method: [row["seconds"] for cell, row in cells if cell.method == method] for method in methods}
    return {
        m: (_mean([row.get("pretrain") for row in rows]), _mean([row["finetune"] for row in rows])) for m, rows in found.items()
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
