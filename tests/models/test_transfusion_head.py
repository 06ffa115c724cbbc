from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from picture3d.errors import ConfigError, TrainingError
from picture3d.models.transfusion_decoder import LocalDecoder, published_decoder
from picture3d.models.transfusion_head import TransFusionConfig, TransFusionHead, TransFusionOutput
from picture3d.models.transfusion_targets import MapFrame, MatchingCosts, decode_boxes, encode_boxes, match
from tests.golden_weights import golden_weight_seed, openpcdet_input, openpcdet_state
from tests.sample_data import golden_dir, golden_files

RAW = ("center", "height", "dim", "rot", "vel", "iou", "heatmap", "query_heatmap_score", "dense_heatmap")


def close(found: Tensor, expected: np.ndarray | Tensor, tolerance: float, name: str = "") -> None:
    expected = torch.as_tensor(expected).to(found.dtype)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("path", golden_files("openpcdet", "transfusion_head_nuscenes"))
def test_golden_outputs_targets_losses_and_boxes(path):
    golden = np.load(path)
    seed = golden_weight_seed(path.parent)
    head = TransFusionHead(384, (0.6, 0.6), (-14.4, -14.4)).eval()
    head.load_state_dict(openpcdet_state(head, "dense_head.", seed))
    bev = openpcdet_input("transfusion/spatial_features_2d", (1, 384, 48, 48), seed)
    close(bev.flatten()[:8], golden["input_head8"], 0)
    rows = torch.from_numpy(golden["gt_boxes"][0])
    truth = rows[:, :9], rows[:, 9].long(), torch.zeros(len(rows), dtype=torch.int64)
    with torch.inference_mode():
        output = head(bev)
        assert output.query_labels.tolist() == golden["query_labels"].tolist()
        for name in RAW:
            close(getattr(output, name), golden[f"raw_{name}"], 1e-4, name)
        frame = MapFrame((0.6, 0.6), (-14.4, -14.4), (48, 48))
        close(decode_boxes(output.code, frame)[0], golden["decoded_boxes"], 1e-4)
        targets = head.targets(output, *truth)
        assert targets.labels.tolist() == golden["tgt_labels"].tolist()
        assert targets.matched.sum().item() == golden["num_pos"].item()
        close(targets.code, golden["tgt_bbox_targets"], 1e-5)
        close(targets.matched.float(), golden["tgt_bbox_weights"], 0)
        close(targets.heatmap, golden["tgt_heatmap"], 1e-5)
        close(targets.iou[targets.matched].mean(), golden["matched_iou"], 1e-5)
        losses = head.loss(output, *truth)
        close(losses["heatmap"], golden["loss_loss_heatmap"], 1e-5)
        close(losses["classification"], golden["loss_loss_cls"], 1e-5)
        close(0.25 * losses["box"], golden["loss_loss_bbox"], 1e-5)
        close(0.5 * losses["iou"], golden["loss_loss_iou"], 1e-5)
        close(losses["total"], golden["loss"], 1e-5)
        (found,) = head.decode(output)
        assert found.labels.tolist() == golden["det_pred_labels"].tolist()
        close(found.scores, golden["det_pred_scores"], 1e-4)
        close(found.boxes, golden["det_pred_boxes"], 1e-4)


@pytest.mark.parametrize(("keys", "width"), [("detect_nuscenes", 256), ("detect_nuscenes_dsvt_width128", 128)])
def test_golden_keys(keys, width):
    path = golden_dir() / "openpcdet" / "keys" / f"{keys}.json"
    if not path.exists():
        pytest.skip(f"key list {path.name} is absent")
    listed = json.loads(path.read_text())["state_dict"]
    head = TransFusionHead(384, (0.6, 0.6), (-54.0, -54.0), TransFusionConfig(channels=width))
    found = {f"dense_head.{key}": list(value.shape) for key, value in head.state_dict().items()}
    assert found == {key: shape for key, shape in listed.items() if key.startswith("dense_head.")}


CLASSES = ("car", "bus", "pedestrian")
SETTINGS = TransFusionConfig(
    classes=CLASSES,
    channels=16,
    branch_channels=8,
    heads=4,
    ffn_channels=12,
    proposals=20,
    radius=3,
    small_classes=("pedestrian",),
    nms_thresholds=(0.0, 0.0, 0.175),
)
BOXES = torch.tensor(
    [
        [1.3, -2.2, 0.5, 4.0, 2.0, 1.5, 0.7, 3.0, -1.0],
        [-6.5, 3.9, -1.0, 9.0, 2.6, 3.1, -2.9, 0.0, 0.0],
        [5.4, 4.3, 0.0, 0.8, 0.6, 1.7, 3.0, 0.5, 0.5],
    ]
)
CLASS, SAMPLE = torch.tensor([1, 2, 3]), torch.tensor([0, 0, 1])
NONE = torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)


