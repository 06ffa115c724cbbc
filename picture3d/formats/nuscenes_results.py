"""The nuScenes detection submission ``results_nusc.json``, read and written sample by sample, as columns.

Layout (nuScenes devkit): ``{"meta": {"use_lidar": bool, ...}, "results": {SAMPLE_TOKEN: [BOX, ...]}}``
with a BOX of ``sample_token``, ``translation`` (x, y, z, metres, global frame), ``size`` (width, length, height),
``rotation`` (quaternion w, x, y, z), ``velocity`` (vx, vy; NaN where unknown), ``detection_name``, ``detection_score`` and
``attribute_name`` ("" for none). At most 500 boxes a sample.

Labels use the same layout with ``num_lidar_pts`` (and optionally ``num_radar_pts``; or their sum ``num_pts``) instead of a
score. Two additions tell where the car was: ``ego_translation`` in a box (box centre minus ego position, as the devkit
serialises it), or ``"ego_translation": {SAMPLE_TOKEN: [x, y, z]}`` beside ``results`` with ego positions in the global frame.
Labels may hold boxes named ``static_object.bicycle_rack``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.errors import DataError
from picture3d.files import unreadable, whole_file
from picture3d.formats.json_stream import NestedObject

CLASSES = (
    "car",
    "truck",
    "bus",
    "trailer",
    "construction_vehicle",
    "pedestrian",
    "motorcycle",
    "bicycle",
    "traffic_cone",
    "barrier",
)
ATTRIBUTES = (
    "pedestrian.moving",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "cycle.with_rider",
    "cycle.without_rider",
    "vehicle.moving",
    "vehicle.parked",
    "vehicle.stopped",
)
# The detection class of a nuScenes category; other categories do not count (nuScenes detection challenge).
CLASS_OF_CATEGORY = {
    "vehicle.car": "car",
    "vehicle.truck": "truck",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.trailer": "trailer",
    "vehicle.construction": "construction_vehicle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle",
    "movable_object.trafficcone": "traffic_cone",
    "movable_object.barrier": "barrier",
}
BICYCLE_RACK = "static_object.bicycle_rack"
RACK = len(CLASSES)  # the class index of a bicycle rack, in labels only
MAX_BOXES = 500
MODALITIES = ("use_camera", "use_lidar", "use_radar", "use_map", "use_external")

_CLASS_INDEX = {name: i for i, name in enumerate((*CLASSES, BICYCLE_RACK))}
_ATTRIBUTE_INDEX = {"": -1, **{name: i for i, name in enumerate(ATTRIBUTES)}}


@dataclass(frozen=True, slots=True, eq=False)
class DetectionColumns:
    """N boxes of S samples in the global frame, in the order of the file; predictions or labels."""

    samples: tuple[str, ...]  # S tokens
    sample: NDArray[np.int64]  # (N,) index into samples, not decreasing
    translation: NDArray[np.float64]  # (N, 3) metres, geometric centre
    size: NDArray[np.float64]  # (N, 3) metres: length (along the heading), width, height
    rotation: NDArray[np.float64]  # (N, 4) quaternion w, x, y, z of any length but zero
    velocity: NDArray[np.float64]  # (N, 2) metres per second; NaN where unknown
    label: NDArray[np.int64]  # (N,) index into CLASSES, or RACK
    score: NDArray[np.float64]  # (N,); -1 in labels
    attribute: NDArray[np.int64]  # (N,) index into ATTRIBUTES, -1 = none
    num_points: NDArray[np.int64]  # (N,) LiDAR and radar points inside; -1 in predictions
    ego: NDArray[np.float64]  # (S, 3) position of the car, metres; NaN where the file does not tell

    def __post_init__(self) -> None:
        count, samples = len(self.sample), len(self.samples)
        shapes = {
            "translation": (count, 3),
            "size": (count, 3),
            "rotation": (count, 4),
            "velocity": (count, 2),
            "label": (count,),
            "score": (count,),
            "attribute": (count,),
            "num_points": (count,),
            "ego": (samples, 3),
        }
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected {shape}")

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def yaw(self) -> NDArray[np.float64]:
        """(N,) heading of the boxes' x axis in the global xy plane, radians counter-clockwise from x."""
        w, x, y, z = (self.rotation / np.linalg.norm(self.rotation, axis=1, keepdims=True)).T
        return np.arctan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z))

    @staticmethod
    def join(parts: Iterable[DetectionColumns]) -> DetectionColumns:
        """The samples of all parts behind each other.

        Raises:
            DataError: if a sample is in two parts.
        """
        parts = list(parts) or [_columns(())]
        samples = tuple(token for part in parts for token in part.samples)
        if len(set(samples)) < len(samples):
            seen: set[str] = set()
            twice = next(token for token in samples if token in seen or seen.add(token))
            raise DataError(f"sample {twice}: is there twice. Write every sample once, with all its boxes.")
        starts = np.cumsum([0, *(len(part.samples) for part in parts)])
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _JOINED}
        sample = np.concatenate([part.sample + start for part, start in zip(parts, starts, strict=False)])
        return DetectionColumns(samples=samples, sample=sample, **columns)


