from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from picture3d.errors import ConfigError, DataError
from picture3d.structures.points import PointCloud
from picture3d.teachers.protocol import CellFeatures
from picture3d.teachers.store import FeatureStore, target_path
from picture3d.teachers.targets import OnlineTeacherSource, compute_targets, view_frame
from tests.teachers.made_teachers import FourierTeacher, Key, MadeDataset, made_frame, made_points


@pytest.fixture
def dataset(tmp_path: Path) -> MadeDataset:
    return MadeDataset(tmp_path, {"log-a": 5, "log-b": 3, "log-c": 1})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_keyframe_of_every_log_gets_targets_and_progress_is_told(dataset: MadeDataset):
    told: list[tuple[int, int]] = []
    summary = compute_targets(dataset, FourierTeacher(), progress=lambda done, total: told.append((done, total)))
    assert summary.folder == dataset.root / "targets" / "fourier"
    assert sorted(content(summary.folder)) == [
        "files.json",
        "log-a.targets",
        "log-b.targets",
        "log-c.targets",
        "teacher.json",
    ]
    assert (summary.logs, summary.logs_made, summary.frames) == (3, 3, 6)
    store = FeatureStore(summary.folder)
    assert store.logs == ("log-a", "log-b", "log-c")
    assert store.file("log-a").frames == (0, 2, 4)
    assert summary.cells == sum(entry.cells for log in store.logs for entry in store.file(log).entries.values())
    assert summary.bytes == sum(len(data) for name, data in content(summary.folder).items() if name.endswith(".targets"))
    assert 0.995 <= summary.mean_cosine <= 1
    assert sum(summary.codecs.values()) == 6
    assert "targets of 6 keyframes in 3 logs (3 made now)" in str(summary)
    assert told[0] == (0, 6)
    assert told[-1] == (6, 6)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_second_run_does_nothing_and_writes_the_same_bytes_when_it_must(dataset: MadeDataset, tmp_path: Path):
    first = compute_targets(dataset, FourierTeacher())
    before = content(first.folder)
    teacher = FourierTeacher()
    again = compute_targets(dataset, teacher)
    assert teacher.calls == 0
    assert (again.logs_made, again.frames, again.cells) == (0, first.frames, first.cells)
    target_path(first.folder, "log-b").unlink()
    damaged = target_path(first.folder, "log-a")
    damaged.write_bytes(damaged.read_bytes()[:-3])
    assert compute_targets(dataset, FourierTeacher()).logs_made == 2
    assert content(first.folder) == before


def test_a_run_killed_in_a_log_leaves_no_file_of_it_and_the_next_finishes_the_same_bytes(dataset: MadeDataset, tmp_path: Path):
    whole = content(compute_targets(dataset, FourierTeacher(), folder=tmp_path / "whole").folder)
    for call in range(1, 13):  # the first six calls are those of the fit
        folder = tmp_path / f"broken-{call}"
        with pytest.raises(KeyboardInterrupt):
            compute_targets(dataset, FourierTeacher(fails_at=call), folder=folder)
        finished = [log for log, last in (("log-a", 3), ("log-b", 5), ("log-c", 6)) if call > 6 + last]
        described = ["teacher.json"] if call > 6 else []
        assert sorted(content(folder) if folder.exists() else []) == [*(f"{log}.targets" for log in finished), *described]
        assert compute_targets(dataset, FourierTeacher(), folder=folder).logs_made == 3 - len(finished)
        assert content(folder) == whole


def test_what_a_killed_process_left_half_written_is_replaced(dataset: MadeDataset):
    folder = compute_targets(dataset, FourierTeacher()).folder
    before = content(folder)
    target_path(folder, "log-b").rename(folder / "log-b.targets.partial")
    compute_targets(dataset, FourierTeacher())
    assert content(folder) == before


def test_a_log_that_was_prepared_anew_is_done_anew(dataset: MadeDataset):
    compute_targets(dataset, FourierTeacher())
    changed = MadeDataset(dataset.root, dataset.sizes, seed=9)
    summary = compute_targets(changed, FourierTeacher())
    assert summary.logs_made == 2  # log-c holds one empty frame, which is the same as before
    assert FeatureStore(summary.folder).targets(changed.frame(Key("log-a", 2))) is not None
    longer = MadeDataset(dataset.root, {**dataset.sizes, "log-c": 3}, seed=9)
    assert compute_targets(longer, FourierTeacher()).logs_made == 1


def test_another_teacher_or_other_settings_in_the_same_folder_are_refused(dataset: MadeDataset):
    compute_targets(dataset, FourierTeacher())
    with pytest.raises(DataError, match=r"fingerprint \(there 00c0ffee, here beef\)"):
        compute_targets(dataset, FourierTeacher(fingerprint="beef"))
    with pytest.raises(DataError, match=r"num_superclasses \(there 8, here 4\)"):
        compute_targets(dataset, FourierTeacher(), num_superclasses=4)


