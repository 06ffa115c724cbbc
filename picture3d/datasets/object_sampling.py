"""Pastes objects of other frames into a training sample ("GT sampling", Yan et al., SECOND, Sensors 2018).

Per class as many objects are drawn as are wanted but not present. One whose box shares area, seen from above, with a box that
is there already is left out and not replaced by another. Scene points inside of a pasted box go, the object's points come; it
keeps the place and the height at which it was annotated, in the LiDAR frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from picture3d.config import nearest
from picture3d.datasets.detection_classes import DetectionClasses
from picture3d.datasets.frame_choice import labelled_share
from picture3d.datasets.object_database import ObjectDatabase, StoredObject
from picture3d.datasets.object_geometry import inside_any, meet_from_above
from picture3d.datasets.object_sampling_config import ObjectSamplingConfig
from picture3d.datasets.prepared import FrameKey, PreparedDataset
from picture3d.datasets.samples import DataConfig, Sample
from picture3d.datasets.sensor_intensity import scale_intensity
from picture3d.datasets.source_config import IntensityScale
from picture3d.errors import ConfigError, DataError
from picture3d.structures.boxes import Boxes
from picture3d.structures.points import PointCloud


@dataclass(frozen=True, slots=True)
class _Drawn:
    """An object that was drawn, with those of its points that are used."""

    object: StoredObject
    class_index: int  # 1-based
    points: NDArray[np.intp]  # rows


class ObjectSampler:
    """Pastes objects; holds the database and, per class, which of its objects may be drawn. Can be sent to another process."""

    def __init__(
        self,
        database: ObjectDatabase,
        config: ObjectSamplingConfig,
        classes: DetectionClasses,
        data: DataConfig,
        labelled: Iterable[FrameKey] | None = None,
    ) -> None:
        """Finds the objects that may be drawn.

        Args:
            database: where objects come from.
            config: how many of which.
            classes: of the head that is trained.
            data: how samples are made; an object's points get the same features.
            labelled: keyframes whose annotations may be used; None: those of the whole database.

        Raises:
            ConfigError: if the config names a class the head does not have, or the database lacks what is asked for: the
                elongation, a difficulty, the same number of sweeps.
        """
        self.config = config
        self.database = database
        self.classes = classes
        for name in config.fill_to:
            if name not in classes.names:
                guess = nearest(name, classes.names)
                hint = f" Did you mean '{guess}'?" if guess else f" Choose among {', '.join(classes.names)}."
                raise ConfigError(f"object sampling: fill_to names '{name}', which the head does not have.{hint}")
        if "elongation" in data.features and not database.has_elongation:
            raise ConfigError(f"{database.path}: its points have no elongation; take 'elongation' out of data.features")
        if -1 in config.without_difficulties and len(database) and not database.has_difficulty:
            raise ConfigError(f"{database.path}: tells no difficulty; set without_difficulties=[] for this dataset")
        if database.sweeps != data.sweeps and config.max_time_lag_s is None:
            raise ConfigError(
                f"{database.path}: its objects hold the points of {database.sweeps} sweeps, the samples those of "
                f"{data.sweeps}. Make one with `picture3d data objects --sweeps {data.sweeps}`, or set max_time_lag_s."
            )
        self._features = data.features
        self._scale: IntensityScale = data.intensity_scale
        of_object = database.classes(classes)
        allowed = ~np.isin(database.difficulty, np.array(config.without_difficulties, np.int8))
        if labelled is not None:
            allowed &= database.cut_from(labelled)
        self.candidates: dict[int, NDArray[np.int64]] = {}  # 1-based class -> rows of the database that may be drawn
        for number, name in enumerate(classes.names, start=1):
            if config.fill_to.get(name, 0) > 0:
                enough = database.count >= self._min_points(name)
                self.candidates[number] = np.flatnonzero((of_object == number) & allowed & enough)

    def paste(self, sample: Sample, classes: DetectionClasses, rng: np.random.Generator) -> Sample:
        """The sample with objects pasted in; the sample itself if it was not annotated or nothing could be pasted.

        To be used before augmentation and crop. Rows that stay keep their order, `point_id` and labels; the objects' points
        follow them with `point_id` -1 and label 0. The boxes that were there stay in front. Random numbers are drawn from
        `rng` alone.

        Raises:
            DataError: if the database is damaged, or holds intensities of an unknown unit.
            ValueError: if `classes` are not those of the sampler.
        """
        if classes != self.classes:
            raise ValueError(f"the sampler was made for the classes {self.classes.names}, not for {classes.names}")
        if sample.boxes is None or sample.box_class is None:
            return sample
        standing = _table(sample.boxes)
        if not np.isfinite(standing[:, :7]).all():
            raise DataError(f"{sample.name}: a box holds NaN or infinity. Run `picture3d check` on the prepared frames.")
        drawn: list[_Drawn] = []
        for number, rows in self.candidates.items():
            name = classes.names[number - 1]
            missing = self.config.fill_to[name] - int(np.count_nonzero(sample.box_class == number))
            if missing > 0 and len(rows):
                found = [self._take(int(row), number) for row in rng.choice(rows, min(missing, len(rows)), replace=False)]
                drawn += [one for one in found if len(one.points) >= self._min_points(name)]
        if not drawn:
            return sample
        kept = _free(np.stack([one.object.box for one in drawn]), standing)
        return self._pasted(sample, [drawn[i] for i in kept]) if kept else sample

    def _min_points(self, name: str) -> int:
        return self.config.min_points.get(name, self.config.default_min_points)

    def _take(self, row: int, class_index: int) -> _Drawn:
        found = self.database.object(row)
        limit = self.config.max_time_lag_s
        used = np.ones(len(found.xyz), np.bool_) if limit is None else found.time_lag <= np.float32(limit + 1e-6)
        return _Drawn(found, class_index, np.flatnonzero(used))

    def _pasted(self, sample: Sample, pasted: Sequence[_Drawn]) -> Sample:
        assert sample.boxes is not None
        assert sample.box_class is not None
        boxes = np.stack([drawn.object.box for drawn in pasted])
        covered = inside_any(sample.xyz, boxes)
        scene = sample.select(np.flatnonzero(~covered)) if covered.any() else sample
        counts = [len(drawn.points) for drawn in pasted]
        added = sum(counts)
        return replace(
            scene,
            xyz=np.concatenate([scene.xyz, *(drawn.object.points_lidar_m[drawn.points] for drawn in pasted)]),
            features=np.concatenate([scene.features, *(self._features_of(drawn) for drawn in pasted)]),
            point_id=np.concatenate([scene.point_id, np.full(added, -1, np.int64)]),
            labels=None if scene.labels is None else np.concatenate([scene.labels, np.zeros(added, np.int64)]),
            boxes=_joined(sample.boxes, boxes, pasted, counts),
            box_class=np.concatenate([sample.box_class, np.array([drawn.class_index for drawn in pasted], np.int64)]),
        )

    def _features_of(self, drawn: _Drawn) -> NDArray[np.float32]:
        found, rows = drawn.object, drawn.points
        out = np.zeros((len(rows), len(self._features)), np.float32)
        for column, feature in enumerate(self._features):
            match feature:
                case "intensity":
                    cloud = PointCloud(found.xyz[rows], found.intensity[rows], found.unit)
                    try:
                        out[:, column] = scale_intensity(cloud, self._scale)
                    except DataError as error:
                        raise DataError(f"{self.database.path}: {error}") from None
                case "time_lag":
                    out[:, column] = found.time_lag[rows]
                case "elongation":
                    assert found.elongation is not None
                    out[:, column] = np.tanh(found.elongation[rows])
        return out


def open_sampler(
    config: ObjectSamplingConfig, classes: DetectionClasses, data: DataConfig, dataset: PreparedDataset
) -> ObjectSampler:
    """The sampler for samples of `data`, its database found beside the prepared frames.

    With a share of the labels (`data.label_share`) it pastes objects of the labelled keyframes only. A database that was cut
    out of another dataset is taken whole.

    Raises:
        DataError: if the database is missing or damaged, or `dataset` has other frames than it was cut out of.
        ConfigError: see :class:`ObjectSampler`.
    """
    database = ObjectDatabase(config.path(data.root))
    if database.path.parent.parent != dataset.root:
        return ObjectSampler(database, config, classes, data)
    known = set(dataset.logs())
    if not known.issuperset(database.logs) or dataset.fingerprint_of(database.logs) != database.identity.get("fingerprint"):
        raise DataError(
            f"{database.path}: was cut out of other frames than {dataset.root} holds now. Run `picture3d data objects "
            f"{dataset.root}` again."
        )
    return ObjectSampler(database, config, classes, data, None if data.label_share == 1.0 else labelled_share(dataset, data))


def _free(boxes: NDArray[np.float64], standing: NDArray[np.float64]) -> list[int]:
    """Which of (B, 9) drawn boxes can stay, in order: they meet neither a standing one nor a drawn one that stays."""
    clear = ~meet_from_above(boxes, standing).any(axis=1)
    meeting = meet_from_above(boxes, boxes)
    kept: list[int] = []
    for i in np.flatnonzero(clear):
        if not meeting[i, kept].any():
            kept.append(int(i))
    return kept


def _table(boxes: Boxes) -> NDArray[np.float64]:
    """(B, 9) float64 x y z l w h yaw vx vy."""
    return np.concatenate([boxes.center, boxes.size, boxes.yaw[:, None], boxes.velocity], axis=1)


def _joined(boxes: Boxes, added: NDArray[np.float64], pasted: Sequence[_Drawn], counts: Sequence[int]) -> Boxes:
    """The scene's boxes, then the pasted ones; columns that a database does not keep are unknown for these."""
    new = len(pasted)
    difficulty = np.array([drawn.object.difficulty for drawn in pasted], np.int8)
    return Boxes(
        center=np.concatenate([boxes.center, added[:, 0:3]]),
        size=np.concatenate([boxes.size, added[:, 3:6]]),
        yaw=np.concatenate([boxes.yaw, added[:, 6]]),
        velocity=np.concatenate([boxes.velocity, added[:, 7:9]]),
        category=boxes.category + tuple(drawn.object.category for drawn in pasted),
        track_id=boxes.track_id
        + tuple(f"pasted:{drawn.object.log}/{drawn.object.frame}:{drawn.object.row}" for drawn in pasted),
        num_points=np.concatenate([boxes.num_points, np.array(counts, np.int32)]),
        num_radar_points=None
        if boxes.num_radar_points is None
        else np.concatenate([boxes.num_radar_points, np.full(new, -1, np.int32)]),
        attribute=None if boxes.attribute is None else boxes.attribute + ("",) * new,
        difficulty=None if boxes.difficulty is None else np.concatenate([boxes.difficulty, difficulty]),
        acceleration=None if boxes.acceleration is None else np.concatenate([boxes.acceleration, np.full((new, 2), np.nan)]),
    )