_JOINED = ("translation", "size", "rotation", "velocity", "label", "score", "attribute", "num_points", "ego")


def read_results(path: Path) -> tuple[DetectionColumns, dict[str, Any]]:
    """The predictions in a ``results_nusc.json`` and its ``meta``.

    One sample's text is held at a time; memory holds the columns.

    Raises:
        DataError: naming file, sample, box and field, for what is not of the layout above: a missing field, NaN (but in the
            velocity), an unknown class or attribute, a negative size, more than 500 boxes in a sample, a sample twice.
    """
    return _read(path, labels=False)


def read_labels(path: Path) -> tuple[DetectionColumns, dict[str, Any]]:
    """The labels in a JSON of the submission's layout with points per box (see the module), and its ``meta`` or {}.

    Raises:
        DataError: as :func:`read_results`; also for a box without ``num_lidar_pts`` or ``num_pts``; there is no limit of 500.
    """
    return _read(path, labels=True)


def write_results(path: Path, samples: Iterable[DetectionColumns], *, meta: Mapping[str, Any] | None = None) -> None:
    """Writes a ``results_nusc.json``, whole or not at all; `samples` may be a generator of parts of any size.

    `meta` defaults to LiDAR only. The file is what the official server takes.

    Raises:
        DataError: if a sample comes twice or has more than 500 boxes, a value is not finite (but a velocity), a box is a
            bicycle rack, or the file cannot be written.
    """
    used = dict(meta) if meta is not None else {name: name == "use_lidar" for name in MODALITIES}
    written: set[str] = set()
    with whole_file(path) as file:
        file.write(f'{{"meta": {json.dumps(used)}, "results": {{'.encode())
        for part in samples:
            bounds = np.searchsorted(part.sample, np.arange(len(part.samples) + 1))
            _check_writable(part, path)
            for index, token in enumerate(part.samples):
                boxes = [_box(part, row) for row in range(bounds[index], bounds[index + 1])]
                if token in written:
                    raise DataError(f"{path}: sample {token} comes twice. Hand in every sample once, with all its boxes.")
                if len(boxes) > MAX_BOXES:
                    raise DataError(
                        f"{path}: sample {token} has {len(boxes)} boxes, {MAX_BOXES} are allowed. Keep the best scores."
                    )
                file.write(f"{', ' if written else ''}{json.dumps(token)}: {json.dumps(boxes)}".encode())
                written.add(token)
        file.write(b"}}\n")


def _check_writable(part: DetectionColumns, path: Path) -> None:
    for name in ("translation", "size", "rotation", "score"):
        bad = ~finite_rows(getattr(part, name))
        if bad.any():
            raise DataError(
                f"{path}: sample {part.samples[part.sample[bad.argmax()]]}: a box's {name} is not finite. Correct or remove "
                "the box."
            )
    if (part.label == RACK).any():
        raise DataError(f"{path}: bicycle racks are labels, not detections. Rename the class, or score the file as labels.")


