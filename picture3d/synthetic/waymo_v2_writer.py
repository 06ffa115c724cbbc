"""Writes the town of :mod:`picture3d.synthetic.waymo_writer` as the Waymo Open Dataset v2. Needs the extra `arrow`.

Layout, below the root: ``training/<component>/<segment>.parquet`` and ``validation/...``, for the components lidar, lidar_pose,
lidar_segmentation, lidar_box, lidar_calibration and vehicle_pose (source of the columns: see
:mod:`picture3d.formats.waymo_v2`). Segments have the names, frames and numbers that the same arguments give as v1. A segment
whose ``lidar`` is there is whole: that file takes its name last.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picture3d.files import replacing
from picture3d.formats.feather import need_pyarrow
from picture3d.structures.poses import Pose
from picture3d.synthetic.nuscenes_rows import town_seed
from picture3d.synthetic.scene_jobs import Progress, check_counts, write_town
from picture3d.synthetic.waymo_drive import WaymoConfig, WaymoFrame, waymo_frame
from picture3d.synthetic.waymo_lidar import LASERS
from picture3d.synthetic.waymo_messages import difficulty, heading, pixel_classes, pixel_poses, range_image
from picture3d.synthetic.waymo_writer import SPLIT_FOLDERS, SegmentJob, segment_jobs
from picture3d.synthetic.world import build_town

_COMPONENTS = ("lidar", "lidar_pose", "lidar_segmentation", "lidar_box", "lidar_calibration", "vehicle_pose")


def write_waymo_v2(
    root: Path,
    *,
    scenes: int = 4,
    frames_per_scene: int = 200,
    seed: int = 0,
    val_scenes: int = 1,
    config: WaymoConfig = WaymoConfig(),  # noqa: B008 - frozen
    processes: int = 1,
    progress: Progress | None = None,
) -> None:
    """Writes the dataset, or what is missing of it; does nothing if it is whole. Arguments as :func:`write_waymo` has them.

    Raises:
        ConfigError: for impossible numbers, if `root` holds a dataset of other settings, or pyarrow is not installed.
        DataError: if a file cannot be written.
    """
    need_pyarrow(f"{root}: writing Parquet files")
    check_counts(scenes=scenes, frames=("frames_per_scene", frames_per_scene), val_scenes=val_scenes, processes=processes)
    config = config.model_copy(update={"frames": frames_per_scene})
    jobs, settings = segment_jobs(root, "waymo v2", scenes=scenes, val_scenes=val_scenes, seed=seed, config=config)
    write_town(
        root,
        settings,
        jobs,
        write=_write_segment,
        is_written=lambda job: _file(job, "lidar").exists(),
        frames=frames_per_scene,
        own_folders=SPLIT_FOLDERS.values(),
        processes=processes,
        progress=progress,
    )


def _file(job: SegmentJob, component: str) -> Path:
    return job.root / SPLIT_FOLDERS[job.split] / component / f"{job.name}.parquet"


def _write_segment(job: SegmentJob) -> Iterator[int]:
    """Writes one segment; yields 1 after each frame."""
    from pyarrow import parquet

    schemas = component_schemas()
    town = build_town(town_seed(job.seed, job.scene), job.config.town)
    with ExitStack() as stack:
        writers: dict[str, Any] = {}
        for component in _COMPONENTS:  # left in reverse, so that `lidar` takes its name last
            path = stack.enter_context(replacing(_file(job, component)))
            options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
            # Ranges hardly ever repeat; poses do, column by column.
            options["use_dictionary"] = component not in ("lidar", "lidar_segmentation")
            writers[component] = stack.enter_context(parquet.ParquetWriter(path, schemas[component], **options))
        _write(writers, schemas, "lidar_calibration", _calibration_rows(job.name))
        for index in range(job.config.frames):
            frame = waymo_frame(town, job.config, index)
            key = {"key.segment_context_name": job.name, "key.frame_timestamp_micros": frame.timestamp_us}
            pose = {"[VehiclePoseComponent].world_from_vehicle.transform": _numbers(frame.global_from_vehicle)}
            _write(writers, schemas, "vehicle_pose", [{**key, **pose}])
            _write(writers, schemas, "lidar_box", _box_rows(frame, key))
            for component, rows in _image_rows(frame, key).items():
                _write(writers, schemas, component, rows)
            # The last tick follows the finished files.
            if index + 1 < job.config.frames:
                yield 1
    yield 1


def _write(writers: dict[str, Any], schemas: dict[str, Any], component: str, rows: list[dict[str, Any]]) -> None:
    """Adds a row group, if there is a row."""
    import pyarrow as pa

    if rows:
        schema = schemas[component]
        columns = [pa.array([row[name] for row in rows], schema.field(name).type) for name in schema.names]
        writers[component].write_table(pa.table(columns, schema=schema))


def _image_rows(frame: WaymoFrame, key: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {"lidar": [], "lidar_pose": [], "lidar_segmentation": []}
    for images in frame.lasers:
        laser = {**key, "key.laser_name": images.laser.name}
        rows["lidar"].append({**laser, **_image_cells("LiDARComponent", [range_image(images, which) for which in (0, 1)])})
        poses = pixel_poses(images)
        if poses is not None:
            rows["lidar_pose"].append({**laser, **_image_cells("LiDARPoseComponent", [poses])})
        classes = [pixel_classes(images, which) for which in (0, 1)]
        if classes[0] is not None:
            rows["lidar_segmentation"].append({**laser, **_image_cells("LiDARSegmentationLabelComponent", classes)})
    return rows


def _image_cells(component: str, images: list[Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for number, image in enumerate(images, start=1):
        cells[f"[{component}].range_image_return{number}.values"] = np.ascontiguousarray(image).reshape(-1)
        cells[f"[{component}].range_image_return{number}.shape"] = list(image.shape)
    return cells


def _box_rows(frame: WaymoFrame, key: dict[str, Any]) -> list[dict[str, Any]]:
    boxes = frame.boxes
    count = len(boxes)
    numbers: dict[str, NDArray[Any]] = {}
    for i, axis in enumerate("xyz"):
        numbers[f"box.center.{axis}"], numbers[f"box.size.{axis}"] = boxes.center[:, i], boxes.size[:, i]
        flat = i < 2
        numbers[f"speed.{axis}"] = frame.global_velocity[:, i] if flat else np.zeros(count)
        numbers[f"acceleration.{axis}"] = frame.global_acceleration[:, i] if flat else np.zeros(count)
    hard = difficulty(boxes.num_points)
    numbers |= {
        "box.heading": heading(boxes.yaw),
        "type": frame.box_type,
        "num_lidar_points_in_box": boxes.num_points,
        "num_top_lidar_points_in_box": frame.num_top_points,
        "difficulty_level.detection": hard,
        "difficulty_level.tracking": hard,
    }
    return [
        {
            **key,
            "key.laser_object_id": boxes.track_id[row],
            **{f"[LiDARBoxComponent].{name}": column[row].item() for name, column in numbers.items()},
        }
        for row in range(count)
    ]


def _calibration_rows(segment: str) -> list[dict[str, Any]]:
    name = "[LiDARCalibrationComponent]"
    return [
        {
            "key.segment_context_name": segment,
            "key.laser_name": laser.name,
            f"{name}.extrinsic.transform": _numbers(laser.vehicle_from_laser),
            f"{name}.beam_inclination.min": laser.inclination_min,
            f"{name}.beam_inclination.max": laser.inclination_max,
            f"{name}.beam_inclination.values": None if laser.beam_inclinations is None else list(laser.beam_inclinations),
        }
        for laser in LASERS
    ]


def _numbers(pose: Pose) -> list[float]:
    return pose.matrix.ravel().tolist()


def component_schemas() -> dict[str, Any]:
    """The columns of each component and their types, as published."""
    import pyarrow as pa

    segment = [("key.segment_context_name", pa.string())]
    frame = [*segment, ("key.frame_timestamp_micros", pa.int64())]
    laser = ("key.laser_name", pa.int8())
    matrix = pa.list_(pa.float64(), 16)

    def images(component: str, returns: int, kind: Any) -> list[tuple[str, Any]]:
        types = {"values": pa.list_(kind), "shape": pa.list_(pa.int32(), 3)}
        return [
            (f"[{component}].range_image_return{i + 1}.{part}", of) for i in range(returns) for part, of in types.items()
        ]  # fmt: skip

    box = [f"{part}.{axis}" for part in ("box.center", "box.size", "speed", "acceleration") for axis in "xyz"]
    boxes: list[tuple[str, Any]] = [(name, pa.float64()) for name in (*box, "box.heading")]
    boxes += [(name, pa.int8()) for name in ("type", "difficulty_level.detection", "difficulty_level.tracking")]
    boxes += [(name, pa.int64()) for name in ("num_lidar_points_in_box", "num_top_lidar_points_in_box")]
    calibration: list[tuple[str, Any]] = [
        ("extrinsic.transform", matrix),
        ("beam_inclination.min", pa.float64()),
        ("beam_inclination.max", pa.float64()),
        ("beam_inclination.values", pa.list_(pa.float64())),
    ]
    columns: dict[str, list[tuple[str, Any]]] = {
        "lidar": [*frame, laser, *images("LiDARComponent", 2, pa.float32())],
        "lidar_pose": [*frame, laser, *images("LiDARPoseComponent", 1, pa.float32())],
        "lidar_segmentation": [*frame, laser, *images("LiDARSegmentationLabelComponent", 2, pa.int32())],
        "lidar_box": [*frame, ("key.laser_object_id", pa.string()), *((f"[LiDARBoxComponent].{n}", t) for n, t in boxes)],
        "lidar_calibration": [*segment, laser, *((f"[LiDARCalibrationComponent].{n}", t) for n, t in calibration)],
        "vehicle_pose": [*frame, ("[VehiclePoseComponent].world_from_vehicle.transform", matrix)],
    }
    return {component: pa.schema(fields) for component, fields in columns.items()}
