"""One training sample: a keyframe with earlier sweeps merged in, features scaled, targets attached, augmented, cropped.

The order matters and is fixed: merge sweeps -> features -> (targets by row of the un-augmented keyframe) -> augment -> crop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from picture3d.config import FrozenConfig
from picture3d.datasets.augment import AugmentConfig, affine, draw_augmentation
from picture3d.datasets.detection_classes import DetectionClasses
from picture3d.datasets.object_sampling_config import ObjectSamplingConfig
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.datasets.sensor_intensity import IntensityTable, scale_intensity
from picture3d.datasets.source_config import Fillable, IntensityScale, SourceConfig
from picture3d.errors import DataError
from picture3d.structures.boxes import Boxes
from picture3d.structures.frame import Frame
from picture3d.structures.occupancy import Occupancy
from picture3d.structures.points import PointCloud
from picture3d.structures.targets import FeatureSource, FrameTargets

EGO_RADIUS_M = 1.0  # points of earlier sweeps closer than this in |x| and |y| are the car itself


class DataConfig(FrozenConfig):
    """Which frames are loaded and how they become network input."""

    root: Path = Field(description="Folder of prepared frames.")
    split: str | None = Field(default="train", description="Name of a split; null takes every log.")
    label_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the labelled logs used; a smaller share is a subset of a larger one. Objects of others "
        "are not pasted.",
    )
    label_seed: int = Field(default=0, ge=0, description="Which logs a share holds.")
    every: int = Field(default=1, ge=1, description="Take every n-th keyframe of the list; 1 takes all.")
    max_frames: int | None = Field(default=None, ge=1, description="At most so many keyframes, evenly spread over the list.")
    sweeps: int = Field(default=1, ge=1, description="Sweeps merged into a sample, the keyframe included.")
    features: tuple[Literal["intensity", "time_lag", "elongation"], ...] = Field(
        default=("intensity",), description="Values per point besides x y z: intensity, time_lag (s), elongation (tanh of it)."
    )
    intensity_scale: IntensityScale = Field(
        default="unit",
        description="unit: 0..1 whatever was stored; raw: as stored; tanh: tanh of the 0..1 value; sensor_scale, "
        "sensor_quantile: 0..1 by the table of each sensor that `picture3d data intensity` makes.",
    )
    fill: tuple[Fillable, ...] = Field(default=(), description="Features that the dataset lacks and that are set to 0.")
    also: tuple[SourceConfig, ...] = Field(default=(), description="Further datasets, mixed in by weight in training.")
    range_min: tuple[float, float, float] | None = Field(default=None, description="Crop, metres x y z, inclusive.")
    range_max: tuple[float, float, float] | None = Field(default=None, description="Crop, metres x y z, inclusive.")
    crop_z: bool = Field(default=True, description="Crop z too, not only x and y.")
    augment: AugmentConfig | None = Field(default=None, description="null: points as they are.")
    shuffle_points: bool = Field(default=False, description="Shuffle the points of a sample.")
    labels: bool = Field(default=True, description="Read the labels where there are some.")
    labelled_only: bool = Field(
        default=False, description="Leave out keyframes without a label per point (four of five of Waymo's)."
    )
    box_classes: tuple[str, ...] = Field(
        default=(), description="Read the boxes of these classes (see datasets/detection_classes.py); empty: no boxes."
    )
    occupancy: bool = Field(
        default=False, description="Read the occupancy labels, and take only keyframes that have some (`prepare occupancy`)."
    )
    min_box_points: int = Field(default=1, ge=0, description="Boxes with fewer LiDAR points are not learned from.")
    balance_classes: bool = Field(
        default=False, description="Repeat and leave out frames until every box class has as many as the others (CBGS)."
    )
    objects: ObjectSamplingConfig | None = Field(
        default=None, description="Paste objects of other frames; `picture3d data objects` makes the database."
    )
    objects_off_last: int = Field(default=0, ge=0, description="No object is pasted in so many last epochs.")
    augment_off_last: int = Field(default=0, ge=0, description="Nothing is pasted or augmented in so many last epochs.")
    shuffle: bool = Field(default=True, description="Draw a new order of frames for every epoch.")
    shuffle_window: int | None = Field(
        default=None, ge=1, description="Shuffle so that only so many logs of a dataset are read at a time; null: over all."
    )
    drop_last: bool = Field(default=True, description="Leave out an incomplete last batch.")
    cache_bytes: int = Field(default=0, ge=0, description="Keep decoded samples in memory up to so many bytes; for small data.")

    @model_validator(mode="after")
    def _range_is_whole(self) -> Self:
        if (self.range_min is None) != (self.range_max is None):
            raise ValueError("range_min and range_max belong together: set both or neither")
        if self.range_min is not None and self.range_max is not None:
            for axis, low, high in zip("xyz", self.range_min, self.range_max, strict=True):
                if not low < high:
                    raise ValueError(f"range {axis}: {low} is not below {high}")
        if not self.box_classes and (self.balance_classes or self.objects is not None):
            raise ValueError("balance_classes and objects need the names of classes in box_classes")
        if self.occupancy and self.augment is not None and not self.augment.keeps_cells:
            raise ValueError(
                "occupancy labels are cells, which only flips and quarter turns take to cells: set augment.rotation=0, "
                "augment.scale=[1,1] and augment.translation=0 (and augment.quarter_turns=true), or augment=null"
            )
        if self.occupancy and self.objects is not None:
            raise ValueError("occupancy labels do not know of pasted objects: set objects=null")
        if len(set(self.features)) != len(self.features):
            raise ValueError("features names a column twice")
        if self.objects is not None and self.intensity_scale.startswith("sensor_"):
            raise ValueError(
                f"objects are stored without the sensor that saw them, so intensity_scale={self.intensity_scale} cannot be "
                "used for them; set unit or tanh, or objects=null"
            )
        return self

    def of_source(self, source: SourceConfig) -> DataConfig:
        """How the frames of a further dataset become input: as these, but for what `source` says.

        Raises:
            ConfigError: if that contradicts itself.
        """
        own = {"root": source.root, "split": source.split, "every": source.every, "max_frames": source.max_frames}
        own |= {"fill": source.fill, "also": ()}
        if source.intensity_scale is not None:
            own["intensity_scale"] = source.intensity_scale
        return DataConfig.from_tree(self.model_dump() | own, source=f"data.also, {source.name or source.root}")


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Network input made of one keyframe; all columns have N rows. The keyframe's points come first unless shuffled."""

    name: str  # "log/index"
    xyz: NDArray[np.float32]  # (N, 3) float32, metres, the keyframe's LiDAR frame
    features: NDArray[np.float32]  # (N, F) float32, as `DataConfig.features`
    point_id: NDArray[np.int64]  # (N,) int64: row in the un-augmented keyframe; -1 for points of earlier sweeps
    labels: NDArray[np.int64] | None = None  # (N,) int64 training class, 0 = ignored; 0 for points of earlier sweeps
    boxes: Boxes | None = None  # of the training classes
    box_class: NDArray[np.int64] | None = None  # (B,) int64 1-based training class; with `boxes`
    targets: FrameTargets | None = None
    occupancy: Occupancy | None = None  # of the keyframe's LiDAR frame, whole: it is not cropped

    @property
    def nbytes(self) -> int:
        """Bytes its arrays take."""
        arrays = [self.xyz, self.features, self.point_id, self.labels, self.box_class]
        if self.boxes is not None:
            arrays += [self.boxes.center, self.boxes.size, self.boxes.yaw, self.boxes.velocity, self.boxes.num_points]
        if self.targets is not None:
            arrays += [self.targets.features, self.targets.superclass, self.targets.point_cell]
        if self.occupancy is not None:
            arrays += [self.occupancy.index, self.occupancy.label]
        return sum(array.nbytes for array in arrays if array is not None)

    @property
    def point_cell(self) -> NDArray[np.int64] | None:
        """(N,) int64: row in `targets.features` of each point, -1 where it has none; None without targets."""
        if self.targets is None:
            return None
        cell = np.full(len(self.xyz), -1, np.int64)
        own = self.point_id >= 0
        cell[own] = self.targets.point_cell[self.point_id[own]]
        return cell

    def renamed(self, name: str) -> Sample:
        """The same under another name."""
        return replace(self, name=name)

    def select(self, rows: NDArray[np.bool_] | NDArray[np.integer]) -> Sample:
        """The points chosen by a boolean mask or an index."""
        if rows.dtype == np.bool_:
            rows = np.flatnonzero(rows)
        return replace(  # `take` needs a third of the time of an index in brackets
            self,
            xyz=self.xyz.take(rows, 0),
            features=self.features.take(rows, 0),
            point_id=self.point_id.take(rows),
            labels=None if self.labels is None else self.labels.take(rows),
        )

    def select_boxes(self, rows: NDArray[np.bool_]) -> Sample:
        """The boxes chosen by a boolean mask; the sample itself if it has none."""
        if self.boxes is None or self.box_class is None:
            return self
        return replace(self, boxes=self.boxes.select(rows), box_class=self.box_class[rows])