def _box(part: DetectionColumns, row: int) -> dict[str, Any]:
    length, width, height = part.size[row].tolist()
    attribute = int(part.attribute[row])
    return {
        "sample_token": part.samples[part.sample[row]],
        "translation": part.translation[row].tolist(),
        "size": [width, length, height],
        "rotation": part.rotation[row].tolist(),
        "velocity": part.velocity[row].tolist(),
        "detection_name": CLASSES[part.label[row]],
        "detection_score": float(part.score[row]),
        "attribute_name": ATTRIBUTES[attribute] if attribute >= 0 else "",
    }


def _read(path: Path, *, labels: bool) -> tuple[DetectionColumns, dict[str, Any]]:
    parts: list[DetectionColumns] = []
    tree: dict[str, Any] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for keys, value in NestedObject(file, path, "results").entries():
                if len(keys) == 2:
                    parts.append(_sample(path, keys[1], value, labels=labels))
                else:
                    tree[keys[0]] = value
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}). Write it as JSON.") from None
    except OSError as error:
        raise unreadable(path, error) from error
    if "results" not in tree:
        raise DataError(
            f'{path}: has no "results". Write a submission as {{"meta": ..., "results": {{sample_token: [boxes]}}}}.'
        )
    meta = tree.get("meta", {} if labels else None)
    if not isinstance(meta, dict):
        raise DataError(f'{path}: has no object "meta" (use_lidar, use_camera, ...). Every submission states it.')
    try:
        columns = DetectionColumns.join(parts)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    _take_ego(columns, tree.get("ego_translation", {}), path)
    return columns, meta


def _take_ego(columns: DetectionColumns, places: Any, path: Path) -> None:
    rows = {token: i for i, token in enumerate(columns.samples)}
    if not isinstance(places, dict):
        raise DataError(f'{path}: "ego_translation" is not an object of sample token: [x, y, z]. Write it so, or leave it out.')
    for token, place in places.items():
        if token in rows:
            columns.ego[rows[token]] = _numbers(path, token, [{"ego_translation": place}], "ego_translation", 3)[0]


def _sample(path: Path, token: str, boxes: Any, *, labels: bool) -> DetectionColumns:
    where = f"{path}: sample {token}"
    if not isinstance(boxes, list) or not all(isinstance(box, dict) for box in boxes):
        raise DataError(f"{where}: is not a list of boxes. Write a list, an empty one where nothing was found.")
    if len(boxes) > MAX_BOXES and not labels:
        raise DataError(f"{where}: has {len(boxes)} boxes, {MAX_BOXES} are allowed. Keep the best scores.")
    for index, box in enumerate(boxes):
        if box.get("sample_token", token) != token:
            raise DataError(f"{where}: box {index}: sample_token is {box['sample_token']!r}. Move the box to its sample.")
    return _columns(boxes, path=path, token=token, labels=labels)


def _columns(boxes: Any, *, path: Path = Path(), token: str = "", labels: bool = True) -> DetectionColumns:
    size = _numbers(path, token, boxes, "size", 3)[:, [1, 0, 2]]
    rotation = _numbers(path, token, boxes, "rotation", 4)
    translation = _numbers(path, token, boxes, "translation", 3)
    _refuse(path, token, "size", np.asarray((size < 0).any(axis=1)), "is negative")
    _refuse(path, token, "rotation", np.linalg.norm(rotation, axis=1) < 1e-12, "has length zero")
    attributes = [{"attribute_name": ""} | box for box in boxes] if labels else boxes
    known = _CLASS_INDEX if labels else {name: i for i, name in enumerate(CLASSES)}
    count = len(boxes)
    ego = np.full((1 if token else 0, 3), np.nan)
    placed = next((i for i, box in enumerate(boxes) if "ego_translation" in box), None)
    if placed is not None:
        ego[0] = translation[placed] - _numbers(path, token, [boxes[placed]], "ego_translation", 3)[0]
    return DetectionColumns(
        samples=(token,) if token else (),
        sample=np.zeros(count, np.int64),
        translation=translation,
        size=size,
        rotation=rotation,
        velocity=_numbers(path, token, boxes, "velocity", 2, nan=True),
        label=_names(path, token, boxes, "detection_name", known),
        score=np.full(count, -1.0) if labels else _numbers(path, token, boxes, "detection_score", 0),
        attribute=_names(path, token, attributes, "attribute_name", _ATTRIBUTE_INDEX),
        num_points=_point_counts(path, token, boxes) if labels else np.full(count, -1),
        ego=ego,
    )