def small_head(settings: TransFusionConfig = SETTINGS) -> TransFusionHead:
    torch.manual_seed(0)
    return TransFusionHead(6, (1.0, 1.0), (-8.0, -6.0), settings)


def bev(batch: int = 2, height: int = 12, width: int = 16) -> Tensor:
    return torch.randn(batch, 6, height, width, generator=torch.Generator().manual_seed(1))


def perfect_output(head: TransFusionHead, proposals: int = 6) -> TransFusionOutput:
    """One sample: the first proposals say exactly what the boxes are, the others are far away and silent."""
    frame = MapFrame(head.cell_size, head.range_min, (16, 12))
    code = torch.zeros(1, proposals, 10)
    code[0, : len(BOXES)] = encode_boxes(BOXES, frame)
    code = code.transpose(1, 2)
    heatmap = torch.full((1, len(CLASSES), proposals), -15.0)
    heatmap[0, CLASS - 1, torch.arange(len(BOXES))] = 15.0
    labels = torch.zeros(1, proposals, dtype=torch.int64)
    labels[0, : len(BOXES)] = CLASS - 1
    score = torch.zeros_like(heatmap)
    score[0, CLASS - 1, torch.arange(len(BOXES))] = 1.0
    return TransFusionOutput(
        center=code[:, :2],
        height=code[:, 2:3],
        dim=code[:, 3:6],
        rot=code[:, 6:8],
        vel=code[:, 8:],
        iou=torch.ones(1, 1, proposals),
        heatmap=heatmap,
        query_heatmap_score=score,
        query_labels=labels,
        dense_heatmap=torch.zeros(1, len(CLASSES), 16, 12),
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wrap", [False, True])
def test_the_fast_decoder_equals_the_published_one_with_gradients_and_running_statistics(training, wrap):
    torch.manual_seed(0)
    fast = LocalDecoder(16, 4, 12, radius=3, wrap=wrap).double().train(training)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    slow = LocalDecoder(16, 4, 12, radius=3, wrap=wrap).double().train(training)
    slow.load_state_dict(fast.state_dict())
    place = torch.stack([torch.tensor([0, 8, 71, 35, 9]), torch.tensor([63, 62, 40, 5, 5])])  # corners, borders, twice the same
    weight = torch.randn(2, 5, 16, dtype=torch.float64)
    results = []
    for decoder, run in ((fast, fast), (slow, lambda *inputs: published_decoder(slow, *inputs))):
        generator = torch.Generator().manual_seed(3)
        cells = torch.randn(2, 16, 8, 9, dtype=torch.float64, generator=generator, requires_grad=True)
        query = torch.randn(2, 5, 16, dtype=torch.float64, generator=generator, requires_grad=True)
        out = run(cells, query, place)
        (out * weight).sum().backward()
        gradients = {name: p.grad for name, p in decoder.named_parameters()}
        results.append((out, cells.grad, query.grad, gradients, dict(decoder.named_buffers())))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)


def test_a_proposal_on_the_border_meets_cells_of_the_next_row_only_where_the_published_wrap_is_kept():
    place = torch.tensor([[8]])  # x = 0, y = 8, the last of 9: cell 0 is (-1, 9) by flat index
    for wrap, expected in ((True, {0, 7, 8, 9, 16, 17, 18}), (False, {7, 8, 16, 17})):
        index, masked = LocalDecoder(4, 1, 4, radius=1, wrap=wrap).neighbours(place, 5, 9)
        assert set(index[~masked].tolist()) == expected
        assert len(index[~masked]) == len(expected)


def test_encoding_and_decoding_are_inverse():
    frame = MapFrame((0.5, 0.25), (-8.0, -6.0), (16, 12))
    torch.testing.assert_close(decode_boxes(encode_boxes(BOXES, frame), frame), BOXES, rtol=1e-5, atol=1e-5)


