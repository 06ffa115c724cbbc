"""Scenes as compact JSON for the page's own 3-D viewer (`viewer.js`): quantised positions, palette indices."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from picture3d.view.colors import Colors
from picture3d.view.report_data import SceneView
from picture3d.view.scene_modes import Mode, hex_color

SHOWN_RADIUS_M = 75.0  # what lies further out is left to the stills
MAX_POINTS = 36_000
MAX_EXTRA_POINTS = 20_000
_RANGE_M = 80.0  # metres at the end of int16


def viewer_json(scenes: Sequence[tuple[SceneView, Mapping[str, Mode]]]) -> str:
    """JSON of all scenes, safe inside a ``<script>`` element."""
    trees = [_scene_tree(scene, modes) for scene, modes in scenes]
    return json.dumps(trees, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _scene_tree(scene: SceneView, modes: Mapping[str, Mode]) -> dict[str, Any]:
    rows = _chosen_rows(scene.xyz, MAX_POINTS)
    return {
        "name": scene.name,
        "heading": scene.heading_deg,
        "count": len(rows),
        "range": _RANGE_M,
        "xyz": _packed_positions(scene.xyz[rows]),
        "known": None if scene.labels is None else _base64((scene.labels[rows] > 0).astype(np.uint8)),
        "modes": [_mode_tree(key, mode, rows) for key, mode in modes.items()],
    }


def _mode_tree(key: str, mode: Mode, rows: NDArray[np.intp]) -> dict[str, Any]:
    tree: dict[str, Any] = {"key": key, "group": mode.group, "label": mode.label, "caption": mode.caption}
    tree |= _packed_colors(mode.colors[rows])
    if mode.legend:
        tree["legend"] = [[name, hex_color(color)] for name, color in mode.legend]
    if mode.ramp:
        tree["ramp"] = list(mode.ramp)
    if mode.is_prediction:
        tree["prediction"] = True
    if mode.extra_m is not None:
        extra = mode.extra_m[_chosen_rows(mode.extra_m, MAX_EXTRA_POINTS)]
        tree["extra"] = {"count": len(extra), "xyz": _packed_positions(extra), "color": list(mode.extra_color)}
    return tree


def _chosen_rows(xyz: NDArray[np.float32], limit: int) -> NDArray[np.intp]:
    """Rows near enough to be shown; too many are thinned at random, always in the same way, and kept in order."""
    rows = np.flatnonzero(np.isfinite(xyz).all(1) & (np.abs(xyz) < SHOWN_RADIUS_M).all(1))
    if len(rows) > limit:
        rows = np.sort(np.random.default_rng(0).choice(rows, limit, replace=False))
    return rows


def _packed_positions(xyz: NDArray[np.float32]) -> str:
    return _base64(np.rint(np.asarray(xyz, np.float64) / _RANGE_M * 32767).astype("<i2"))


def _packed_colors(colors: Colors) -> dict[str, str]:
    """A palette of at most 256 colours and one byte a point; where there are more colours, near ones become one."""
    if not len(colors):
        return {"palette": "", "index": ""}
    codes = colors.astype(np.int64) @ np.array([65536, 256, 1])
    found, index = np.unique(codes, return_inverse=True)
    palette = np.stack([found >> 16, found >> 8 & 255, found & 255], 1)
    if len(found) > 256:
        reduced = Image.fromarray(colors[None].astype(np.uint8)).quantize(256, Image.Quantize.MEDIANCUT)
        palette, index = np.array(reduced.getpalette()).reshape(-1, 3), np.asarray(reduced)[0]
    return {"palette": _base64(palette.astype(np.uint8)), "index": _base64(index.astype(np.uint8))}


def _base64(values: NDArray[np.generic]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
