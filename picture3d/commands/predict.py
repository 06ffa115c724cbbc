"""`predict`: what a fine-tuned network says of prepared frames or of a sweep file, in the format that is wanted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from picture3d.commands.build import build_task, read_run_config, scoring_batches
from picture3d.commands.machine import start
from picture3d.commands.score_occupancy import class_names as occupancy_class_names
from picture3d.datasets.label_sets import LabelSet
from picture3d.datasets.loading import collate
from picture3d.datasets.nuscenes_samples import sample_token
from picture3d.datasets.openoccupancy import NUSCENES_OCCUPANCY, label_file_name
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.datasets.preparing import finite_points
from picture3d.datasets.samples import sweep_sample
from picture3d.datasets.sweep_files import read_points
from picture3d.errors import ConfigError, DataError
from picture3d.evaluation import nuscenes_frames, waymo_frames
from picture3d.files import whole_file
from picture3d.formats.nuscenes_results import write_results
from picture3d.formats.openoccupancy import OccupiedVoxels, write_openoccupancy
from picture3d.formats.point_tables import parse_layout
from picture3d.formats.waymo_objects import write_objects
from picture3d.recipes.configs import DetectionConfig, OccupancyConfig, PretrainConfig
from picture3d.structures.batch import PointBatch
from picture3d.structures.detections import DetectedBoxes
from picture3d.structures.frame import Frame
from picture3d.structures.occupancy import Occupancy
from picture3d.structures.points import IntensityUnit
from picture3d.structures.poses import Pose
from picture3d.tasks.detection import DetectionTask
from picture3d.training.checkpoint import load_into, load_weights
from picture3d.training.runlog import Progress

PredictionFormat = Literal["json", "nuscenes", "waymo", "lidarseg", "occupancy", "picture"]
_OF_SUFFIX: dict[str, PredictionFormat] = {".json": "json", ".bin": "waymo", ".png": "picture"}
_PICTURE_MIN_SCORE = 0.3


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What was found in one frame: boxes, a class for each of its points, or occupied cells."""

    frame: Frame
    token: str  # the official name of the frame in a submission
    boxes: DetectedBoxes | None = None  # in the LiDAR frame
    labels: NDArray[np.int64] | None = None  # (N,) training class; 0 where there is no answer
    occupancy: Occupancy | None = None  # in the LiDAR frame


def predict(
    run: Path,
    *,
    out: Path,
    wanted: str | None,
    data: Path | None,
    split: str,
    frames: list[str],
    points: Path | None,
    layout: str,
    intensity: str,
    min_score: float | None,
    device: str,
    threads: int,
) -> str:
    """Predicts and writes; returns what to tell the user.

    Args:
        run: folder of a fine-tuning.
        out: the file (or folder, for lidarseg, occupancy and several pictures).
        wanted: one of `PredictionFormat`; None: by the suffix of `out`.
        data: folder of prepared frames; None: that of the run.
        split: whose keyframes are predicted.
        frames: "log/index" of single frames instead of a split.
        points: a sweep file instead of prepared frames.
        layout: of the columns of a ``.bin`` or ``.npy`` sweep file.
        intensity: unit of its intensity.
        min_score: boxes below are left out; None: 0.3 for pictures, 0 otherwise.
        device: where the network runs.
        threads: CPU threads.

    Raises:
        ConfigError: if the run is a pre-training, or its network cannot give what the format holds.
        DataError: if frames cannot be read, or the file cannot be written.
    """
    kind = _format(out, wanted)
    network = _Network(run, start(device, threads))
    least = (_PICTURE_MIN_SCORE if kind == "picture" else 0.0) if min_score is None else min_score
    if points is not None:
        found = network.of_file(points, layout, IntensityUnit(intensity))
    else:
        found = network.of_frames(data, split, frames)
    predictions = _Counted(_above(found, least))
    network.require(kind, *_TASKS_OF[kind])
    writer = _WRITERS[kind]
    writer(out, iter(predictions), network)
    boxes = f", {predictions.boxes:,} boxes" if isinstance(network.config, DetectionConfig) else ""
    return f"{out}: {predictions.frames:,} frames{boxes}"