def test_proposals_that_say_the_truth_are_matched_cost_next_to_nothing_and_are_decoded_to_it():
    head = small_head()
    output = perfect_output(head)
    sample = torch.zeros(3, dtype=torch.int64)
    targets = head.targets(output, BOXES, CLASS, sample)
    assert targets.labels.tolist() == [[0, 1, 2, 3, 3, 3]]
    torch.testing.assert_close(targets.iou[0], torch.tensor([1.0, 1, 1, 0, 0, 0]), rtol=1e-4, atol=1e-4)
    losses = head.loss(output, BOXES, CLASS, sample)
    assert losses["box"].item() == pytest.approx(0, abs=1e-6)
    assert losses["classification"].item() == pytest.approx(0, abs=1e-6)
    assert losses["iou"].item() == pytest.approx(0, abs=1e-4)
    (found,) = head.decode(output)
    assert found.labels.tolist() == CLASS.tolist()
    torch.testing.assert_close(found.boxes, BOXES, rtol=1e-5, atol=1e-5)
    assert found.scores.min() > 0.999


def test_matching_finds_the_least_of_all_assignments():
    generator = torch.Generator().manual_seed(5)
    boxes = torch.cat(
        [torch.randn(5, 3, generator=generator) * 3, torch.rand(5, 3, generator=generator) + 1, torch.zeros(5, 3)], 1
    )
    true = boxes[[3, 0, 4]] + 0.4
    logits = torch.randn(5, 2, generator=generator)
    frame, kind = MapFrame((1.0, 1.0), (-8.0, -8.0), (16, 16)), torch.tensor([0, 1, 1])
    # Distance alone: three copies that are moved by the same step are nearest to what they were copied from, in the sum.
    proposal, pick, overlap = match(boxes, logits, true, kind, frame, MatchingCosts(0.0, 1.0, 0.0, True))
    distance = (boxes[:, None, :2] - true[None, :, :2]).abs().sum(2)
    least = min(
        distance[a, 0] + distance[b, 1] + distance[c, 2]
        for a in range(5)
        for b in range(5)
        for c in range(5)
        if len({a, b, c}) == 3
    )
    assert proposal.tolist() == sorted(proposal.tolist())
    assert distance[proposal, pick].sum().item() == pytest.approx(least.item(), rel=1e-6)
    assert overlap.shape == (3,)


def test_heights_matter_to_matching_only_as_the_switch_says():
    # Same centre, one twice as high: [z, z + dz] of both begin together, [z - dz / 2, z + dz / 2] do not.
    low = torch.tensor([[0.0, 0, 0, 2, 2, 2, 0, 0, 0]])
    high = torch.tensor([[0.0, 0, 1, 2, 2, 4, 0, 0, 0]])
    frame = MapFrame((1.0, 1.0), (-8.0, -8.0), (16, 16))
    overlaps = []
    for published in (True, False):
        costs = MatchingCosts(0.15, 0.25, 0.25, published)
        overlaps.append(match(low, torch.zeros(1, 1), high, torch.tensor([0]), frame, costs)[2].item())
    assert overlaps[0] == pytest.approx(1 / 5, rel=1e-5)  # [0, 2] and [1, 5]
    assert overlaps[1] == pytest.approx(2 / 4, rel=1e-5)  # [-1, 1] and [-1, 3]


def test_a_diverged_network_is_refused_by_name():
    head = small_head()
    output = perfect_output(head)
    output.dim[0, 0, 4] = torch.inf
    with pytest.raises(TrainingError, match="diverged"):
        head.loss(output, BOXES, CLASS, torch.zeros(3, dtype=torch.int64))


def test_without_any_box_all_is_background_and_gradients_are_finite():
    head = small_head()
    output = head(bev())
    targets = head.targets(output, *NONE)
    assert (targets.labels == len(CLASSES)).all()
    assert not targets.heatmap.any()
    losses = head.loss(output, *NONE)
    assert losses["box"].item() == losses["iou"].item() == 0
    assert losses["classification"].item() > 0
    losses["total"].backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)


def test_a_sample_without_boxes_beside_one_with_boxes_is_background():
    head = small_head()
    output = head(bev())
    targets = head.targets(output, BOXES[:2], CLASS[:2], torch.tensor([1, 1]))
    assert targets.matched.sum(1).tolist() == [0, 2]
    assert targets.heatmap[0].sum() == 0
    assert (targets.heatmap[1] == 1).sum().item() == 2


def test_boxes_of_other_classes_and_without_size_are_left_out():
    head = small_head()
    output = head(bev())
    flat = BOXES.clone()
    flat[1, 3] = 0
    targets = head.targets(output, flat, torch.tensor([1, 2, 0]), SAMPLE)
    assert targets.matched.sum(1).tolist() == [1, 0]
    assert (targets.heatmap == 1).sum().item() == 1


