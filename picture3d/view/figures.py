"""The still pictures of a report: which views of a scene are drawn, how large, and what is written below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from picture3d.structures.poses import Pose
from picture3d.view import colors as c
from picture3d.view.pictures import BACKGROUND, Camera, bird_eye, contact_sheet, perspective
from picture3d.view.report_data import SceneView
from picture3d.view.scene_modes import Legend, Mode, class_legend

EXTENT_M = 36.0


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """One picture of a figure."""

    label: str
    image: Image.Image


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """Pictures side by side with one caption."""

    title: str
    caption: str
    panels: tuple[Panel, ...]
    legend: Legend = ()
    columns: int = 2


def hero_picture(scene: SceneView, modes: Mapping[str, Mode]) -> Image.Image:
    """The first thing on the page: the sweep in perspective."""
    mode = modes.get("truth") or modes.get("intensity") or modes["height"]
    return perspective(scene.xyz, mode.colors, camera=overview_camera(scene), size_px=(1400, 700), min_px=2.6)


def overview_camera(scene: SceneView) -> Camera:
    """From behind and above the car, a little to the side."""
    return Camera.orbit((0.0, 0.0, -2.0), distance_m=46, yaw_deg=scene.heading_deg - 24, pitch_deg=20, fov_deg=48)


def overview_picture(scene: SceneView, modes: Mapping[str, Mode]) -> Image.Image:
    """The method in one picture of up to six panels, for a README: sweep, teacher, mask, reconstruction, prediction, truth."""
    predicted = [key for key in modes if key.startswith("predicted-")][-1:]
    names = {
        "intensity": "one LiDAR sweep",
        "teacher": "what the teacher sees",
        "hidden": "hidden from the encoder (orange)",
        "rebuilt": "rebuilt by the decoder (orange)",
        **dict.fromkeys(predicted, "predicted classes, after fine-tuning"),
        "truth": "true classes",
    }
    keys = [key for key in names if key in modes]
    pictures = []
    for key in keys:
        mode = modes[key]
        xyz, colors, size = scene.xyz, mode.colors, np.full(len(scene.xyz), 0.13)
        if mode.extra_m is not None and scene.hidden is not None:
            xyz = np.concatenate([xyz[~scene.hidden], mode.extra_m])
            colors = np.concatenate([colors[~scene.hidden], np.full((len(mode.extra_m), 3), mode.extra_color, np.uint8)])
            size = np.concatenate([size[~scene.hidden], np.full(len(mode.extra_m), 0.06)])
        camera = overview_camera(scene)
        pictures.append(perspective(xyz, colors, camera=camera, size_px=(620, 370), point_m=size, min_px=2.0))
    return contact_sheet(pictures, [names[key] for key in keys], columns=min(3, len(keys)))


def scene_figures(
    scene: SceneView, modes: Mapping[str, Mode], class_names: Sequence[str], *, brief: bool = False
) -> list[Figure]:
    """Figures the scene has values for, in the order of the method; `brief` leaves out what one scene explains for all."""
    figures = [_rebuilt(scene, modes), _labels(scene, modes, class_names), _mistakes(scene)]
    if not brief:
        figures = [_sweep(scene, modes), _teacher(scene, modes), figures[0], _encoders(scene, modes), *figures[1:]]
    return [figure for figure in figures if figure is not None]


def _sweep(scene: SceneView, modes: Mapping[str, Mode]) -> Figure:
    keys = [key for key in ("height", "intensity") if key in modes]
    return Figure(
        "What the LiDAR saw",
        "One turn of the sensor from above; the white arrow is the car, the circles are 10\u00a0m apart. "
        "Left by height, right by how much light came back." if len(keys) == 2 else "One turn of the sensor from above.",
        tuple(Panel(f"by {modes[key].label}", _above(scene, modes[key].colors, 640)) for key in keys),
    )  # fmt: skip


def _teacher(scene: SceneView, modes: Mapping[str, Mode]) -> Figure | None:
    keys = [key for key in ("teacher", "superclass", "hidden") if key in modes]
    if not keys:
        return None
    names = {"teacher": "teacher's features", "superclass": "superclasses", "hidden": "hidden in one step"}
    said = {
        "teacher": "The teacher's features as colours: like colours mean like things.",
        "superclass": "The same features in clusters, the superclasses of this sweep.",
        "hidden": "What one training step hides (orange): most of the superclasses that stand far apart from the others, "
        "less of those whose points are scattered, and nothing of the plainest."
        if "superclass" in keys
        else "What one training step hides (orange).",
    }
    return Figure(
        "What is hidden, and why",
        " ".join(said[key] for key in keys),
        tuple(Panel(names[key], _above(scene, modes[key].colors, 520)) for key in keys),
        columns=len(keys),
    )


def _rebuilt(scene: SceneView, modes: Mapping[str, Mode]) -> Figure | None:
    mode = modes.get("rebuilt")
    if mode is None or mode.extra_m is None or scene.hidden is None:
        return None
    camera = close_camera(scene)
    quiet = np.full((len(scene.xyz), 3), c.VISIBLE, np.uint8)
    seen = perspective(scene.xyz[~scene.hidden], quiet[~scene.hidden], camera=camera, size_px=(640, 460))
    truth = perspective(scene.xyz, mode.colors, camera=camera, size_px=(640, 460))
    points = np.concatenate([scene.xyz[~scene.hidden], mode.extra_m])
    colors = np.concatenate([quiet[~scene.hidden], np.full((len(mode.extra_m), 3), c.REBUILT, np.uint8)])
    size = np.concatenate([np.full((~scene.hidden).sum(), 0.11), np.full(len(mode.extra_m), 0.08)])
    rebuilt = perspective(points, colors, camera=camera, size_px=(640, 460), point_m=size, min_px=2.0)
    return Figure(
        "Hidden and rebuilt",
        "The same spot three times. Grey is what the encoder was given, blue is what had been taken away, orange is what the "
        "decoder puts there without having seen the blue points. A rough surface in the right place is a good answer.",
        (Panel("what the encoder sees", seen), Panel("what was hidden", truth), Panel("what came back", rebuilt)),
        (("visible", c.VISIBLE), ("hidden, true", c.TRUE_POINTS), ("rebuilt", c.REBUILT)),
        columns=3,
    )


def _encoders(scene: SceneView, modes: Mapping[str, Mode]) -> Figure | None:
    keys = [key for key in modes if key.startswith("encoder-")]
    if not keys:
        return None
    panels = [Panel(modes[key].label, _above(scene, modes[key].colors, 520)) for key in keys]
    if "teacher" in modes:
        panels.append(Panel("teacher, to compare", _above(scene, modes["teacher"].colors, 520)))
    return Figure(
        "What the encoders learned without labels",
        "Features of whole sweeps, nothing hidden, three main directions as colours. Colours of different pictures cannot be "
        "compared with each other; look for objects that part from the ground and from each other.",
        tuple(panels),
        columns=min(3, len(panels)),
    )


def _labels(scene: SceneView, modes: Mapping[str, Mode], class_names: Sequence[str]) -> Figure | None:
    keys = [key for key in modes if key == "truth" or key.startswith("predicted-")]
    if not keys:
        return None
    camera = overview_camera(scene)
    panels = [
        Panel(modes[key].label, perspective(scene.xyz, modes[key].colors, camera=camera, size_px=(720, 420), point_m=0.14))
        for key in keys
    ]
    shown = [values for values in (scene.labels, *scene.predictions.values()) if values is not None]
    return Figure(
        "Truth and predictions",
        "The class of every point: the truth first, then each network's answer, seen from behind and above the car.",
        tuple(panels),
        class_legend(shown, class_names),
        columns={1: 1, 2: 2, 4: 2}.get(len(panels), 3),
    )


def _mistakes(scene: SceneView) -> Figure | None:
    if scene.labels is None or not scene.predictions:
        return None
    return Figure(
        "Where each network is wrong",
        "Points whose class a network got wrong, in red, from above.",
        tuple(
            Panel(run, _above(scene, c.mistake_colors(scene.labels, predicted), 480))
            for run, predicted in scene.predictions.items()
        ),
        columns=min(3, len(scene.predictions)),
    )


def close_camera(scene: SceneView) -> Camera:
    """Looks at the spot, 6 to 24 m away, where most hidden points stand above the ground."""
    distance = np.hypot(scene.xyz[:, 0], scene.xyz[:, 1])
    near = (distance > 6) & (distance < 24) & np.isfinite(scene.xyz).all(1)
    hidden = near if scene.hidden is None else near & scene.hidden
    ground = float(np.percentile(scene.xyz[near, 2], 20)) if near.any() else -1.8
    standing = hidden & (scene.xyz[:, 2] > ground + 0.4) & (scene.xyz[:, 2] < ground + 4)
    if not standing.any():
        return overview_camera(scene)
    cells = np.floor(scene.xyz[standing, :2] / 6).astype(np.int64)
    places, counts = np.unique(cells, axis=0, return_counts=True)
    x, y = (places[counts.argmax()] + 0.5) * 6
    yaw = float(np.degrees(np.arctan2(y, x)))
    return Camera.orbit((float(x), float(y), ground + 0.8), distance_m=17, yaw_deg=yaw, pitch_deg=24, fov_deg=46)


def _above(scene: SceneView, colors: c.Colors, size_px: int) -> Image.Image:
    upright = Pose.from_yaw(np.radians(90.0 - scene.heading_deg))  # the car looks up
    shown = np.isfinite(scene.xyz).all(1)
    xyz, colors = upright.apply(scene.xyz[shown]), colors[shown]
    return bird_eye(xyz, colors, extent_m=EXTENT_M, size_px=size_px, point_px=2.4, labelled_rings=False)


def background_css() -> str:
    """The dark ground of every picture, for the page around them."""
    return "#" + "".join(f"{v:02x}" for v in BACKGROUND)