def test_superclasses_and_codecs_out_of_range_are_refused(dataset: MadeDataset):
    for wrong in (0, 256):
        with pytest.raises(ConfigError, match="1 to 255"):
            compute_targets(dataset, FourierTeacher(), num_superclasses=wrong)
    with pytest.raises(ConfigError, match="float16"):
        compute_targets(dataset, FourierTeacher(), codec="zip")


def test_clusters_depend_on_the_frame_and_the_seed_alone(dataset: MadeDataset):
    frame = dataset.frame(Key("log-a", 2))
    first = view_frame(frame, FourierTeacher(), num_superclasses=8, seed=0)
    torch.manual_seed(123)
    np.random.seed(5)  # noqa: NPY002
    again = view_frame(frame, FourierTeacher(), num_superclasses=8, seed=0)
    assert np.array_equal(first.superclass, again.superclass)
    other = [view_frame(frame, FourierTeacher(), num_superclasses=8, seed=seed).superclass for seed in range(1, 4)]
    assert any(not np.array_equal(first.superclass, clusters) for clusters in other)


def test_two_far_groups_of_features_are_two_superclasses():
    xyz = np.array([[0.1, 0, 0], [0.2, 0, 0], [50.1, 0, 0], [50.2, 0.9, 0], [0.1, 0.9, 0]], np.float32)

    class Sides(FourierTeacher):
        def cell_features(self, points: PointCloud) -> CellFeatures:
            cells = super().cell_features(points)
            east = torch.zeros(len(cells.features), dtype=torch.float32)
            east[cells.point_cell] = (torch.from_numpy(points.xyz[:, 0]) > 25).float()
            return CellFeatures(east[:, None].repeat(1, self.dimension), cells.point_cell)

    frame = made_frame("log", 0, PointCloud(xyz, np.zeros(5, np.float32), made_points(1).intensity_unit))
    view = view_frame(frame, Sides(), num_superclasses=2, seed=0)
    of_point = view.superclass[view.point_cell]
    assert len(view.superclass) == 4  # the first two points share a cell
    assert of_point[0] == of_point[1] == of_point[4] != of_point[2] == of_point[3]


@pytest.mark.parametrize("count", [0, 1])
def test_a_frame_without_points_or_with_one_has_targets_of_that_size(count: int):
    targets = OnlineTeacherSource(FourierTeacher()).targets(made_frame("log", 0, made_points(count)))
    assert targets.features.shape == (count, 8)
    assert targets.point_cell.tolist() == [0] * count


def test_points_that_are_not_finite_have_no_target(tmp_path: Path):
    points = made_points(20)
    points.xyz[3] = np.nan
    targets = OnlineTeacherSource(FourierTeacher()).targets(made_frame("log", 0, points))
    assert (targets.point_cell == -1).tolist() == [row == 3 for row in range(20)]


def test_rows_follow_the_cells_of_the_cpu_whatever_order_the_teacher_has(dataset: MadeDataset):
    class Reversed(FourierTeacher):
        def cell_features(self, points: PointCloud) -> CellFeatures:
            cells = super().cell_features(points)
            return CellFeatures(cells.features.flip(0), len(cells.features) - 1 - cells.point_cell)

    frame = dataset.frame(Key("log-a", 2))
    plain = OnlineTeacherSource(FourierTeacher()).targets(frame)
    turned = OnlineTeacherSource(Reversed()).targets(frame)
    assert np.array_equal(plain.features, turned.features)
    assert np.array_equal(plain.point_cell, turned.point_cell)


def test_a_teacher_that_breaks_its_word_is_told(dataset: MadeDataset):
    frame = dataset.frame(Key("log-a", 2))
    with pytest.raises(DataError, match=r"log-a/2: .*not finite"):
        view_frame(frame, FourierTeacher(scale=float("inf")), num_superclasses=8, seed=0)

    class Short(FourierTeacher):
        def cell_features(self, points: PointCloud) -> CellFeatures:
            return CellFeatures(torch.zeros(1, 3), torch.zeros(len(points), dtype=torch.int64))

    with pytest.raises(DataError, match="expected length 8"):
        view_frame(frame, Short(), num_superclasses=8, seed=0)


def test_a_teacher_on_the_spot_can_be_sent_to_a_loader_process(dataset: MadeDataset):
    source = pickle.loads(pickle.dumps(OnlineTeacherSource(FourierTeacher(), num_superclasses=3)))
    assert source.targets(dataset.frame(Key("log-a", 2))).superclass.max() == 2


def test_the_description_is_plain_json_for_other_tools(dataset: MadeDataset):
    folder = compute_targets(dataset, FourierTeacher()).folder
    tree = json.loads((folder / "teacher.json").read_text())
    assert tree["quantisation"] == {"kind": "cartesian", "cell": [0.5, 0.5, 0.5]}
    assert (tree["name"], tree["dimension"], tree["licence"]) == ("fourier", 8, "Apache-2.0")
