import io

import numpy as np
import pytest
from PIL import Image

from picture3d.structures.poses import Pose
from picture3d.view import pictures
from picture3d.view.pictures import BACKGROUND, Camera

RED = np.array([[255, 0, 0]], np.uint8)
AHEAD = Camera(eye_m=(0, 0, 0), target_m=(10, 0, 0), fov_deg=90)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def reddest(image: Image.Image) -> tuple[int, int]:
    shown = pixels(image).astype(int)
    row, column = np.unravel_index((shown[..., 0] - shown[..., 1]).argmax(), shown.shape[:2])
    return int(column), int(row)


def plain_bird_eye(xyz: np.ndarray, colors: np.ndarray, **settings) -> Image.Image:
    return pictures.bird_eye(xyz, colors, rings_m=(), labelled_rings=False, **settings)


@pytest.mark.parametrize(
    ("x", "y", "column", "row"),
    [(-50, 50, 0, 0), (49.9, -49.9, 99, 99), (25.5, 10.5, 75, 39), (-10.1, -30.1, 39, 80)],
)
def test_bird_eye_puts_a_point_on_its_pixel(x: float, y: float, column: int, row: int):
    image = plain_bird_eye(np.array([[x, y, 0]]), RED, extent_m=50, size_px=100, point_px=1, supersample=1)
    shown = pixels(image)
    assert tuple(shown[row, column]) == (255, 0, 0)
    assert (shown.reshape(-1, 3) == (255, 0, 0)).all(1).sum() == 1


@pytest.mark.parametrize("yaw_deg", [0, -90, 17])
def test_on_the_page_the_car_looks_up(yaw_deg: float):
    ego_from_lidar = Pose.from_yaw(np.radians(yaw_deg), (1.0, 2.0, 3.0))
    ahead = ego_from_lidar.inverse().rotation @ (10.0, 0.0, 0.0)  # in the LiDAR frame
    np.testing.assert_allclose(pictures.page_from_lidar(ego_from_lidar).apply(ahead[None]), [[0, 10, 0]], atol=1e-12)


def test_bird_eye_follows_its_centre_and_averages_down():
    image = plain_bird_eye(np.array([[110.5, -39.5, 0]]), RED, extent_m=50, center_m=(100, -50), size_px=100, point_px=2)
    assert reddest(image) == (60, 39)


def test_bird_eye_shows_the_higher_of_two_points():
    xyz = np.array([[20.5, 20.5, 3.0], [20.5, 20.5, -1.0]])
    colors = np.array([[255, 0, 0], [0, 255, 0]], np.uint8)
    for order in ([0, 1], [1, 0]):
        image = plain_bird_eye(xyz[order], colors[order], extent_m=50, size_px=100, point_px=3, supersample=1)
        assert tuple(pixels(image)[29, 70]) == (255, 0, 0)


def test_points_outside_or_not_finite_are_left_out():
    xyz = np.array([[500.0, 0, 0], [np.nan, 0, 0], [0, np.inf, 0], [0, -500, 0]])
    shown = plain_bird_eye(xyz, np.full((4, 3), 255, np.uint8), size_px=64)
    empty = plain_bird_eye(np.zeros((0, 3)), np.zeros((0, 3), np.uint8), size_px=64)
    np.testing.assert_array_equal(pixels(shown), pixels(empty))


def test_camera_projects_as_worked_out_by_hand():
    found, depth = AHEAD.project(np.array([[10.0, 0, 0], [10, -10, 0], [10, 0, 5], [-4, 0, 0]]), (200, 100))
    np.testing.assert_allclose(found[:3], [[100, 50], [200, 50], [100, 0]], atol=1e-9)  # 90 degrees: focal length 100 pixels
    np.testing.assert_allclose(depth, [10, 10, 10, -4], atol=1e-9)


