"""Points and colours in, pictures out: from above, and through a camera. Pure functions of their arguments."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from picture3d.structures.poses import Pose
from picture3d.view.colors import Colors, Rgb

BACKGROUND: Rgb = (13, 18, 25)
RING: Rgb = (38, 47, 59)
TEXT: Rgb = (120, 134, 150)


@dataclass(frozen=True, slots=True)
class Camera:
    """A pinhole camera in the LiDAR frame; z is up, and pixels are square."""

    eye_m: tuple[float, float, float]
    target_m: tuple[float, float, float]
    fov_deg: float = 50.0  # from the left edge of the picture to the right

    @classmethod
    def orbit(
        cls, target_m: tuple[float, float, float], *, distance_m: float, yaw_deg: float, pitch_deg: float, fov_deg: float = 50.0
    ) -> Camera:
        """Looks at `target_m` in direction `yaw_deg` (counter-clockwise from x), from `pitch_deg` above the horizon."""
        yaw, pitch = np.radians(yaw_deg), np.radians(np.clip(pitch_deg, -89.9, 89.9))
        away = np.array([-np.cos(yaw) * np.cos(pitch), -np.sin(yaw) * np.cos(pitch), np.sin(pitch)]) * distance_m
        eye = np.asarray(target_m) + away
        return cls((float(eye[0]), float(eye[1]), float(eye[2])), target_m, fov_deg)

    def rotation(self) -> NDArray[np.float64]:
        """(3, 3): rows are the camera's right, down and forward directions in the LiDAR frame."""
        forward = np.asarray(self.target_m, float) - np.asarray(self.eye_m, float)
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, (0.0, 0.0, 1.0))
        if np.linalg.norm(right) < 1e-9:
            right = np.array([1.0, 0.0, 0.0])
        right /= np.linalg.norm(right)
        return np.stack([right, np.cross(forward, right), forward])

    def project(self, xyz: ArrayLike, size_px: tuple[int, int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(N, 3) metres to (N, 2) pixels (column, row) and (N,) depths in metres; behind the camera the depth is negative."""
        seen = (np.asarray(xyz, float) - np.asarray(self.eye_m)) @ self.rotation().T
        focal = size_px[0] / 2 / np.tan(np.radians(self.fov_deg) / 2)
        depth = seen[:, 2]
        pixels = seen[:, :2] * (focal / np.where(np.abs(depth) < 1e-9, 1e-9, depth))[:, None] + np.array(size_px) / 2
        return pixels, depth


def page_from_lidar(ego_from_lidar: Pose) -> Pose:
    """Turns a LiDAR frame until the car looks up the page of :func:`bird_eye`; some look along x, some along y."""
    return Pose(Pose.from_yaw(np.pi / 2).rotation @ ego_from_lidar.rotation, np.zeros(3))


def bird_eye(
    xyz: ArrayLike,
    colors: Colors,
    *,
    extent_m: float = 50.0,
    size_px: int = 720,
    center_m: tuple[float, float] = (0.0, 0.0),
    point_px: float = 2.0,
    rings_m: Sequence[float] = (10, 20, 30, 40),
    labelled_rings: bool = True,
    supersample: int = 2,
) -> Image.Image:
    """The square from `center_m` - `extent_m` to `center_m` + `extent_m`, seen from above: x to the right, y up.

    A point at (x, y) falls on pixel column ``floor((x - x0 + extent) / (2 extent) * size)`` and on the row counted from the top
    in the same way. Higher points cover lower ones; points outside, or not finite, are left out.

    Args:
        xyz: (N, 3) metres.
        colors: (N, 3) uint8.
        extent_m: half the side of the square.
        size_px: side of the picture.
        center_m: middle of the picture.
        point_px: diameter of a point.
        rings_m: faint circles around the sensor.
        labelled_rings: write their radius beside them.
        supersample: the picture is drawn this much larger and averaged down.
    """
    points, colors = _finite(xyz, colors)
    side = size_px * supersample
    per_metre = side / (2 * extent_m)
    u = (points[:, 0] - center_m[0] + extent_m) * per_metre
    v = (center_m[1] + extent_m - points[:, 1]) * per_metre
    ground = Image.new("RGB", (side, side), BACKGROUND)
    draw = ImageDraw.Draw(ground)
    cu, cv = (extent_m - center_m[0]) * per_metre, (extent_m + center_m[1]) * per_metre
    for radius in rings_m:
        r = radius * per_metre
        draw.ellipse((cu - r, cv - r, cu + r, cv + r), outline=RING, width=supersample)
    radius_px = np.full(len(points), max(point_px * supersample / 2 - 0.5, 0))
    image, _ = _splat(np.asarray(ground), u, v, -points[:, 2], radius_px, colors)
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    d = 3 * supersample
    draw.polygon([(cu, cv - 1.7 * d), (cu - d, cv + d), (cu + d, cv + d)], fill=(240, 244, 248))
    if labelled_rings:
        font = ImageFont.load_default(11.0 * supersample)
        for radius in rings_m:
            place = cu + radius * per_metre * 0.7071, cv + radius * per_metre * 0.7071
            draw.text(
                place, f"{radius:g} m", fill=TEXT, font=font, anchor="mm", stroke_width=3 * supersample, stroke_fill=BACKGROUND
            )
    return _reduced(picture, supersample)


def perspective(
    xyz: ArrayLike,
    colors: Colors,
    *,
    camera: Camera,
    size_px: tuple[int, int] = (1200, 640),
    point_m: float | ArrayLike = 0.11,
    min_px: float = 2.4,
    max_px: float = 7.0,
    fog_m: float | None = 130.0,
    relief: float = 0.6,
    supersample: int = 2,
) -> Image.Image:
    """Points as the camera sees them: near ones are larger and cover far ones.

    Args:
        xyz: (N, 3) metres; points behind the camera, or not finite, are left out.
        colors: (N, 3) uint8.
        camera: where from, where to.
        size_px: width and height of the picture.
        point_m: diameter of a point in the scene, one number or (N,).
        min_px: least diameter in the picture.
        max_px: greatest diameter in the picture.
        fog_m: distance at which colours have faded to a third; None for no fog.
        relief: strength of the dark rims around what stands out in depth; 0 for none.
        supersample: the picture is drawn this much larger and averaged down.
    """
    points, colors, diameter = _finite(xyz, colors, np.broadcast_to(np.asarray(point_m, float), (len(np.asarray(xyz)),)))
    width, height = size_px[0] * supersample, size_px[1] * supersample
    pixels, depth = camera.project(points, (width, height))
    ahead = depth > 0.3
    pixels, depth, colors, diameter = pixels[ahead], depth[ahead], colors[ahead].astype(float), diameter[ahead]
    focal = width / 2 / np.tan(np.radians(camera.fov_deg) / 2)
    radius = np.clip(diameter * focal / np.maximum(depth, 0.3), min_px * supersample, max_px * supersample) / 2 - 0.5
    if fog_m is not None:
        clear = np.exp(-1.1 * (depth / fog_m) ** 1.5)[:, None]
        colors = colors * clear + np.array(BACKGROUND) * (1 - clear)
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = BACKGROUND
    image, nearest = _splat(canvas, pixels[:, 0], pixels[:, 1], depth, np.maximum(radius, 0), np.rint(colors).astype(np.uint8))
    if relief > 0:
        image = _with_relief(image, nearest, relief, supersample)
    return _reduced(Image.fromarray(image), supersample)


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], *, columns: int, gap_px: int = 14, caption_px: int = 30
) -> Image.Image:
    """Pictures of one size in a grid, each with a line of text below."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap_px) + gap_px, rows * (height + caption_px + gap_px) + gap_px), BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(caption_px * 0.55)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x = gap_px + (i % columns) * (width + gap_px)
        y = gap_px + (i // columns) * (height + caption_px + gap_px)
        sheet.paste(picture, (x, y))
        draw.text((x + 2, y + height + caption_px / 2 + 2), caption, fill=(196, 206, 216), font=font, anchor="lm")
    return sheet


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def webp_bytes(image: Image.Image, quality: int = 84) -> bytes:
    """The picture as a WebP file, a tenth of the PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def data_uri(data: bytes, mime: str = "image/webp") -> str:
    """Bytes as a URI that a page can carry inside itself."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def _splat(
    canvas: NDArray[np.uint8],
    u: NDArray[np.float64],
    v: NDArray[np.float64],
    depth: NDArray[np.float64],
    radius_px: NDArray[np.float64],
    colors: Colors,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Discs at (u, v) on a copy of the canvas, the least depth on top; also the depth at each pixel, inf where nothing is."""
    height, width = canvas.shape[:2]
    column, row = np.floor(u), np.floor(v)
    reach = np.ceil(radius_px) + 1
    near = (column >= -reach) & (column < width + reach) & (row >= -reach) & (row < height + reach)
    column, row = column[near].astype(np.int64), row[near].astype(np.int64)
    sizes, points = np.rint(radius_px[near] * 2).astype(np.int64), np.flatnonzero(near)
    pixel_parts, point_parts = [], []
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        dx, dy = _disc(size / 2)
        x, y = column[rows, None] + dx, row[rows, None] + dy
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        pixel_parts.append((y * width + x)[inside])
        point_parts.append(np.broadcast_to(points[rows, None], x.shape)[inside])
    image = canvas.reshape(-1, 3).copy()
    nearest = np.full(height * width, np.inf, np.float32)
    if pixel_parts:
        pixel, point = np.concatenate(pixel_parts), np.concatenate(point_parts)
        far_first = np.argsort(-depth[point], kind="stable")
        pixel, point = pixel[far_first], point[far_first]
        image[pixel] = colors[point]  # of equal indices the last assignment stays
        nearest[pixel] = depth[point]
    return image.reshape(canvas.shape), nearest.reshape(height, width)


def _disc(radius: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    reach = int(np.ceil(radius))
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    inside = dx**2 + dy**2 <= (radius + 0.25) ** 2
    return dx[inside], dy[inside]


def _with_relief(image: NDArray[np.uint8], depth: NDArray[np.float32], strength: float, step: int) -> NDArray[np.uint8]:
    """Darkens pixels that lie behind their neighbours (eye-dome lighting): edges of objects become readable."""
    width = depth.shape[1]
    hit = np.flatnonzero(np.isfinite(depth))
    log_depth = np.full(depth.size + 2 * step * width, np.inf, np.float32)  # a margin of sky above and below
    log_depth[hit + step * width] = np.log(depth.reshape(-1)[hit])
    here = log_depth[hit + step * width]
    behind = np.zeros(len(hit), np.float32)
    for offset in (-step * width, step * width, -step, step):
        behind += np.clip(here - log_depth[hit + step * width + offset], 0, 0.15)
    shade = np.exp(-2 * strength * behind)[:, None]
    shaded = image.reshape(-1, 3).copy()
    shaded[hit] = np.rint(shaded[hit] * shade + np.array(BACKGROUND, np.float32) * (1 - shade))
    return shaded.reshape(image.shape)


def _finite(xyz: ArrayLike, colors: Colors, *columns: NDArray[np.float64]) -> tuple:
    points = np.asarray(xyz, np.float64).reshape(-1, 3)
    if len(points) != len(colors):
        raise ValueError(f"{len(points)} points and {len(colors)} colours")
    good = np.isfinite(points).all(1)
    return points[good], np.asarray(colors, np.uint8).reshape(-1, 3)[good], *(column[good] for column in columns)


def _reduced(picture: Image.Image, factor: int) -> Image.Image:
    return picture.reduce(factor) if factor > 1 else picture