class _Network:
    """A fine-tuned network of either kind."""

    def __init__(self, run: Path, device: torch.device) -> None:
        config = read_run_config(run)
        if isinstance(config, PretrainConfig):
            raise ConfigError(
                f"{run}: is a pre-training; predict needs a fine-tuned network. Run `picture3d finetune` "
                "with it as --encoder, and name that run."
            )
        self.task = build_task(config, device)
        self.classes = self.task.classes if isinstance(self.task, DetectionTask) else ()
        load_into(self.task.module, load_weights(run).tensors)
        self.run, self.config, self.device = run, config, device
        self.label_set: LabelSet | None = None
        self.dataset: PreparedDataset | None = None

    def of_frames(self, data: Path | None, split: str, names: list[str]) -> Iterator[Prediction]:
        """Predictions of the keyframes of a split, or of single frames, in order."""
        chosen = None if names else split
        batches = scoring_batches(self.config.data, root=data, split=chosen, labels=False, occupancy=False)
        dataset = self.dataset = batches.dataset
        self.label_set = dataset.label_set
        if names:
            batches.choose([_key(dataset, name) for name in names])
        with Progress("predict") as progress:
            for done, (key, batch) in enumerate(zip(batches.keys, batches.epoch(0), strict=True), start=1):
                yield self._of(dataset.frame(key, ()), sample_token(dataset, key), batch)
                progress(done, len(batches.keys))

    def of_file(self, path: Path, layout: str, unit: IntensityUnit) -> Iterator[Prediction]:
        """The prediction of one sweep file. Points that are not finite stay in their rows and get no answer."""
        points = read_points(path, parse_layout(layout), unit)
        finite = finite_points(points)
        lost = not finite.all()
        frame = Frame(path.stem, 0, path.name, 0, points.select(finite) if lost else points, None, Pose.identity())
        found = self._of(frame, path.name, collate([sweep_sample(frame, self.config.data)]))
        if found.labels is not None and lost:
            labels = np.zeros(len(points), np.int64)
            labels[finite] = found.labels
            found = Prediction(Frame(path.stem, 0, path.name, 0, points, None, Pose.identity()), path.name, labels=labels)
        yield found

    def _of(self, frame: Frame, token: str, batch: PointBatch) -> Prediction:
        batch = batch.to(self.device)
        answer = self.task.predict(batch)
        if isinstance(answer, torch.Tensor):
            # The keyframe's own points come first, whatever sweeps are merged behind them.
            return Prediction(frame, token, labels=answer.cpu().numpy()[: len(frame.points)])
        found = answer[0]
        if isinstance(found, Occupancy):
            return Prediction(frame, token, occupancy=found)
        return Prediction(frame, token, boxes=found)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, from class 0 on."""
        if isinstance(self.config, DetectionConfig):
            return ("none", *self.classes)
        if isinstance(self.config, OccupancyConfig):
            return occupancy_class_names(self.config.task.num_classes)
        if self.label_set is not None and self.label_set.num_classes == self.config.task.num_classes:
            return self.label_set.train_names
        return tuple(f"class_{index}" for index in range(self.config.task.num_classes))

    def require(self, kind: str, *wanted: str) -> None:
        """Refuses a network of another task than those that `kind` is for."""
        task = self.config.kind
        if task not in wanted:
            fits = [name for name, tasks in _TASKS_OF.items() if task in tasks]
            raise ConfigError(
                f"{self.run}: is a network for {task}, which --format {kind} cannot hold. Use {' or '.join(fits)}."
            )


class _Counted:
    """Counts what passes."""

    def __init__(self, predictions: Iterator[Prediction]) -> None:
        self._predictions = predictions
        self.frames = self.boxes = 0

    def __iter__(self) -> Iterator[Prediction]:
        for prediction in self._predictions:
            self.frames += 1
            self.boxes += 0 if prediction.boxes is None else len(prediction.boxes)
            yield prediction


def _write_json(out: Path, predictions: Iterator[Prediction], network: _Network) -> None:
    with whole_file(out) as file:
        _write_frames(file, predictions, network)


def _write_frames(file: BinaryIO, predictions: Iterator[Prediction], network: _Network) -> None:
    file.write(f'{{"run": {json.dumps(str(network.run))}, "frames": ['.encode())
    for index, prediction in enumerate(predictions):
        frame = prediction.frame
        tree: dict[str, Any] = {
            "frame": f"{frame.log}/{frame.index}",
            "token": prediction.token,
            "timestamp_us": frame.timestamp_us,
        }
        if prediction.boxes is not None:
            tree["boxes"] = _box_trees(prediction.boxes, network.names)
        if prediction.labels is not None:
            tree["labels"] = prediction.labels.tolist()
        file.write(("," if index else "").encode() + b"\n" + json.dumps(tree).encode())
    file.write(f'\n], "classes": {json.dumps(network.names)}}}\n'.encode())


def _box_trees(found: DetectedBoxes, names: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    return [
        {
            "class": names[label],
            "score": score,
            "center": box[:3],
            "size": box[3:6],
            "yaw": box[6],
            "velocity": box[7:9] if len(box) >= 9 else None,
        }
        for box, score, label in rows
    ]


def _write_nuscenes(out: Path, predictions: Iterator[Prediction], network: _Network) -> None:
    write_results(
        out,
        (
            nuscenes_frames.detections_of_frame(p.frame, p.token, p.boxes, network.classes)
            for p in predictions
            if p.boxes is not None
        ),
    )


def _write_waymo(out: Path, predictions: Iterator[Prediction], network: _Network) -> None:
    write_objects(
        out,
        (waymo_frames.detections_of_frame(p.frame, p.boxes, network.classes) for p in predictions if p.boxes is not None),
    )


def _write_lidarseg(out: Path, predictions: Iterator[Prediction], network: _Network) -> None:
    """One byte per point, as the nuScenes lidarseg challenge takes them: ``TOKEN_lidarseg.bin``, the token of the sweep."""
    for prediction in predictions:
        assert prediction.labels is not None
        with whole_file(out / f"{_file_name(prediction.frame.token)}_lidarseg.bin") as file:
            file.write(prediction.labels.astype(np.uint8).tobytes())


def _write_occupancy(out: Path, predictions: Iterator[Prediction], network: _Network) -> None:
    """Files in the layout of nuScenes-Occupancy's labels, which `picture3d score occupancy` reads."""
    grid = network.config.task.grid if isinstance(network.config, OccupancyConfig) else None
    if grid != NUSCENES_OCCUPANCY:
        raise ConfigError(f"{network.run}: answers on {grid}, the files hold {NUSCENES_OCCUPANCY}. Use --format picture.")
    for prediction in predictions:
        if network.dataset is None:
            raise ConfigError("a sweep file belongs to no scene, after which occupancy files are named. Use --format picture.")
        assert prediction.occupancy is not None
        frame = prediction.frame
        path = out / label_file_name(network.dataset, frame.log, frame.token)
        write_openoccupancy(path, OccupiedVoxels(prediction.occupancy.index, prediction.occupancy.label))


