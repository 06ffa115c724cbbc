from __future__ import annotations

import numpy as np
import pytest
import torch

from picture3d.structures.targets import FeatureSource, FrameTargets
from picture3d.teachers.protocol import CellFeatures, Teacher
from picture3d.teachers.targets import OnlineTeacherSource
from tests.teachers.made_teachers import FourierTeacher


def targets(features: tuple[int, ...] = (3, 4), superclasses: int = 3, cells: tuple[int, ...] = (0, -1, 2)) -> FrameTargets:
    return FrameTargets(np.zeros(features, np.float16), np.zeros(superclasses, np.uint8), np.array(cells, np.int64))


def test_targets_may_be_empty_and_points_may_have_none():
    assert len(targets((0, 4), 0, ()).features) == 0
    assert targets((0, 4), 0, (-1, -1)).point_cell.tolist() == [-1, -1]
    assert targets().point_cell.tolist() == [0, -1, 2]


@pytest.mark.parametrize("cells", [(0, 3), (-2,)])
def test_a_point_in_a_cell_that_is_not_there_is_refused(cells: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"-1\.\.2"):
        targets(cells=cells)


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="superclass"):
        targets(superclasses=2)
    with pytest.raises(ValueError, match="features must be"):
        targets((3,))
    with pytest.raises(ValueError, match=r"\(M, D\)"):
        CellFeatures(torch.zeros(3), torch.zeros(3, dtype=torch.int64))


def test_a_made_teacher_is_a_teacher_and_sources_are_sources():
    teacher: Teacher = FourierTeacher()
    source: FeatureSource = OnlineTeacherSource(teacher)
    assert source is not None


def test_every_point_has_the_feature_of_its_cell_and_zeros_without_one():
    cells = CellFeatures(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, -1, 0, 1]))
    assert cells.of_points().tolist() == [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0], [3.0, 4.0]]
    nothing = CellFeatures(torch.zeros(0, 2), torch.tensor([-1]))
    assert nothing.of_points().tolist() == [[0.0, 0.0]]
