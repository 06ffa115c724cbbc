from __future__ import annotations

import numpy as np
import pytest

from picture3d.datasets.label_sets import NUSCENES_16, NUSCENES_32, label_set
from picture3d.errors import DataError

# Raw ids of each of the 17 training classes, as the segmentation specification tabulates them.
RAW_IDS = [
    [0, 1, 5, 7, 8, 10, 11, 13, 19, 20, 29, 31], [9], [14], [15, 16], [17], [18], [21], [2, 3, 4, 6], [12], [22], [23], [24],
    [25], [26], [27], [28], [30],
]  # fmt: skip


def test_each_raw_lidarseg_id_becomes_its_training_class():
    assert sorted(raw for group in RAW_IDS for raw in group) == list(range(32))
    for train, group in enumerate(RAW_IDS):
        assert NUSCENES_32.to_train(np.array(group, np.uint8)).tolist() == [train] * len(group)


def test_names_agree_with_the_mapping():
    assert NUSCENES_32.class_names[24] == "flat.driveable_surface"
    assert NUSCENES_32.train_names[11] == "driveable_surface"
    assert len(NUSCENES_32.class_names) == 32
    assert NUSCENES_32.num_classes == NUSCENES_16.num_classes == 17


def test_ids_beyond_the_classes_are_ignored():
    assert NUSCENES_32.to_train(np.arange(32, 256, dtype=np.uint8)).max() == 0
    assert NUSCENES_16.to_train(np.array([0, 1, 16, 17, 255], np.uint8)).tolist() == [0, 1, 16, 0, 0]


def test_no_points_give_no_labels():
    assert NUSCENES_32.to_train(np.zeros(0, np.uint8)).shape == (0,)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(DataError, match="Did you mean 'nuscenes-32'"):
        label_set("nuscene32")
