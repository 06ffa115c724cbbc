"""The ways to look at a scene: colours of its points, what they mean, what one sees. The stills and the viewer share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from picture3d.view import colors as c
from picture3d.view.colors import Colors, Rgb
from picture3d.view.report_data import SceneView

Legend = tuple[tuple[str, Rgb], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Mode:
    """One way to colour the points of a scene."""

    group: str  # the stage of the method it shows
    label: str
    caption: str
    colors: Colors  # (N, 3)
    legend: Legend = ()
    ramp: tuple[str, str] | None = None  # what the two ends of the ramp mean
    extra_m: NDArray[np.float32] | None = None  # (P, 3) further points
    extra_color: Rgb = c.REBUILT
    is_prediction: bool = False


def scene_modes(scene: SceneView, class_names: Sequence[str]) -> dict[str, Mode]:
    """Every mode the scene has values for, by key, in the order of the method."""
    modes: dict[str, Mode] = {}
    if scene.intensity is not None:
        modes["intensity"] = Mode(
            "Sweep",
            "intensity",
            "One turn of the LiDAR, coloured by how much light came back. With the points' places, it is all the network gets.",
            c.ramp_colors(scene.intensity, gamma=0.6),
            ramp=("dark", "bright"),
        )
    modes["height"] = Mode(
        "Sweep",
        "height",
        "The same turn, coloured by height: the ground is dark, roofs and crowns are bright.",
        c.ramp_colors(scene.xyz[:, 2], limits=_height_limits(scene)),
        ramp=("ground", "high"),
    )
    if scene.teacher_colors is not None:
        modes["teacher"] = Mode(
            "Teacher",
            "features",
            "What the teacher says about every point: three main directions of its features as red, green and blue. "
            "Like colours mean like things. The network learns to predict these where it cannot see.",
            scene.teacher_colors,
        )
    if scene.superclass is not None:
        modes["superclass"] = Mode(
            "Teacher",
            "superclasses",
            "The teacher's features, clustered within this sweep. The mask hides much of one cluster and little of another.",
            c.group_colors(scene.superclass),
        )
    if scene.hidden is not None:
        modes["hidden"] = Mode(
            "Pre-training",
            "hidden",
            f"The puzzle of one training step: {_percent(scene.hidden)} of the points are hidden from the encoder."
            + ("" if scene.superclass is None else " Superclasses that stand far apart from the others lose most."),
            c.mask_colors(scene.hidden),
            (("visible", c.VISIBLE), ("hidden", c.HIDDEN)),
        )
    if scene.hidden is not None and scene.rebuilt_m is not None:
        modes["rebuilt"] = Mode(
            "Pre-training",
            "rebuilt",
            "The answer: points that the decoder puts into the hidden cells, over the true ones it never saw.",
            np.where(scene.hidden[:, None], np.array(c.TRUE_POINTS), np.array(c.VISIBLE)).astype(np.uint8),
            (("visible", c.VISIBLE), ("hidden, true", c.TRUE_POINTS), ("rebuilt", c.REBUILT)),
            extra_m=scene.rebuilt_m,
        )
    for run, values in scene.encoder_colors.items():
        modes[f"encoder-{run}"] = Mode(
            "Encoder",
            run,
            f"Features of the encoder “{run}” before any label was shown to it, coloured like the teacher's. "
            "The clearer objects part from their surroundings, the less is left for labels to teach.",
            values,
        )
    if scene.labels is not None:
        modes["truth"] = Mode(
            "Labels",
            "truth",
            "What every point really is. Pre-training uses none of these labels, fine-tuning a share of them.",
            c.label_colors(scene.labels, class_names),
            class_legend([scene.labels], class_names),
        )
    for run, predicted in scene.predictions.items():
        shown = [predicted] if scene.labels is None else [scene.labels, predicted]
        modes[f"predicted-{run}"] = Mode(
            "Labels",
            run,
            _prediction_caption(run, scene.labels, predicted),
            c.label_colors(predicted, class_names),
            class_legend(shown, class_names),
            is_prediction=True,
        )
    return modes


def class_legend(labels: Sequence[NDArray[np.integer]], class_names: Sequence[str]) -> Legend:
    """Names and colours of the classes that occur, without the ignored one."""
    present = sorted({int(v) for values in labels for v in np.unique(values) if 0 < v < len(class_names)})
    table = c.class_colors(class_names)
    return tuple((readable(class_names[i]), _rgb(table[i])) for i in present)


def readable(name: str) -> str:
    """A class name without underscores."""
    return name.replace("_", " ")


def hex_color(color: Sequence[int]) -> str:
    """A colour as CSS writes it."""
    return "#" + "".join(f"{int(v):02x}" for v in color)


def _prediction_caption(run: str, labels: NDArray[np.integer] | None, predicted: NDArray[np.integer]) -> str:
    text = f"What the network “{run}” says each point is."
    if labels is not None and (labels > 0).any():
        right = float((labels == predicted)[labels > 0].mean())
        text += f" {100 * right:.1f}% of the labelled points of this sweep are right."
    return text


def _height_limits(scene: SceneView) -> tuple[float, float]:
    heights = scene.xyz[:, 2][np.isfinite(scene.xyz[:, 2])]
    if not len(heights):
        return 0.0, 1.0
    ground = float(np.percentile(heights, 10))
    return ground - 0.5, ground + 7.0


def _percent(mask: NDArray[np.bool_]) -> str:
    return f"{100 * float(np.mean(mask)):.0f}%" if len(mask) else "none"


def _rgb(row: NDArray[np.uint8]) -> Rgb:
    return int(row[0]), int(row[1]), int(row[2])
