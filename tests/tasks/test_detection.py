from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from picture3d.commands.build import build_detection
from picture3d.errors import ConfigError, DataError
from picture3d.recipes.catalogue import detection_recipe
from picture3d.structures.batch import PointBatch
from picture3d.structures.voxels import VoxelGrid
from picture3d.tasks.detection import DetectionNet, DetectionTask, DetectionTaskConfig, boxes_of
from tests.sample_data import golden_dir
from tests.tasks.small_scene import ENCODER, GRID, batch_of, generator, no_points

BEV = {"blocks": [0, 0], "strides": [1, 2], "channels": [24, 24], "upsample_strides": [1, 2], "upsample_channels": [24, 24]}
CLASSES = ["car", "pedestrian"]
CENTER = {
    "kind": "center",
    "classes": CLASSES,
    "channels": 24,
    "rectify": [0, 0],
    "nms_thresholds": [0.2, 0.2],
    "published_nms_angle": False,
}
TRANSFUSION = {
    "kind": "transfusion",
    "classes": CLASSES,
    "channels": 32,
    "proposals": 12,
    "radius": 3,
    "small_classes": ["pedestrian"],
    "nms_thresholds": [0.0, 0.1],
    "rectify": 0.0,
}
HEADS = pytest.mark.parametrize("head", [CENTER, TRANSFUSION], ids=["center", "transfusion"])


def small_detector(head: dict[str, Any], grid: VoxelGrid = GRID) -> DetectionTask:
    torch.manual_seed(0)
    config = DetectionTaskConfig.from_tree({"bev": BEV, "head": head})
    return DetectionTask(DetectionNet(grid, 1, ENCODER, config=config), config)


def boxed(batch: PointBatch, boxes: Tensor, classes: list[int], sample: list[int]) -> PointBatch:
    return replace(batch, boxes=boxes, box_class=torch.tensor(classes).long(), box_sample=torch.tensor(sample).long())


def street() -> PointBatch:
    """Two frames of flat ground: a car and a pedestrian in one, two cars that stand across in the other."""
    draw = torch.Generator().manual_seed(1)
    ground = torch.rand(300, 3, generator=draw) * torch.tensor([15.0, 15.0, 0.1]) - torch.tensor([7.5, 7.5, 1.9])
    boxes = torch.tensor(
        [
            [3.2, 2.6, -1.0, 4.0, 2.0, 1.5, 0.0, 2.0, 0.0],
            [-4.3, -3.7, -0.9, 0.8, 0.8, 1.7, 0.5, 0.0, 0.0],
            [-3.4, 4.1, -1.0, 4.0, 2.0, 1.5, 1.57, 0.0, 0.0],
            [4.5, -4.4, -1.0, 4.0, 2.0, 1.5, 1.57, 0.0, -3.0],
        ]
    )
    clouds = []
    for box in boxes:
        inside = (torch.rand(120, 3, generator=draw) - 0.5) * box[3:6]
        c, s = box[6].cos(), box[6].sin()
        clouds.append(inside @ torch.tensor([[c, s, 0], [-s, c, 0], [0, 0, 1]]) + box[:3])
    points = [torch.cat([ground, *clouds[:2]]), torch.cat([ground, *clouds[2:]])]
    return boxed(batch_of(*points), boxes, [1, 2, 1, 1], [0, 0, 1, 1])


