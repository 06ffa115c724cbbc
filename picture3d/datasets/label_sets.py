"""What the label byte of a point means: raw ids of a dataset -> the classes a network is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from picture3d.config import nearest
from picture3d.errors import DataError
from picture3d.formats.lidarseg_categories import LIDARSEG_CATEGORIES, LIDARSEG_CLASSES


@dataclass(frozen=True, slots=True, eq=False)
class LabelSet:
    """The classes of a dataset and how they map to training classes; training class 0 is ignored in losses and scores."""

    name: str
    class_names: tuple[str, ...]  # raw ids in order; ids beyond the last name are unknown and ignored
    train_names: tuple[str, ...]  # training ids in order, [0] is the ignored one
    train_ids: NDArray[np.uint8]  # (256,) raw id -> training id

    def to_train(self, labels: NDArray[np.uint8]) -> NDArray[np.int64]:
        """(N,) raw labels -> (N,) int64 training classes."""
        return self.train_ids[labels].astype(np.int64)

    @property
    def num_classes(self) -> int:
        """Training classes, the ignored one included."""
        return len(self.train_names)


def label_set(name: str) -> LabelSet:
    """The label set of that name.

    Raises:
        DataError: naming the nearest one, if there is none.
    """
    known = {found.name: found for found in (_nuscenes_32(), _nuscenes_16(), _semantickitti(), _waymo(), _plain())}
    if name not in known:
        guess = nearest(name, known)
        hint = f"Did you mean '{guess}'?" if guess else f"Choose one of {', '.join(known)}."
        raise DataError(f"unknown label set '{name}'. {hint}")
    return known[name]


_NUSCENES_TRAIN_NAMES = (
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


@cache
def _nuscenes_32() -> LabelSet:
    table = np.zeros(256, np.uint8)
    for raw, train in LIDARSEG_CLASSES.items():
        table[raw] = train
    return LabelSet("nuscenes-32", LIDARSEG_CATEGORIES, _NUSCENES_TRAIN_NAMES, _frozen(table))


@cache
def _nuscenes_16() -> LabelSet:
    table = np.zeros(256, np.uint8)
    table[:17] = np.arange(17)
    return LabelSet("nuscenes-16", _NUSCENES_TRAIN_NAMES, _NUSCENES_TRAIN_NAMES, _frozen(table))


# Raw SemanticKITTI id -> name and class of the single-scan benchmark (`labels` and `learning_map` of config/semantic-kitti.yaml
# in the official semantic-kitti-api, compared id by id), in order of the ids. They go up to 259: a label byte holds the place
# in this table.
_SEMANTICKITTI = {
    0: ("unlabeled", 0), 1: ("outlier", 0), 10: ("car", 1), 11: ("bicycle", 2), 13: ("bus", 5), 15: ("motorcycle", 3),
    16: ("on-rails", 5), 18: ("truck", 4), 20: ("other-vehicle", 5), 30: ("person", 6), 31: ("bicyclist", 7),
    32: ("motorcyclist", 8), 40: ("road", 9), 44: ("parking", 10), 48: ("sidewalk", 11), 49: ("other-ground", 12),
    50: ("building", 13), 51: ("fence", 14), 52: ("other-structure", 0), 60: ("lane-marking", 9), 70: ("vegetation", 15),
    71: ("trunk", 16), 72: ("terrain", 17), 80: ("pole", 18), 81: ("traffic-sign", 19), 99: ("other-object", 0),
    252: ("moving-car", 1), 253: ("moving-bicyclist", 7), 254: ("moving-person", 6), 255: ("moving-motorcyclist", 8),
    256: ("moving-on-rails", 5), 257: ("moving-bus", 5), 258: ("moving-truck", 4), 259: ("moving-other-vehicle", 5),
}  # fmt: skip
SEMANTICKITTI_IDS = tuple(_SEMANTICKITTI)

_SEMANTICKITTI_TRAIN_NAMES = (
    "ignored",
    "car",
    "bicycle",
    "motorcycle",
    "truck",
    "other-vehicle",
    "person",
    "bicyclist",
    "motorcyclist",
    "road",
    "parking",
    "sidewalk",
    "other-ground",
    "building",
    "fence",
    "vegetation",
    "trunk",
    "terrain",
    "pole",
    "traffic-sign",
)


@cache
def _semantickitti() -> LabelSet:
    table = np.zeros(256, np.uint8)
    table[: len(_SEMANTICKITTI)] = [train for _, train in _SEMANTICKITTI.values()]
    names = tuple(name for name, _ in _SEMANTICKITTI.values())
    return LabelSet("semantickitti", names, _SEMANTICKITTI_TRAIN_NAMES, _frozen(table))


# Segmentation.Type of waymo-open-dataset's segmentation.proto, in order; 0 is undefined.
_WAYMO_NAMES = (
    "ignored",
    "car",
    "truck",
    "bus",
    "other_vehicle",
    "motorcyclist",
    "bicyclist",
    "pedestrian",
    "sign",
    "traffic_light",
    "pole",
    "construction_cone",
    "bicycle",
    "motorcycle",
    "building",
    "vegetation",
    "tree_trunk",
    "curb",
    "road",
    "lane_marker",
    "other_ground",
    "walkable",
    "sidewalk",
)


@cache
def _waymo() -> LabelSet:
    table = np.zeros(256, np.uint8)
    table[: len(_WAYMO_NAMES)] = np.arange(len(_WAYMO_NAMES))
    return LabelSet("waymo", _WAYMO_NAMES, _WAYMO_NAMES, _frozen(table))


@cache
def _plain() -> LabelSet:
    names = ("ignored", *(f"class_{i}" for i in range(1, 256)))
    return LabelSet("plain", names, names, _frozen(np.arange(256, dtype=np.uint8)))


def _frozen(table: NDArray[np.uint8]) -> NDArray[np.uint8]:
    table.setflags(write=False)
    return table


NUSCENES_32 = _nuscenes_32()
NUSCENES_16 = _nuscenes_16()
SEMANTICKITTI = _semantickitti()
WAYMO = _waymo()