def _write_pictures(out: Path, predictions: Iterator[Prediction], network: _Network) -> None:
    """One picture if `out` is a .png, else a folder with one for each frame."""
    if out.suffix.lower() == ".png":
        first, *others = itertools.islice(predictions, 2)
        if others:
            raise ConfigError(f"{out}: is one picture, there are more frames. Name one with --frame, or give a folder.")
        _write_picture(out, first, network)
        return
    for prediction in predictions:
        frame = prediction.frame
        _write_picture(out / f"{_file_name(frame.log)}_{frame.index:05d}.png", prediction, network)


def _write_picture(path: Path, prediction: Prediction, network: _Network) -> None:
    with whole_file(path) as file:
        file.write(_picture(prediction, network.names))


def _picture(prediction: Prediction, names: tuple[str, ...]) -> bytes:
    from picture3d.view.box_overlay import draw_boxes
    from picture3d.view.colors import class_colors, label_colors, ramp_colors
    from picture3d.view.pictures import bird_eye, page_from_lidar, png_bytes

    upright = page_from_lidar(prediction.frame.ego_from_lidar)
    if prediction.occupancy is not None:  # from above: the highest occupied cell of each column
        cells = prediction.occupancy
        column = cells.index[:, 0].astype(np.int64) * cells.grid.shape[1] + cells.index[:, 1]
        highest = np.flatnonzero(np.diff(column, append=-1))  # cells are sorted by x, y, z
        colors = label_colors(cells.label[highest].astype(np.int64), names)
        return png_bytes(bird_eye(upright.apply(cells.centres[highest].astype(np.float32)), colors, size_px=960))
    xyz = upright.apply(prediction.frame.points.xyz)
    if prediction.labels is not None:
        return png_bytes(bird_eye(xyz, label_colors(prediction.labels, names), size_px=960))
    picture = bird_eye(xyz, ramp_colors(xyz[:, 2], limits=(-3.0, 3.0)), size_px=960)
    if prediction.boxes is not None and len(prediction.boxes):
        boxes = prediction.boxes.boxes.cpu().numpy()
        table = class_colors(names)
        r_g_b = [tuple(int(part) for part in table[label]) for label in prediction.boxes.labels.tolist()]
        colors = [(red, green, blue) for red, green, blue in r_g_b]
        center, yaw = upright.apply(boxes[:, :3]), boxes[:, 6] + upright.yaw
        picture = draw_boxes(picture, center, boxes[:, 3:6], yaw, colors=colors)
    return png_bytes(picture)


