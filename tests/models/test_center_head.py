from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from picture3d.models.center_head import CenterHead, CenterHeadConfig, CenterMaps, focal_heatmap_loss
from picture3d.ops.gaussian import draw_gaussians, gaussian_radius
from tests.golden_weights import golden_weight_seed, openpcdet_state
from tests.sample_data import golden_dir, golden_files

CELL, CORNER = (0.32, 0.32), (-74.88, -74.88)


def flat(padded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Padded (B, M, 8) boxes with a class column, as boxes, classes and samples, padding rows included."""
    sample = torch.arange(len(padded)).repeat_interleave(padded.shape[1])
    rows = padded.flatten(0, 1)
    return rows[:, :7], rows[:, 7].long(), sample


def by_x(boxes: Tensor) -> Tensor:
    return boxes[boxes[:, 0].argsort()]


@pytest.mark.parametrize("path", golden_files("openpcdet", "center_head_waymo"))
def test_golden_maps_targets_losses_and_boxes(path):
    golden = np.load(path)
    head = CenterHead(384, CELL, CORNER).eval()
    head.load_state_dict(openpcdet_state(head, "dense_head.", golden_weight_seed(path.parent)))

    def agree(found: Tensor, name: str, tolerance: float) -> None:
        expected = torch.from_numpy(golden[name]).to(found.dtype)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")

    with torch.inference_mode():
        maps = head(torch.from_numpy(golden["spatial_features_2d"]).float())
        for name in ("center", "center_z", "dim", "rot", "iou", "hm"):
            agree(getattr(maps, name), f"raw_{name}", 1e-4)
        truth = flat(torch.from_numpy(golden["gt_boxes"]))
        shape = (maps.hm.shape[0], maps.hm.shape[2], maps.hm.shape[3])
        targets = head.targets(*truth, shape)
        used = torch.from_numpy(golden["tgt_masks"]).bool()
        agree(targets.heatmap, "tgt_heatmaps", 1e-5)
        expected = torch.from_numpy(golden["tgt_target_boxes"])[used]
        torch.testing.assert_close(targets.code, expected, rtol=1e-5, atol=1e-5)
        assert targets.cell.tolist() == golden["tgt_inds"][golden["tgt_masks"].astype(bool)].tolist()
        losses = head.loss(maps, *truth)
        agree(losses["heatmap"], "loss_hm_loss_head_0", 1e-5)
        agree(2 * losses["regression"], "loss_loc_loss_head_0", 1e-5)
        agree(losses["iou"], "loss_iou_loss_head_0", 1e-5)
        agree(2 * losses["iou_regression"], "loss_iou_reg_loss_head_0", 1e-5)
        agree(losses["total"], "loss", 1e-5)
        for sample, detected in enumerate(head.decode(maps)):
            assert detected.labels.tolist() == golden[f"det{sample}_pred_labels"].tolist()
            agree(detected.scores, f"det{sample}_pred_scores", 1e-4)
            # A predicted IoU at or below -1 makes a score 0: many boxes share it, and their order means nothing.
            expected, tied = torch.from_numpy(golden[f"det{sample}_pred_boxes"]), detected.scores == 0
            torch.testing.assert_close(detected.boxes[~tied], expected[~tied], rtol=1e-4, atol=1e-4)
            for label in (1, 2, 3):
                rows = tied & (detected.labels == label)
                torch.testing.assert_close(by_x(detected.boxes[rows]), by_x(expected[rows]), rtol=1e-4, atol=1e-4)


def test_golden_keys():
    path = golden_dir() / "openpcdet" / "keys" / "detect_waymo.json"
    if not path.exists():
        pytest.skip(f"key list {path.name} is absent")
    listed = json.loads(path.read_text())["state_dict"]
    found = {f"dense_head.{key}": list(value.shape) for key, value in CenterHead(384, CELL, CORNER).state_dict().items()}
    assert found == {key: shape for key, shape in listed.items() if key.startswith("dense_head.")}


def small_head() -> CenterHead:
    torch.manual_seed(0)
    return CenterHead(8, (1.0, 1.0), (-8.0, -6.0), CenterHeadConfig(channels=8))


def perfect_maps(head: CenterHead, boxes: Tensor, classes: Tensor, sample: Tensor, shape: tuple[int, int, int]) -> CenterMaps:
    """Maps that say exactly what the targets ask for."""
    targets = head.targets(boxes, classes, sample, shape)
    size, height, width = shape
    code = torch.zeros(size, 8, height * width)
    code[targets.sample, :, targets.cell] = targets.code
    code = code.view(size, 8, height, width)
    heat = torch.logit(targets.heatmap.where(targets.heatmap == 1, 0), eps=1e-6)
    return CenterMaps(code[:, :2], code[:, 2:3], code[:, 3:6], code[:, 6:8], torch.ones(size, 1, height, width), heat)


BOXES = torch.tensor(
    [[1.3, -2.2, 0.5, 4.0, 2.0, 1.5, 0.7], [-6.5, 4.9, -1.0, 0.8, 0.6, 1.7, -2.9], [7.4, 5.3, 0.0, 1.8, 0.6, 1.7, 3.0]]
)
CLASSES, SAMPLE = torch.tensor([1, 2, 3]), torch.tensor([0, 0, 1])


def test_maps_that_meet_the_targets_are_decoded_to_the_true_boxes_and_cost_nothing_but_the_heat_map():
    head = small_head()
    maps = perfect_maps(head, BOXES, CLASSES, SAMPLE, (2, 12, 16))
    first, second = head.decode(maps)
    assert (first.labels.tolist(), second.labels.tolist()) == ([1, 2], [3])
    torch.testing.assert_close(torch.cat([first.boxes, second.boxes]), BOXES, rtol=1e-5, atol=1e-5)
    assert min(first.scores.min(), second.scores.min()) > 0.99
    losses = head.loss(maps, BOXES, CLASSES, SAMPLE)
    assert losses["regression"].item() == 0
    assert losses["iou"].item() == pytest.approx(0, abs=1e-4)  # overlaps with themselves within the corner tolerance


def test_neighbours_learn_to_point_to_the_same_box():
    boxes = torch.cat([BOXES[:1], BOXES[2:]])
    config = CenterHeadConfig(channels=8, neighbours=1)
    head = CenterHead(8, (1.0, 1.0), (-8.0, -6.0), config)
    targets = head.targets(boxes, CLASSES[:2], torch.tensor([0, 0]), (1, 12, 16))
    # The first box lies in row 3, column 9; the second in the last row and column: four cells are inside.
    expected = {(row, column) for row in (2, 3, 4) for column in (8, 9, 10)} | {
        (row, column) for row in (10, 11) for column in (14, 15)
    }
    assert {(int(cell) // 16, int(cell) % 16) for cell in targets.cell} == expected
    place = torch.stack([targets.cell % 16, targets.cell // 16], 1) + targets.code[:, :2] + torch.tensor([-8.0, -6.0])
    torch.testing.assert_close(place, targets.box[:, :2])
    assert (targets.heatmap == 1).sum() == 2, "the heat map is that of the boxes' own cells"
    shifted = perfect_maps(head, boxes, CLASSES[:2], torch.tensor([0, 0]), (1, 12, 16))
    heat = torch.full_like(shifted.hm, -20.0)
    heat[0, 0, 2, 10], heat[0, 1, 10, 14] = 20.0, 20.0  # peaks one cell off
    (found,) = head.decode(replace(shifted, hm=heat))
    torch.testing.assert_close(found.boxes, boxes, rtol=1e-5, atol=1e-5)


def test_padding_rows_other_classes_and_boxes_beyond_the_limit_are_left_out_of_targets():
    head = CenterHead(8, (1.0, 1.0), (-8.0, -6.0), CenterHeadConfig(channels=8, max_boxes=2))
    boxes = torch.cat([BOXES, torch.zeros(1, 7), BOXES[:1], BOXES[1:2], BOXES[2:3]])
    classes = torch.tensor([1, 2, 3, 1, 0, 1, 2])
    sample = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    targets = head.targets(boxes, classes, sample, (3, 12, 16))
    assert targets.sample.tolist() == [0, 0, 2]
    torch.testing.assert_close(targets.box, boxes[[0, 1, 6]])
    assert (targets.heatmap == 1).sum().item() == 3


def test_a_box_beyond_the_border_is_drawn_on_the_border():
    head = small_head()
    far = torch.tensor([[100.0, -100.0, 0.0, 4.0, 2.0, 1.5, 0.0]])
    targets = head.targets(far, torch.tensor([1]), torch.tensor([0]), (1, 12, 16))
    assert targets.cell.tolist() == [15]  # last column of the first row
    assert targets.heatmap[0, 0, 0, 15] == 1
    torch.testing.assert_close(targets.code[0, :2], torch.tensor([0.5, 0.0]))


def test_a_small_start_says_the_same_everywhere_and_the_published_one_does_not():
    torch.manual_seed(0)
    bev = torch.randn(1, 16, 12, 12)
    for small in (True, False):
        head = CenterHead(16, (0.5, 0.5), (-3.0, -3.0), CenterHeadConfig(channels=16, small_start=small))
        maps = head(bev)
        for name, middle in (("center", 0.0), ("dim", 0.0), ("hm", -2.19)):
            spread = (getattr(maps, name) - middle).std()
            assert (spread < 0.05) == small, name
    # The heat map keeps PyTorch's own first weights; Kaiming's would be 2.4 times as wide.
    last = CenterHead(16, (0.5, 0.5), (-3.0, -3.0)).get_submodule("heads_list.0.hm.1")
    assert isinstance(last, torch.nn.Conv2d)
    assert last.weight.abs().max() <= (9 * 64) ** -0.5


def test_without_any_box_only_the_heat_map_costs_and_gradients_are_finite():
    head = small_head()
    maps = head(torch.randn(2, 8, 12, 16))
    losses = head.loss(maps, torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert losses["regression"].item() == losses["iou"].item() == losses["iou_regression"].item() == 0
    assert losses["heatmap"].item() > 0
    losses["total"].backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in head.parameters())


def test_maps_without_a_peak_give_no_boxes():
    head = small_head()
    maps = head(torch.zeros(1, 8, 12, 16))
    silent = CenterMaps(maps.center, maps.center_z, maps.dim, maps.rot, maps.iou, torch.full_like(maps.hm, -20.0))
    (found,) = head.decode(silent)
    assert len(found) == 0
    assert found.boxes.shape == (0, 7)


def test_the_turned_angle_of_the_published_suppression_changes_what_is_kept():
    # Two long boxes side by side: apart as they are, one over the other once turned by 90 degrees about their own centres.
    pair = torch.tensor([[0.0, 0.0, 0.0, 6.0, 2.0, 1.5, 0.0], [0.0, 2.5, 0.0, 6.0, 2.0, 1.5, 0.0]])
    classes, sample = torch.tensor([1, 1]), torch.tensor([0, 0])
    counts = []
    for turned in (True, False):
        config = CenterHeadConfig(channels=8, nms_thresholds=(0.3, 0.3, 0.3), published_nms_angle=turned)
        head = CenterHead(8, (1.0, 1.0), (-8.0, -6.0), config)
        counts.append(len(head.decode(perfect_maps(head, pair, classes, sample, (1, 12, 16)))[0]))
    assert counts == [1, 2]


def test_the_heat_map_loss_by_hand():
    logits = torch.tensor([[0.0, 2.0]])
    share = torch.sigmoid(logits)[0].tolist()
    target = torch.tensor([[1.0, 0.5]])
    expected = -(np.log(share[0]) * (1 - share[0]) ** 2 + np.log(1 - share[1]) * share[1] ** 2 * 0.5**4)
    assert focal_heatmap_loss(logits, target).item() == pytest.approx(expected, rel=1e-6)


def test_overlapping_gaussians_keep_the_larger_value_and_are_cut_at_the_border():
    zeros = torch.zeros(2, dtype=torch.int64)
    maps = draw_gaussians(torch.tensor([0, 0]), torch.tensor([0, 2]), torch.tensor([2, 1]), zeros, (2, 4, 5))
    sigma = 5 / 6
    assert maps[0, 0, 0] == maps[0, 0, 2] == 1
    wide, narrow = np.exp(-1 / (2 * sigma**2)), np.exp(-1 / (2 * 0.5**2))
    assert maps[0, 0, 1].item() == pytest.approx(max(wide, narrow), rel=1e-6)
    assert maps[0, 0, 3].item() == pytest.approx(narrow, rel=1e-6)
    assert not maps[1].any()
    assert maps[0, 3].abs().sum() == 0


def test_the_radius_is_the_smallest_of_three_cases():
    length, width, overlap = 10.0, 4.0, 0.1
    roots = [
        (14 + np.sqrt(14**2 - 4 * 40 * 0.9 / 1.1)) / 2,
        (28 + np.sqrt(28**2 - 16 * 0.9 * 40)) / 2,
        (-2.8 + np.sqrt(2.8**2 + 16 * 0.1 * 0.9 * 40)) / 2,
    ]
    assert gaussian_radius(torch.tensor([length]), torch.tensor([width]), overlap).item() == pytest.approx(min(roots), rel=1e-6)
