"""Frames of the Waymo Open Dataset v1.x as the public definition says, in float64 and without a thought for speed."""

from __future__ import annotations

import zlib

import numpy as np

from picture3d.formats.protobuf_wire import Field, Reader

# Rows and columns of the range images by LiDAR.
SHAPES = {1: (64, 2650), 2: (200, 600), 3: (200, 600), 4: (200, 600), 5: (200, 600)}


class Message:
    """One message: its fields by number."""

    def __init__(self, reader: Reader, fields: list[Field]) -> None:
        self.reader, self.list = reader, fields

    @staticmethod
    def of(data: bytes) -> Message:
        reader = Reader(data)
        return Message(reader, list(reader.fields()))

    def all(self, number: int) -> list[Field]:
        return [field for field in self.list if field.number == number]

    def one(self, number: int) -> Field:
        (field,) = self.all(number)
        return field

    def inside(self, number: int) -> list[Message]:
        return [Message(self.reader, list(self.reader.message(field))) for field in self.all(number)]

    def integer(self, number: int) -> int:
        return self.reader.signed(self.one(number))

    def double(self, number: int) -> float:
        return self.reader.double(self.one(number))

    def doubles(self, number: int) -> np.ndarray:
        return np.concatenate([np.zeros(0), *(self.reader.doubles(field) for field in self.all(number))])

    def text(self, number: int) -> str:
        return self.reader.text(self.one(number))

    def data(self, number: int) -> bytes:
        return bytes(self.reader.data(self.one(number)))


def matrix(compressed: bytes, dtype: str) -> np.ndarray:
    message = Message.of(zlib.decompress(compressed))
    (shape,) = message.inside(2)
    dims = [shape.reader.signed(field) for field in shape.all(1)]
    field = message.one(1)
    values = message.reader.floats(field) if dtype == "float" else message.reader.integers(field)
    return values.reshape(dims)


def rotation_of(roll: np.ndarray, pitch: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    def about(axis: int, angle: np.ndarray) -> np.ndarray:
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        out = np.zeros((*angle.shape, 3, 3))
        out[..., axis, axis] = 1
        out[..., i, i] = out[..., j, j] = np.cos(angle)
        out[..., i, j], out[..., j, i] = -np.sin(angle), np.sin(angle)
        return out

    return about(2, yaw) @ about(1, pitch) @ about(0, roll)


def vehicle_points(frame: Message, name: int, which: int) -> np.ndarray:
    """(n, 3) float64 in the vehicle frame, row by row of the range image."""
    laser = next(m for m in frame.inside(5) if m.integer(1) == name)
    calibration = next(m for m in frame.inside(1)[0].inside(3) if m.integer(1) == name)
    extrinsic = calibration.inside(5)[0].doubles(1).reshape(4, 4)
    image = matrix(laser.inside(2 + which)[0].data(2), "float").astype(np.float64)
    height, width, channels = image.shape
    assert (height, width) == SHAPES[name]
    assert channels == 4
    beams = calibration.doubles(2)
    if not len(beams):
        low, high = calibration.double(3), calibration.double(4)
        beams = (np.arange(height) + 0.5) / height * (high - low) + low
    row, column = np.nonzero(image[..., 0] > 0)
    up = beams[::-1][row]
    ratio = (width - column - 0.5) / width
    azimuth = (2 * ratio - 1) * np.pi - np.arctan2(extrinsic[1, 0], extrinsic[0, 0])
    away = image[row, column, 0]
    local = np.stack([np.cos(azimuth) * np.cos(up), np.sin(azimuth) * np.cos(up), np.sin(up)], 1) * away[:, None]
    points = local @ extrinsic[:3, :3].T + extrinsic[:3, 3]
    if name == 1:
        pose = matrix(laser.inside(2)[0].data(4), "float").astype(np.float64)
        assert pose.shape == (height, width, 6)
        pixel = pose[row, column]
        points = np.einsum("nij,nj->ni", rotation_of(*pixel[:, :3].T), points) + pixel[:, 3:]
        of_frame = np.linalg.inv(frame.inside(3)[0].doubles(1).reshape(4, 4))
        points = points @ of_frame[:3, :3].T + of_frame[:3, 3]
    return points