def test_more_boxes_than_proposals_are_matched_as_far_as_proposals_go():
    head = small_head(SETTINGS.model_copy(update={"proposals": 2}))
    output = head(bev(1))
    targets = head.targets(output, BOXES, CLASS, torch.zeros(3, dtype=torch.int64))
    assert targets.matched.tolist() == [[True, True]]
    assert torch.isfinite(head.loss(output, BOXES, CLASS, torch.zeros(3, dtype=torch.int64))["total"])


@pytest.mark.parametrize(("height", "width"), [(2, 2), (1, 3), (3, 3)])
def test_a_map_with_fewer_places_than_proposals_proposes_them_all(height, width):
    head = small_head(SETTINGS.model_copy(update={"proposals": 200})).eval()
    output = head(bev(1, height, width))
    assert output.center.shape == (1, 2, 3 * height * width)
    for found in head.decode(output):
        assert found.boxes.shape[1] == 9
        assert torch.isfinite(found.boxes).all()


def test_the_map_is_read_as_x_times_y_also_where_it_is_not_square():
    head = small_head().eval()
    frame = MapFrame(head.cell_size, head.range_min, (16, 12))
    heat = head.targets(head(bev(1)), BOXES[:1], CLASS[:1], SAMPLE[:1]).heatmap
    assert (heat[0, 0] == 1).nonzero().tolist() == [[9, 3]]  # x 1.3 + 8, y -2.2 + 6
    torch.testing.assert_close(encode_boxes(BOXES[:1], frame)[0, :2], torch.tensor([9.3, 3.8]))


def test_large_classes_propose_at_local_maxima_and_on_the_border_only_where_asked_for():
    heat = torch.zeros(1, 3, 6, 6)
    heat[0, :, 2, 2], heat[0, :, 2, 3], heat[0, :, 0, 5] = 0.9, 0.8, 0.7
    peaks = small_head()._peaks(heat)[0]
    assert peaks[0].nonzero().tolist() == peaks[1].nonzero().tolist() == [[2, 2]]
    assert peaks[2].nonzero().tolist() == [[0, 5], [2, 2], [2, 3]]  # pedestrians stand close
    peaks = small_head(SETTINGS.model_copy(update={"silent_border": False}))._peaks(heat)[0]
    assert peaks[0].nonzero().tolist() == [[0, 5], [2, 2]]


def test_only_classes_with_a_threshold_are_suppressed():
    head = small_head()
    output = perfect_output(head)
    for name in ("center", "height", "dim", "rot"):
        values = getattr(output, name)
        values[0, :, 3], values[0, :, 4] = values[0, :, 2], values[0, :, 0]  # a second pedestrian, a second car
    for row, label in ((3, 2), (4, 0)):
        output.query_labels[0, row] = label
        output.heatmap[0, label, row] = 5.0
        output.query_heatmap_score[0, label, row] = 0.5
    (found,) = head.decode(output)
    assert found.labels.tolist() == [1, 2, 3, 1]


def test_proposals_without_heat_or_beyond_the_limits_give_no_boxes():
    head = small_head()
    output = perfect_output(head)
    output.center[0, 0, 0] = 1000.0
    output.query_heatmap_score[0, :, 1:] = 0
    (found,) = head.decode(output)
    assert len(found) == 0
    assert found.boxes.shape == (0, 9)


def test_training_reaches_the_boxes_of_two_frames():
    head = small_head()
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    inputs, totals, boxes = bev(), [], []
    for _ in range(60):
        losses = head.loss(head(inputs), BOXES, CLASS, SAMPLE)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        totals.append(losses["total"].item())
        boxes.append(losses["box"].item())
    assert totals[-1] < 0.3 * totals[0]
    assert boxes[-1] < 0.5 * boxes[0]


def test_half_precision_trains_on_numbers_close_to_those_of_single_precision():
    totals = []
    for half in (False, True):
        head = small_head()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = head(bev())
        losses = head.loss(output, BOXES, CLASS, SAMPLE)
        losses["total"].backward()
        assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)
        totals.append(losses["heatmap"].item())
    assert totals[1] == pytest.approx(totals[0], rel=0.02)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"nms_thresholds": (0.1,)}, "nms_thresholds"), ({"small_classes": ("tram",)}, "tram"), ({"heads": 7}, "heads")],
)
def test_settings_that_contradict_each_other_are_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        TransFusionConfig.from_tree({**TransFusionConfig().model_dump(mode="json"), **wrong})