def load_sample(
    dataset: PreparedDataset,
    key: FrameKey,
    config: DataConfig,
    rng: np.random.Generator | None,
    *,
    targets: FeatureSource | None = None,
) -> Sample:
    """Reads, merges, augments and crops one sample; `rng` None leaves augmentation and point shuffling out.

    Raises:
        DataError: if a file is damaged, or a frame lacks what the config asks for (poses, elongation, unit of intensity).
    """
    return finish_sample(read_sample(dataset, key, config, targets=targets), config, rng)


def read_sample(dataset: PreparedDataset, key: FrameKey, config: DataConfig, *, targets: FeatureSource | None = None) -> Sample:
    """The part of :func:`load_sample` that is the same in every epoch: nothing random, nothing cropped."""
    columns = {name for name, used in (("labels", config.labels), ("boxes", config.box_classes)) if used}
    if "elongation" in config.features:
        columns.add("elongation")
    table = None
    if "intensity" in config.features and config.intensity_scale.startswith("sensor_"):
        columns.add("sensor")
        table = dataset.intensity()
    reader = dataset.reader(key.log)
    frame = reader.frame(key.index, columns)
    sweeps = [frame.points]
    xyz = [frame.points.xyz]
    lags = [0.0]
    for earlier in frame.previous[: config.sweeps - 1]:
        sweep = reader.frame(earlier, columns - {"labels", "boxes"})
        points = without_ego(sweep.points)
        sweeps.append(points)
        xyz.append(move_sweep(points.xyz, sweep, frame))
        lags.append((frame.timestamp_us - sweep.timestamp_us) * 1e-6)
    count = [len(points) for points in sweeps]
    total = sum(count)
    point_id = np.full(total, -1, np.int64)
    point_id[: count[0]] = np.arange(count[0])
    labels = None
    if frame.labels is not None:
        if dataset.label_set is None:
            raise DataError(
                f"{dataset.root}: frames have labels, but dataset.json names no label set. Prepare with --label-set."
            )
        labels = np.zeros(total, np.int64)
        labels[: count[0]] = dataset.label_set.to_train(frame.labels)
    found = None if targets is None else targets.targets(frame)
    if found is not None and len(found.point_cell) != count[0]:
        raise DataError(
            f"{key}: the targets were computed for {len(found.point_cell)} points, the frame has {count[0]}. "
            "The data changed since; run `picture3d targets` again."
        )
    boxes, box_class = _boxes(frame, config)
    return Sample(
        name=str(key),
        xyz=np.concatenate(xyz),
        features=_features(sweeps, lags, config, key, table),
        point_id=point_id,
        labels=labels,
        boxes=boxes,
        box_class=box_class,
        targets=found,
        occupancy=dataset.occupancy().of(frame) if config.occupancy else None,
    )


