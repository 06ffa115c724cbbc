"""Runs inside the environment of the official Waymo package (Python 3.10, TensorFlow): frames of a tfrecord as arrays.

    .venv-waymo/bin/python tests/oracles/waymo_official_check.py FILE.tfrecord OUT.npz

Keys: ``<frame>/<laser>/<return>`` (n, 6) float32 range, intensity, elongation, x, y, z in the vehicle frame, rows of the range
image in order; ``<frame>/boxes`` (B, 9) x, y, z, length, width, height, heading, points, type; ``<frame>/classes/<return>``
(H, W) classes of the TOP LiDAR, where there are some.
"""

import sys

import numpy as np
import tensorflow as tf
from waymo_open_dataset import dataset_pb2
from waymo_open_dataset.utils import frame_utils


def main(source: str, target: str) -> None:
    """Reads `source` with the official code only."""
    out = {}
    for number, record in enumerate(tf.data.TFRecordDataset(source)):
        frame = dataset_pb2.Frame()
        frame.ParseFromString(bytes(record.numpy()))
        images, projections, classes, pose = frame_utils.parse_range_image_and_camera_projection(frame)
        for which in (0, 1):
            points, _ = frame_utils.convert_range_image_to_point_cloud(
                frame, images, projections, pose, ri_index=which, keep_polar_features=True
            )
            lasers = sorted(calibration.name for calibration in frame.context.laser_calibrations)
            for laser, values in zip(lasers, points):  # noqa: B905 - Python 3.10
                out[f"{number}/{laser}/{which}"] = np.asarray(values, np.float32)
            if classes:
                matrix = classes[1][which]
                out[f"{number}/classes/{which}"] = np.array(matrix.data).reshape(list(matrix.shape.dims))[..., 1]
        rows = [
            [
                *(label.box.center_x, label.box.center_y, label.box.center_z),
                *(label.box.length, label.box.width, label.box.height, label.box.heading),
                *(label.num_lidar_points_in_box, label.type),
            ]
            for label in frame.laser_labels
        ]
        out[f"{number}/boxes"] = np.array(rows, np.float64).reshape(-1, 9)
    np.savez(target, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