_WRITERS: dict[PredictionFormat, Callable[[Path, Iterator[Prediction], _Network], None]] = {
    "json": _write_json,
    "nuscenes": _write_nuscenes,
    "waymo": _write_waymo,
    "lidarseg": _write_lidarseg,
    "occupancy": _write_occupancy,
    "picture": _write_pictures,
}
_TASKS_OF: dict[PredictionFormat, tuple[str, ...]] = {
    "json": ("segmentation", "detection"),
    "nuscenes": ("detection",),
    "waymo": ("detection",),
    "lidarseg": ("segmentation",),
    "occupancy": ("occupancy",),
    "picture": ("segmentation", "detection", "occupancy"),
}


def _format(out: Path, wanted: str | None) -> PredictionFormat:
    if wanted is None:
        if out.suffix.lower() not in _OF_SUFFIX:
            raise ConfigError(f"{out}: the name does not say which format is wanted; add --format {' | '.join(_WRITERS)}")
        return _OF_SUFFIX[out.suffix.lower()]
    for kind in _WRITERS:
        if kind == wanted:
            return kind
    raise ConfigError(f"no format is called '{wanted}'. Choose one of {', '.join(_WRITERS)}")


def _above(predictions: Iterator[Prediction], least: float) -> Iterator[Prediction]:
    for prediction in predictions:
        if prediction.boxes is None or least <= 0:
            yield prediction
            continue
        kept = prediction.boxes.scores >= least
        found = DetectedBoxes(prediction.boxes.boxes[kept], prediction.boxes.scores[kept], prediction.boxes.labels[kept])
        yield Prediction(prediction.frame, prediction.token, boxes=found)


def _key(dataset: PreparedDataset, name: str) -> FrameKey:
    log, _, index = name.rpartition("/")
    if not log or not index.isdigit() or log not in dataset.logs() or int(index) >= dataset.summary(log).frames:
        raise DataError(
            f"{dataset.root}: there is no frame {name}. Frames go by LOG/INDEX: take a log that `picture3d data info` lists."
        )
    return FrameKey(log, int(index))


def _file_name(token: str) -> str:
    """A token that can be the name of a file and of nothing else."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in token)
    return name.lstrip(".") or "frame"