@HEADS
def test_a_detector_learns_where_things_stand_and_where_they_are_heading(head):
    task, batch = small_detector(head), street()
    for group in task.module.modules():
        if isinstance(group, torch.nn.BatchNorm2d):
            group.momentum = 0.1  # a hundred steps are too few for the published one
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=4e-3)
    first = last = torch.zeros(())
    for step in range(100):
        optimizer.zero_grad()
        last = task.loss(batch, generator())["total"]
        first = last.detach() if step == 0 else first
        last.backward()
        torch.nn.utils.clip_grad_norm_(task.module.parameters(), 10)
        optimizer.step()
    assert last < 0.3 * first
    assert batch.boxes is not None
    for index, found in enumerate(task.predict(batch)):
        truth = batch.boxes[index * 2 : index * 2 + 2]
        best = found.scores.argsort(descending=True)[:2]
        distance = torch.cdist(truth[:, :3], found.boxes[best, :3])
        assert distance.min(1).values.max() < 0.6, "centres"
        matched = found.boxes[best][distance.argmin(1)]
        torch.testing.assert_close(matched[:, 3:6], truth[:, 3:6], rtol=0.3, atol=0.1)
        assert ((matched[:, 6] - truth[:, 6]).sin().abs() < 0.4).all()
        assert found.labels[best][distance.argmin(1)].tolist() == [[1, 2], [1, 1]][index]


@HEADS
def test_frames_without_points_or_boxes_have_a_loss_and_an_answer(head):
    task = small_detector(head)
    none = torch.zeros(0, 9)
    for batch in (batch_of(no_points(), no_points()), street()):
        losses = task.loss(boxed(batch, none, [], []), generator())
        assert all(value.isfinite() for value in losses.values())
        losses["total"].backward()
        found = task.predict(batch)
        assert len(found) == 2
        assert all(one.boxes.isfinite().all() for one in found)
    assert task.module.training, "predict leaves the mode as it was"


@HEADS
def test_more_boxes_than_a_head_has_room_for_are_no_error(head):
    task = small_detector(head)
    draw = torch.Generator().manual_seed(2)
    many = torch.rand(600, 9, generator=draw) * 4 + 0.1
    batch = boxed(batch_of(torch.rand(50, 3)), many, [1] * 600, [0] * 600)
    assert task.loss(batch, generator())["total"].isfinite()


def test_unannotated_batches_and_unknown_classes_are_refused_in_words():
    batch = street()
    with pytest.raises(DataError, match=r"log/0, log/1: no boxes\. Detection needs annotated keyframes"):
        boxes_of(replace(batch, boxes=None), 2)
    with pytest.raises(DataError, match="class 2 is not among the 1 classes"):
        boxes_of(batch, 1)
    with pytest.raises(DataError, match="class 0 is not among"):
        boxes_of(replace(batch, box_class=torch.tensor([1, 0, 1, 1])), 2)


def test_a_grid_that_the_levels_do_not_divide_is_refused():
    grid = VoxelGrid((-9.0, -9.0, -2.0), (9.0, 9.0, 2.0), (1.0, 1.0, 1.0))
    with pytest.raises(ConfigError, match=r"ends with 18 x 18 cells .* multiples of 4"):
        DetectionNet(grid, 1, ENCODER)


def test_a_class_that_is_named_twice_or_differs_from_the_data_is_refused():
    with pytest.raises(ConfigError, match="names a class twice"):
        DetectionTaskConfig.from_tree({"head": {**CENTER, "classes": ["car", "car"]}})
    with pytest.raises(ConfigError, match="the same names in the same order"):
        detection_recipe("town-detection", Path("p")).with_overrides(['data.box_classes=["car"]'])


@pytest.mark.parametrize(("recipe", "name"), [("waymo-detection", "detect_waymo"), ("nuscenes-detection", "detect_nuscenes")])
def test_golden_keys_and_shapes_are_those_of_the_published_detectors(recipe, name):
    path = golden_dir() / "openpcdet" / "keys" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"openpcdet/keys/{name}.json is absent under {golden_dir()}")
    published = {key: tuple(shape) for key, shape in json.loads(path.read_text())["state_dict"].items()}
    with torch.device("meta"):
        task = build_detection(detection_recipe(recipe, Path("p")), torch.device("meta"))
    ours = {key: tuple(value.shape) for key, value in task.module.state_dict().items()}
    assert {key: shape for key, shape in published.items() if key != "global_step"} == ours