def _point_counts(path: Path, token: str, boxes: list[dict[str, Any]]) -> NDArray[np.int64]:
    summed = [
        {"num_lidar_pts": box["num_pts"]} if "num_lidar_pts" not in box and "num_pts" in box else {"num_radar_pts": 0} | box
        for box in boxes
    ]
    lidar = _numbers(path, token, summed, "num_lidar_pts", 0)
    radar = _numbers(path, token, [{"num_radar_pts": 0} | box for box in summed], "num_radar_pts", 0)
    return np.where(lidar < 0, -1, lidar + radar).astype(np.int64)


def _numbers(path: Path, token: str, boxes: Any, field: str, width: int, *, nan: bool = False) -> NDArray[np.float64]:
    """(N, width) float64 of a field, (N,) for width 0; NaN is allowed where `nan`, infinity never."""
    shape = (len(boxes), width) if width else (len(boxes),)
    if not len(boxes):
        return np.zeros(shape)
    try:
        column = [box[field] for box in boxes]
        values = np.array(column)
        # Among numbers a lone true would pass for 1.
        if values.shape == shape and values.dtype.kind in "fiu" and (width or bool not in map(type, column)):
            values = values.astype(np.float64)
            usable = np.nan_to_num(values, nan=0.0 if nan else np.inf, posinf=np.inf, neginf=-np.inf)
            _refuse(path, token, field, ~finite_rows(usable), "is not finite")
            return values
    except (KeyError, ValueError, TypeError, OverflowError):
        pass
    for index, box in enumerate(boxes):
        if field not in box:
            raise DataError(f"{path}: sample {token}: box {index}: has no {field}. Add it.")
        value = box[field] if width else [box[field]]
        fits = isinstance(value, list) and len(value) == (width or 1)
        if not fits or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value):
            wanted = f"{width} numbers" if width else "a number"
            raise DataError(
                f"{path}: sample {token}: box {index}: {field} is {box[field]!r}, not {wanted}. Correct it in the "
                "program that wrote it."
            )
    raise DataError(f"{path}: sample {token}: {field} holds numbers too large to be meant. Correct or remove the box.")


def _names(path: Path, token: str, boxes: Any, field: str, known: Mapping[str, int]) -> NDArray[np.int64]:
    try:
        return np.array([known[box[field]] for box in boxes], dtype=np.int64)
    except (KeyError, TypeError):
        index, box = next((i, b) for i, b in enumerate(boxes) if not isinstance(b.get(field), str) or b[field] not in known)
        raise DataError(
            f"{path}: sample {token}: box {index}: {field} is {box.get(field)!r}. Write one of "
            f"{', '.join(n for n in known if n)}."
        ) from None


def finite_rows(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(N,) whether all values of a row are finite; `values` is (N,) or (N, K)."""
    finite = np.isfinite(values)
    return finite if finite.ndim == 1 else np.asarray(finite.all(axis=1))


def _refuse(path: Path, token: str, field: str, bad: NDArray[np.bool_], what: str) -> None:
    if bad.any():
        raise DataError(f"{path}: sample {token}: box {int(bad.argmax())}: {field} {what}. Remove or mend the box.")


def rotation_of_yaw(yaw: NDArray[np.floating]) -> NDArray[np.float64]:
    """(N, 4) quaternions w, x, y, z that turn by `yaw` (N,) radians about z."""
    half = np.asarray(yaw, dtype=np.float64) / 2
    zero = np.zeros_like(half)
    return np.stack([np.cos(half), zero, zero, np.sin(half)], axis=1)