def sweep_sample(frame: Frame, config: DataConfig) -> Sample:
    """Input made of one sweep that need not be part of a dataset, its points in their order; nothing is merged or cropped.

    Raises:
        DataError: if the points lack what the config asks for (elongation, unit of intensity).
    """
    key = FrameKey(frame.log, frame.index)
    return Sample(
        name=str(key),
        xyz=frame.points.xyz,
        features=_features([frame.points], [0.0], config, key, None),
        point_id=np.arange(len(frame.points)),
    )


def finish_sample(sample: Sample, config: DataConfig, rng: np.random.Generator | None, *, augment: bool = True) -> Sample:
    """The part of :func:`load_sample` that differs between epochs: augments (unless told not to), crops, shuffles."""
    if config.augment is not None and rng is not None and augment:
        drawn = draw_augmentation(config.augment, rng)
        boxes = None if sample.boxes is None else drawn.boxes(sample.boxes)
        occupancy = None if sample.occupancy is None else drawn.occupancy(sample.occupancy)
        sample = replace(sample, xyz=drawn.points(sample.xyz), boxes=boxes, occupancy=occupancy)
    rows: NDArray[np.integer] | None = None  # those that stay, in their new order: the points are moved in memory once
    if config.range_min is not None and config.range_max is not None:
        inside = _inside(sample.xyz, config.range_min, config.range_max, axes=3 if config.crop_z else 2)
        rows = None if inside.all() else np.flatnonzero(inside)
        if sample.boxes is not None:
            sample = sample.select_boxes(_inside(sample.boxes.center, config.range_min, config.range_max, axes=3))
    if config.shuffle_points and rng is not None:
        order = rng.permutation(len(sample.xyz) if rows is None else len(rows))
        rows = order if rows is None else rows[order]
    return sample if rows is None else sample.select(rows)


