from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from picture3d.commands.intensity import intensity as measure_command
from picture3d.datasets.prepared import PreparedDataset
from picture3d.datasets.samples import DataConfig, load_sample
from picture3d.datasets.sensor_intensity import IntensityTable, measure_intensity, write_table
from picture3d.errors import ConfigError, DataError
from picture3d.structures.points import IntensityUnit, PointCloud
from tests.datasets.made_frames import made_frame, write_made_dataset
from tests.sample_data import sample_path


def cloud(values: np.ndarray, sensor: np.ndarray | None = None, unit: IntensityUnit = IntensityUnit.RAW_255) -> PointCloud:
    values = np.asarray(values, np.float32)
    return PointCloud(np.zeros((len(values), 3), np.float32), values, unit, sensor=sensor)


def write_sensors(root: Path, draw: dict[int, float], *, frames: int = 6, points: int = 3000) -> PreparedDataset:
    """Each sensor's intensities are a uniform draw's square times its factor."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(frames):
        sensor = rng.choice(list(draw), points).astype(np.uint8)
        factor = np.vectorize(draw.get)(sensor)
        values = (rng.random(points) ** 2 * factor).astype(np.float32)
        frame = made_frame("a", index, points=points)
        made.append(replace(frame, points=replace(frame.points, intensity=values, sensor=sensor)))
    return PreparedDataset(write_made_dataset(root, {"a": made}))


def test_the_quantiles_are_those_of_all_points_of_a_sensor(tmp_path):
    dataset = write_sensors(tmp_path, {1: 10.0, 4: 200.0})
    table = measure_intensity(dataset)
    frames = [dataset.frame(key).points for key in dataset.keyframes()]
    for sensor in (1, 4):
        values = np.concatenate([p.intensity[p.sensor == sensor] for p in frames])
        assert table.points[sensor] == len(values)
        assert table.quantiles[sensor][[0, 64, 128, 256]] == pytest.approx(np.quantile(values, [0, 0.25, 0.5, 1]), rel=1e-6)


def test_the_quantile_map_makes_sensors_alike_and_keeps_the_order(tmp_path):
    dataset = write_sensors(tmp_path, {1: 10.0, 4: 200.0})
    table = measure_intensity(dataset)
    points = dataset.frame(dataset.keyframes()[0]).points
    assert points.sensor is not None
    mapped = table.mapped(points, "sensor_quantile")
    assert mapped.dtype == np.float32
    for sensor in (1, 4):
        rows = points.sensor == sensor
        # Ranks are uniform on 0..1: mean 1/2, variance 1/12.
        assert mapped[rows].mean() == pytest.approx(0.5, abs=0.03)
        assert mapped[rows].var() == pytest.approx(1 / 12, abs=0.01)
        order = np.argsort(points.intensity[rows], kind="stable")
        assert (np.diff(mapped[rows][order]) >= 0).all()


def test_the_scale_map_divides_by_the_99_percent_quantile():
    levels = np.linspace(0, 50, 257)
    table = IntensityTable(IntensityUnit.RAW_255, {0: levels, 2: levels * 4}, {0: 1, 2: 1}, 1)
    got = table.mapped(cloud(np.array([0, 24.75, 49.5, 80])), "sensor_scale")
    assert got == pytest.approx([0, 0.5, 1, 1], abs=1e-6)
    got = table.mapped(cloud(np.array([24.75, 99.0]), np.array([0, 2], np.uint8)), "sensor_scale")
    assert got == pytest.approx([0.5, 0.5], abs=1e-6)


def test_many_equal_values_get_the_middle_of_their_ranks_and_values_beyond_stay_in_0_to_1():
    values = np.concatenate([np.zeros(128), np.linspace(1, 129, 129)])  # the lower half of all levels is 0
    table = IntensityTable(IntensityUnit.RAW_255, {0: values}, {0: 257}, 1)
    got = table.mapped(cloud(np.array([0, 1, 129, 1e6, -5])), "sensor_quantile")
    assert got == pytest.approx([127 / 2 / 256, 0.5, 1, 1, 127 / 2 / 256], abs=1e-6)


@pytest.mark.parametrize(("kind", "expected"), [("sensor_scale", 0.0), ("sensor_quantile", 0.5)])
def test_a_sensor_without_intensity_gives_a_constant(kind, expected):
    table = IntensityTable(IntensityUnit.UNIT, {0: np.zeros(257)}, {0: 9}, 1)
    assert table.mapped(cloud(np.zeros(3), unit=IntensityUnit.UNIT), kind).tolist() == [expected] * 3
    assert table.mapped(cloud(np.zeros(0), unit=IntensityUnit.UNIT), kind).shape == (0,)


def test_the_stored_table_is_read_back_to_the_bit_and_is_the_same_each_time(tmp_path):
    dataset = write_sensors(tmp_path / "d", {1: 10.0, 4: 200.0})
    said = measure_command(dataset.root, split="train", frames=512)
    assert "sensor 4: " in said
    first = (dataset.root / "intensity.json").read_bytes()
    table = dataset.intensity()
    again = measure_intensity(dataset)
    for sensor in (1, 4):
        assert np.array_equal(table.quantiles[sensor], again.quantiles[sensor])
    write_table(tmp_path / "again.json", again)
    assert (tmp_path / "again.json").read_bytes() == first


def test_a_sample_holds_the_mapped_intensity(tmp_path):
    dataset = write_sensors(tmp_path, {1: 10.0, 4: 200.0})
    write_table(dataset.root / "intensity.json", measure_intensity(dataset))
    key = dataset.keyframes()[3]
    config = DataConfig(root=dataset.root, intensity_scale="sensor_quantile", sweeps=2)
    sample = load_sample(dataset, key, config, None)
    points = dataset.frame(key).points
    expected = dataset.intensity().mapped(points, "sensor_quantile")
    assert np.array_equal(sample.features[: len(points), 0], expected)
    assert 0 < sample.features[len(points) :].max() <= 1, "earlier sweeps are mapped as well"


def test_what_is_missing_is_said_in_words(tmp_path):
    dataset = write_sensors(tmp_path, {1: 10.0, 4: 200.0})
    config = DataConfig(root=dataset.root, intensity_scale="sensor_scale")
    with pytest.raises(DataError, match=r"intensity\.json: is not there.*picture3d data intensity"):
        load_sample(dataset, dataset.keyframes()[0], config, None)
    (dataset.root / "intensity.json").write_text('{"format": "picture3d-intensity", "version": 1}')
    with pytest.raises(DataError, match="not a table of intensities"):
        dataset.intensity()
    table = measure_intensity(dataset)
    with pytest.raises(DataError, match="sensor 9 does not occur in it"):
        table.mapped(cloud(np.ones(2), np.array([1, 9], np.uint8)), "sensor_scale")
    with pytest.raises(DataError, match="in unit '0-255', this frame's are in '0-1'"):
        table.mapped(cloud(np.ones(2), unit=IntensityUnit.UNIT), "sensor_scale")
    with pytest.raises(ConfigError, match="stored without the sensor"):
        DataConfig.from_tree(
            {"root": ".", "intensity_scale": "sensor_scale", "box_classes": ["car"],
             "objects": {"database": "all", "fill_to": {"car": 1}}}
        )  # fmt: skip


def test_frames_of_two_units_have_no_common_table(tmp_path):
    one, two = made_frame("a", 0), made_frame("a", 1)
    two = replace(two, points=replace(two.points, intensity_unit=IntensityUnit.TANH))
    dataset = PreparedDataset(write_made_dataset(tmp_path, {"a": [one, two]}))
    with pytest.raises(DataError, match="a/1 has intensities in unit 'tanh', earlier frames in '0-255'"):
        measure_intensity(dataset)


def test_a_dataset_without_points_has_no_table(tmp_path):
    dataset = PreparedDataset(write_made_dataset(tmp_path, {"a": [made_frame("a", 0, points=0)]}))
    with pytest.raises(DataError, match="holds no point"):
        measure_intensity(dataset)


def largest_gap(one: np.ndarray, two: np.ndarray) -> float:
    """The Kolmogorov-Smirnov distance of two samples: the largest gap of their distribution functions."""
    at = np.concatenate([one, two])
    below = [np.searchsorted(np.sort(values), at, side="right") / len(values) for values in (one, two)]
    return float(np.abs(below[0] - below[1]).max())


@pytest.mark.parametrize(("kind", "expected"), [("unit", 0.17), ("sensor_scale", 0.155), ("sensor_quantile", 0.06)])
def test_real_sweeps_of_two_sensors_have_alike_intensities_by_tables_of_other_frames(tmp_path, kind, expected):
    """Measured on frames that the tables were not taken from: nuScenes' LiDAR and Waymo's, of other streets."""
    nuscenes = [np.load(sample_path(f"nuscenes/keyframe_sequence/pc/pc{i}.npy")) for i in range(6)]
    waymo = [
        np.fromfile(sample_path(f"waymo/lidar_frames/seq_0_frame_{i}.bin"), np.float32).reshape(-1, 5) for i in range(100, 106)
    ]
    mapped = []
    for name, sweeps, unit in (("nu", nuscenes, IntensityUnit.RAW_255), ("wa", waymo, IntensityUnit.TANH)):
        frames = []
        for index, sweep in enumerate(sweeps):
            log = "train" if index < 3 else "val"
            points = PointCloud(sweep[:, :3].astype(np.float32), sweep[:, 3].astype(np.float32), unit)
            frames.append(
                replace(made_frame(log, index % 3), points=points, labels=None, instances=None, boxes=None, previous=())
            )
        root = write_made_dataset(
            tmp_path / name, {"train": frames[:3], "val": frames[3:]}, splits={"train": ["train"], "val": ["val"]}
        )
        dataset = PreparedDataset(root)
        write_table(root / "intensity.json", measure_intensity(dataset))
        settings = DataConfig(root=root, split="val", intensity_scale=kind)
        mapped.append(
            np.concatenate([load_sample(dataset, k, settings, None).features[::7, 0] for k in dataset.keyframes("val")])
        )
    assert largest_gap(*mapped) == pytest.approx(expected, abs=0.015)
