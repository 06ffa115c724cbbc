"""The town's occupancy labels: small worlds by hand, real sweeps of the town against it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from picture3d.errors import DataError
from picture3d.formats.lidarseg_categories import INDEX_OF, LIDARSEG_CLASSES
from picture3d.formats.openoccupancy import IGNORED, read_openoccupancy
from picture3d.structures.occupancy import OccupancyGrid
from picture3d.structures.poses import Pose
from picture3d.synthetic.drive import DriveConfig, drive_step
from picture3d.synthetic.ground import Ground
from picture3d.synthetic.nuscenes_writer import write_nuscenes
from picture3d.synthetic.occupancy import OCCUPANCY_FOLDER, occupancy_of, write_occupancy
from picture3d.synthetic.primitives import BOX, CYLINDER, ELLIPSOID, Primitives, part, place
from picture3d.synthetic.world import build_town

CAR, ROAD, ANIMAL = INDEX_OF["vehicle.car"], INDEX_OF["flat.driveable_surface"], INDEX_OF["animal"]
GRID = OccupancyGrid((40, 40, 20), (-4.0, -4.0, -3.0), 0.2)
ABOVE = Pose(np.eye(3), np.array([4.0, 4.0, 1.9]))


@dataclass(frozen=True)
class Stage:
    """Level road and whatever is put on it."""

    primitives: Primitives = field(default_factory=Primitives.empty)
    ground: Ground = field(default_factory=Ground.flat)

    def primitives_near(self, x: float, y: float, radius_m: float, time_s: float) -> Primitives:
        return self.primitives


def stage(kind: int, half: tuple[float, float, float], label: int = CAR, free_path: float = 0.0) -> Stage:
    """One primitive, its middle 1.9 m above the road and 1 m in front of the LiDAR."""
    rows = np.array([part(kind, (0, 0, 1.9), half, reflectivity=50.0, free_path=free_path)])
    return Stage(place([rows], np.array([[5.0, 4.0, 0, 0]]), np.array([label], np.uint8), np.array([1], np.uint16)))


def test_a_level_road_is_one_layer_of_cells():
    found = occupancy_of(Stage(), ABOVE, 0.0, GRID)
    assert len(found) == 40 * 40
    assert set(found.index[:, 2].tolist()) == {5}  # -1.9 m is in the cell from -2.0 to -1.8
    assert set(found.label.tolist()) == {LIDARSEG_CLASSES[ROAD]}


def test_a_road_seen_askew_is_where_the_tilted_sensor_sees_it():
    tilt = Pose(np.array([[np.cos(0.1), 0, np.sin(0.1)], [0, 1, 0], [-np.sin(0.1), 0, np.cos(0.1)]]), ABOVE.translation)
    found = occupancy_of(Stage(), tilt, 0.0, GRID)
    height = tilt.apply(found.centres)[:, 2]
    assert len(found) == 40 * 40
    assert np.abs(height).max() <= 0.1 + 1e-9  # half a cell from the road, along the column


def test_a_hollow_box_has_walls_of_the_shell_and_nothing_inside():
    dense = occupancy_of(stage(BOX, (0.75, 0.75, 0.75)), ABOVE, 0.0, GRID).dense() == LIDARSEG_CLASSES[CAR]
    # Surfaces at x 0.25 and 1.75, y and z -0.75 and 0.75: cells 21..28, 16..23 and 11..18; 0.3 m of shell are two cells.
    expected = np.zeros(GRID.shape, np.bool_)
    expected[21:29, 16:24, 11:19] = True
    expected[23:27, 18:22, 13:17] = False
    assert np.array_equal(dense, expected)


@pytest.mark.parametrize("kind", [BOX, CYLINDER, ELLIPSOID])
def test_what_a_laser_enters_is_full_and_has_the_volume_of_the_grown_shape(kind):
    found = occupancy_of(stage(kind, (0.7, 0.5, 0.6), INDEX_OF["static.vegetation"], free_path=0.5), ABOVE, 0.0, GRID)
    count = np.count_nonzero(found.label == LIDARSEG_CLASSES[INDEX_OF["static.vegetation"]])
    share = {BOX: 1.0, CYLINDER: np.pi / 4, ELLIPSOID: np.pi / 6}[kind]
    assert count * 0.2**3 == pytest.approx(8 * 0.8 * 0.6 * 0.7 * share, rel=0.1)


def test_a_pole_thinner_than_a_cell_leaves_no_gap():
    dense = occupancy_of(stage(CYLINDER, (0.03, 0.03, 0.9)), ABOVE, 0.0, GRID).dense()
    assert (dense == 4).any(axis=(0, 1))[11:19].all()


def test_a_thing_without_a_class_is_noise():
    found = occupancy_of(stage(BOX, (0.5, 0.5, 0.5), ANIMAL), ABOVE, 0.0, GRID)
    assert IGNORED in found.label


def test_points_of_the_towns_sweeps_lie_in_cells_of_their_class_and_in_turned_labels_they_do_not():
    config = DriveConfig(keyframes=2, sweeps_per_keyframe=0)
    town = build_town(1, config.town)
    step = drive_step(town, config, 1)
    found = occupancy_of(town, step.global_from_lidar, step.time_s)
    table = np.full(256, IGNORED, np.uint8)
    table[list(LIDARSEG_CLASSES)] = list(LIDARSEG_CLASSES.values())
    truth = table[step.sweep.labels]
    _, inside = found.grid.locate(step.sweep.points.xyz)
    label = found.at(step.sweep.points.xyz)
    assert (label[inside] > 0).mean() > 0.95
    assert (label[inside] == truth[inside]).mean() > 0.94
    for changed in (found.moved(quarter_turns=1), found.moved(mirror_x=True), found.moved(mirror_y=True)):
        assert (changed.at(step.sweep.points.xyz)[inside] == truth[inside]).mean() < 0.6


@pytest.fixture(scope="module")
def town_data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("town") / "raw"
    write_nuscenes(root, scenes=2, keyframes_per_scene=2, sweeps_per_keyframe=1, val_scenes=1)
    return root


def test_every_keyframe_gets_a_file_named_as_the_dataset_does_and_a_rerun_writes_what_is_missing(town_data):
    seen: list[tuple[int, int]] = []
    assert write_occupancy(town_data, progress=lambda done, total: seen.append((done, total))) == 4
    assert seen[0] == (0, 4)
    assert seen[-1] == (4, 4)
    tables = {name: json.loads((town_data / f"v1.0-mini/{name}.json").read_text()) for name in ("sample_data", "sample")}
    scene_of = {row["token"]: row["scene_token"] for row in tables["sample"]}
    expected = {
        f"scene_{scene_of[row['sample_token']]}/occupancy/{row['token']}.npy"
        for row in tables["sample_data"]
        if row["is_key_frame"]
    }
    folder = town_data / OCCUPANCY_FOLDER
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert files.keys() == expected
    first, second, *_ = sorted(files.values())
    bytes_before, kept = first.read_bytes(), second.stat().st_mtime_ns
    first.unlink()
    write_occupancy(town_data)
    assert first.read_bytes() == bytes_before
    assert second.stat().st_mtime_ns == kept
    assert len(read_openoccupancy(first).label) > 100_000


def test_a_folder_that_is_no_town_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        write_occupancy(tmp_path)
    (tmp_path / "picture3d_splits.json").write_text('{"splits": {"train": []}}')
    with pytest.raises(DataError, match="Write it by `synth`"):
        write_occupancy(tmp_path)