def _boxes(frame: Frame, config: DataConfig) -> tuple[Boxes | None, NDArray[np.int64] | None]:
    """The boxes that are learned from, and their classes; a count of points that is not known is no reason to leave one out."""
    if not config.box_classes:
        return None, None
    if frame.boxes is None:  # learned from, it would teach that nothing is there
        raise DataError(
            f"{frame.log}/{frame.index}: was not annotated with boxes, but data.box_classes asks for some. Choose a split "
            "whose frames are annotated, or prepare the data with its boxes."
        )
    classes = DetectionClasses(config.box_classes).of(frame.boxes.category)
    unseen = (frame.boxes.num_points >= 0) & (frame.boxes.num_points < config.min_box_points)
    used = (classes > 0) & ~unseen
    return frame.boxes.select(used), classes[used]


def _inside(
    xyz: NDArray[np.float32] | NDArray[np.float64],
    low: tuple[float, float, float],
    high: tuple[float, float, float],
    *,
    axes: int,
) -> NDArray[np.bool_]:
    """(N,) bool: inside of the box, its faces included; bounds are compared as float32, as the points are stored."""
    inside = np.ones(len(xyz), np.bool_)
    for axis in range(axes):
        inside &= (xyz[:, axis] >= np.float32(low[axis])) & (xyz[:, axis] <= np.float32(high[axis]))
    return inside


def without_ego(points: PointCloud) -> PointCloud:
    """The points further than `EGO_RADIUS_M` from the sensor in x or in y: what is nearer is the car itself."""
    near = (np.abs(points.xyz[:, 0]) < EGO_RADIUS_M) & (np.abs(points.xyz[:, 1]) < EGO_RADIUS_M)
    return points.select(~near) if near.any() else points


def move_sweep(xyz: NDArray[np.float32], sweep: Frame, keyframe: Frame) -> NDArray[np.float32]:
    """(N, 3) points of `sweep`, taken from its LiDAR frame to the LiDAR frame of `keyframe` by the two poses.

    Raises:
        DataError: if one of them has no pose.
    """
    if sweep.global_from_lidar is None or keyframe.global_from_lidar is None:
        raise DataError(
            f"{keyframe.log}/{keyframe.index}: several sweeps were asked for, but this log has no poses. "
            "Use sweeps=1, or prepare the data with poses."
        )
    keyframe_from_sweep = keyframe.global_from_lidar.inverse() @ sweep.global_from_lidar
    return affine(xyz, keyframe_from_sweep.rotation, keyframe_from_sweep.translation)


def _features(
    sweeps: list[PointCloud], lags: list[float], config: DataConfig, key: FrameKey, table: IntensityTable | None
) -> NDArray[np.float32]:
    out = np.zeros((sum(len(points) for points in sweeps), len(config.features)), np.float32)
    for column, feature in enumerate(config.features):
        start = 0
        for points, lag in zip(sweeps, lags, strict=True):
            rows = slice(start, start := start + len(points))
            match feature:
                case "intensity":
                    if "intensity" in config.fill:
                        continue
                    try:
                        out[rows, column] = scale_intensity(points, config.intensity_scale, table)
                    except DataError as error:
                        raise DataError(f"{key}: {error}") from None
                case "time_lag":
                    out[rows, column] = lag
                case "elongation":
                    if "elongation" in config.fill:
                        continue
                    if points.elongation is None:
                        raise DataError(
                            f"{key}: has no elongation; take 'elongation' out of features, or let fill name it for 0"
                        )
                    out[rows, column] = np.tanh(points.elongation)
    return out
