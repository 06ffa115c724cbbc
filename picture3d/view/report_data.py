"""What a report shows, as plain values: numbers, texts and arrays. Everything may be missing; what is missing is not shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.evaluation.label_efficiency import LabelEfficiencyRow
from picture3d.view.colors import Colors
from picture3d.view.heat_map import HeatMap

LIDARSEG_CLASSES: tuple[str, ...] = (
    "ignored",
    "barrier",
    "bicycle",
    "bus",
    "car",
    "construction_vehicle",
    "motorcycle",
    "pedestrian",
    "traffic_cone",
    "trailer",
    "truck",
    "driveable_surface",
    "other_flat",
    "sidewalk",
    "terrain",
    "manmade",
    "vegetation",
)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run of commands."""

    name: str
    command: str = ""  # what to type to repeat it
    seconds: float | None = None
    detail: str = ""  # one line: what it made


@dataclass(frozen=True, slots=True)
class RunScores:
    """Segmentation scores of one run; shares are 0..1, None or NaN where there is no number."""

    miou: float | None
    iou: Mapping[str, float | None] = field(default_factory=dict)  # by class name
    points: Mapping[str, int] = field(default_factory=dict)  # true points of each class in the scored frames
    detail: str = ""  # one line: what distinguishes this run

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], *, detail: str = "") -> RunScores:
        """From the JSON of `evaluation.segmentation.SegmentationScores.to_json`, or any tree with "miou" and "iou"."""
        iou = dict(tree.get("iou") or {})
        confusion = np.asarray(tree.get("confusion") or np.zeros((0, 0)))
        counted = confusion.sum(1)[1:] if len(confusion) == len(iou) + 1 else []
        return cls(tree.get("miou"), iou, {name: int(n) for name, n in zip(iou, counted, strict=False)}, detail)


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """One metric over the steps of one run."""

    steps: NDArray[np.float64]  # (K,)
    values: NDArray[np.float64]  # (K,), NaN where there is no number


@dataclass(frozen=True, slots=True)
class CurveGroup:
    """Runs of one kind, drawn over the same axes: run -> metric -> curve."""

    title: str
    runs: Mapping[str, Mapping[str, Curve]]
    text: str = ""
    log: bool = False  # logarithmic y axes


@dataclass(frozen=True, slots=True, eq=False)
class SceneView:
    """One sweep and what was made of it. Arrays of N rows follow `xyz`; all of them may be missing."""

    name: str
    xyz: NDArray[np.float32]  # (N, 3) metres, LiDAR frame
    intensity: NDArray[np.float32] | None = None  # (N,) in any unit
    labels: NDArray[np.integer] | None = None  # (N,) true training classes, 0 = ignored
    predictions: Mapping[str, NDArray[np.integer]] = field(default_factory=dict)  # run -> (N,) training classes
    teacher_colors: Colors | None = None  # (N, 3) uint8, see `colors.pca_colors`
    superclass: NDArray[np.integer] | None = None  # (N,) -1 = none
    hidden: NDArray[np.bool_] | None = None  # (N,) True: hidden from the encoder
    rebuilt_m: NDArray[np.float32] | None = None  # (P, 3) predicted points, metres, LiDAR frame
    encoder_colors: Mapping[str, Colors] = field(default_factory=dict)  # run -> (N, 3) uint8
    heading_deg: float = 90.0  # direction of travel, counter-clockwise from x; nuScenes drives along y

    def __post_init__(self) -> None:
        if self.xyz.ndim != 2 or self.xyz.shape[1] != 3:
            raise ValueError(f"scene {self.name}: xyz must be (N, 3), got {self.xyz.shape}")
        columns = {
            "intensity": self.intensity,
            "labels": self.labels,
            "teacher_colors": self.teacher_colors,
            "superclass": self.superclass,
            "hidden": self.hidden,
            **{f"predictions[{run}]": value for run, value in self.predictions.items()},
            **{f"encoder_colors[{run}]": value for run, value in self.encoder_colors.items()},
        }
        for name, column in columns.items():
            if column is not None and len(column) != len(self.xyz):
                raise ValueError(f"scene {self.name}: {name} has {len(column)} rows for {len(self.xyz)} points")


@dataclass(frozen=True, slots=True)
class FrozenEncoder:
    """What reading out the frozen encoder of a method gave, means over seeds; shares are 0..1, None where not measured."""

    method: str
    seeds: int
    linear: float | None
    neighbours: float | None
    rank: float | None  # effective rank, 1..columns


@dataclass(frozen=True, slots=True)
class ExperimentView:
    """A table of methods over shares of the labels, and what belongs to it."""

    rows: Sequence[LabelEfficiencyRow]
    frames: Mapping[float, int]  # share -> labelled keyframes
    cells: Sequence[tuple[str, float, int, float, float]] = ()  # method, share, seed, score 0..1, seconds
    measure: str = "mIoU"  # what a score is
    by_class: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)  # method -> class -> mean at least share
    encoders: Sequence[FrozenEncoder] = ()
    seconds: Mapping[str, tuple[float | None, float | None]] = field(
        default_factory=dict
    )  # method -> pre-training, fine-tuning

    @property
    def methods(self) -> list[str]:
        """In the order of the rows; the first one is what gains are over."""
        return list(dict.fromkeys(row.method for row in self.rows))


@dataclass(frozen=True, slots=True, eq=False)
class ReportData:
    """Everything on the page, in the order of the page."""

    title: str
    summary: str = ""  # paragraphs are parted by an empty line
    scores: Mapping[str, RunScores] = field(default_factory=dict)  # the first run is what the others are compared with
    scenes: Sequence[SceneView] = ()
    curves: Sequence[CurveGroup] = ()
    comparisons: Sequence[HeatMap] = ()  # of encoders' layers
    experiment: ExperimentView | None = None  # methods over shares of the labels
    steps: Sequence[Step] = ()
    notes: Sequence[str] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    configs: Mapping[str, Any] = field(default_factory=dict)  # name -> JSON tree
    class_names: Sequence[str] = LIDARSEG_CLASSES  # by training class, 0 = ignored


def curves_from_records(records: Iterable[Mapping[str, Any]], metrics: Sequence[str] | None = None) -> dict[str, Curve]:
    """Metric -> curve from the lines of metrics.jsonl: each has "step" and numbers.

    Args:
        records: one mapping a logged step.
        metrics: which to keep, in this order; by default every number but step, epoch and times.
    """
    rows = [record for record in records if isinstance(record.get("step"), int)]
    found: dict[str, None] = {}
    for record in rows:
        found |= {key: None for key, value in record.items() if _is_number(value)}
    left_out = {"step", "epoch", "seconds", "time", "seconds_per_step"}
    names = [m for m in metrics if m in found] if metrics is not None else [key for key in found if key not in left_out]
    curves = {}
    for name in names:
        kept = [(record["step"], float(record[name])) for record in rows if _is_number(record.get(name))]
        curves[name] = Curve(np.array([s for s, _ in kept], float), np.array([v for _, v in kept], float))
    return curves


def is_known(value: float | None) -> bool:
    """Whether there is a number."""
    return value is not None and math.isfinite(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