def test_orbit_stands_behind_and_above_its_target():
    camera = Camera.orbit((1, 2, 3), distance_m=10, yaw_deg=90, pitch_deg=30)
    np.testing.assert_allclose(camera.eye_m, (1, 2 - 10 * np.cos(np.pi / 6), 3 + 5), atol=1e-9)
    np.testing.assert_allclose(camera.rotation() @ camera.rotation().T, np.eye(3), atol=1e-12)
    assert np.isfinite(Camera((0, 0, 9), (0, 0, 0)).rotation()).all(), "straight down"


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_near_points_hide_far_ones(order: list[int]):
    xyz = np.array([[5.0, 0, 0], [20.0, 0, 0]])[order]
    colors = np.array([[255, 0, 0], [0, 255, 0]], np.uint8)[order]
    image = pictures.perspective(xyz, colors, camera=AHEAD, size_px=(100, 60), fog_m=None, supersample=1, min_px=3)
    assert tuple(pixels(image)[30, 50]) == (255, 0, 0)


def test_near_points_are_larger_and_those_behind_the_camera_are_gone():
    def area(x: float) -> int:
        image = pictures.perspective(
            np.array([[x, 0, 0]]), RED, camera=AHEAD, size_px=(200, 120), point_m=1, max_px=60, fog_m=None, supersample=1
        )
        return int((pixels(image) != BACKGROUND).any(-1).sum())

    assert area(4) > 3 * area(8) > 3 * 3 * area(20) > 0
    assert area(-5) == 0


def test_fog_takes_colour_and_relief_darkens_what_lies_behind():
    def shown(x: float, **settings) -> np.ndarray:
        image = pictures.perspective(np.array([[x, 0, 0]]), RED, camera=AHEAD, size_px=(60, 40), supersample=1, **settings)
        return pixels(image)[20, 30]

    assert shown(80, fog_m=80, relief=0)[0] < shown(10, fog_m=80, relief=0)[0] <= 255
    wall = np.stack(np.meshgrid([30.0], np.linspace(-5, 5, 200), np.linspace(-5, 5, 200)), -1).reshape(-1, 3)
    post = np.stack(np.meshgrid([6.0], [0.0], np.linspace(-1, 1, 100)), -1).reshape(-1, 3)
    xyz, colors = np.concatenate([wall, post]), np.full((len(wall) + len(post), 3), 200, np.uint8)
    settings = {"camera": AHEAD, "size_px": (120, 80), "fog_m": None, "supersample": 1, "min_px": 3.0}
    flat = pixels(pictures.perspective(xyz, colors, relief=0, **settings)).astype(int)
    raised = pixels(pictures.perspective(xyz, colors, relief=1, **settings)).astype(int)
    assert (raised <= flat + 1).all()
    assert (raised < flat - 20).any()


@pytest.mark.parametrize("draw", [plain_bird_eye, lambda xyz, colors: pictures.perspective(xyz, colors, camera=AHEAD)])
def test_an_empty_sweep_is_a_dark_picture(draw):
    shown = pixels(draw(np.zeros((0, 3)), np.zeros((0, 3), np.uint8)))
    assert (shown[0] == BACKGROUND).all()


def test_points_and_colours_must_match():
    with pytest.raises(ValueError, match="2 points and 1 colours"):
        pictures.bird_eye(np.zeros((2, 3)), RED)


def test_the_same_points_give_the_same_bytes():
    rng = np.random.default_rng(0)
    xyz, colors = rng.normal(size=(500, 3)) * 10, rng.integers(0, 256, (500, 3), dtype=np.uint8)
    first, second = (pictures.webp_bytes(pictures.perspective(xyz, colors, camera=AHEAD, size_px=(80, 60))) for _ in range(2))
    assert first == second


def test_png_and_webp_are_what_they_say_and_png_is_exact():
    image = plain_bird_eye(np.array([[1.0, 1, 0]]), RED, size_px=40)
    opened = Image.open(io.BytesIO(pictures.png_bytes(image)))
    assert opened.format == "PNG"
    np.testing.assert_array_equal(pixels(opened), pixels(image))
    assert Image.open(io.BytesIO(pictures.webp_bytes(image))).format == "WEBP"
    assert pictures.data_uri(b"abc", "image/png") == "data:image/png;base64,YWJj"


def test_a_contact_sheet_holds_every_picture():
    sheet = pictures.contact_sheet([Image.new("RGB", (40, 30), (200, i, 0)) for i in range(5)], list("abcde"), columns=3)
    found = {tuple(color) for color in pixels(sheet).reshape(-1, 3)}
    assert {(200, i, 0) for i in range(5)} <= found
