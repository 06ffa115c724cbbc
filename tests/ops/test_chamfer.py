from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from picture3d.ops import chamfer as chamfer_module
from picture3d.ops.chamfer import chamfer, chamfer_plain


def brute_force(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    out = []
    for p, t in zip(predicted.astype(np.float64), target.astype(np.float64), strict=True):
        to_target = np.mean([min(float(((a - b) ** 2).sum()) for b in t) for a in p])
        to_predicted = np.mean([min(float(((a - b) ** 2).sum()) for a in p) for b in t])
        out.append(to_target + to_predicted)
    return np.array(out)


def sets(voxels: int, points: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(voxels, points, 3, generator=torch.Generator().manual_seed(seed))


def test_two_points_three_four_apart_are_twice_twenty_five():
    assert chamfer(torch.tensor([[[0.0, 0.0, 0.0]]]), torch.tensor([[[3.0, 4.0, 0.0]]])).item() == 50.0


def test_a_repeated_target_point_weighs_as_often_as_it_occurs():
    predicted = torch.zeros(1, 1, 3)
    target = torch.tensor([[[0.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0]]])
    assert chamfer(predicted, target).item() == pytest.approx(0 + 3 / 4)


@given(st.integers(1, 6), st.integers(1, 7), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_equals_brute_force(voxels: int, points: int, targets: int, seed: int):
    predicted, target = sets(voxels, points, seed), sets(voxels, targets, seed + 1)
    expected = brute_force(predicted.numpy(), target.numpy())
    np.testing.assert_allclose(chamfer(predicted, target).numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(chamfer_plain(predicted, target).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_values_and_gradients_equal_the_plain_twin_over_several_chunks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chamfer_module, "_PAIRS_PER_CHUNK", 5 * 16 * 64)
    predicted, target = sets(23, 16, 0).double().requires_grad_(), sets(23, 64, 1).double().requires_grad_()
    weight = torch.rand(23, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    results = []
    for function in (chamfer, chamfer_plain):
        value = function(predicted, target)
        results.append((value.detach(), *torch.autograd.grad((value * weight).sum(), (predicted, target))))
    for name, fast, plain in zip(("value", "predicted gradient", "target gradient"), *results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_agree_with_finite_differences():
    predicted, target = sets(2, 3, 5).double().requires_grad_(), sets(2, 4, 6).double()
    assert torch.autograd.gradcheck(lambda p: chamfer(p, target), (predicted,))


def test_no_voxels_give_no_distances_and_a_graph():
    predicted = torch.zeros(0, 16, 3, requires_grad=True)
    distances = chamfer(predicted, torch.zeros(0, 64, 3))
    assert distances.shape == (0,)
    distances.sum().backward()
    assert predicted.grad is not None


def test_equal_sets_are_at_distance_zero_with_a_zero_gradient():
    predicted = sets(3, 8, 1).requires_grad_()
    distances = chamfer(predicted, predicted.detach().clone())
    distances.sum().backward()
    assert predicted.grad is not None
    assert distances.abs().max() == 0
    assert predicted.grad.abs().max() == 0


def test_half_precision_predictions_are_compared_in_single_precision():
    predicted, target = sets(3, 4, 1, scale=0.01).bfloat16(), sets(3, 5, 2, scale=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distances = chamfer(predicted, target)
    assert distances.dtype == torch.float32
    np.testing.assert_allclose(distances.numpy(), brute_force(predicted.float().numpy(), target.numpy()), rtol=1e-5)


@pytest.mark.parametrize(
    ("predicted", "target"), [((2, 4, 3), (3, 4, 3)), ((2, 0, 3), (2, 4, 3)), ((2, 4, 2), (2, 4, 3)), ((2, 3), (2, 4, 3))]
)
def test_shapes_that_do_not_fit_are_refused(predicted: tuple[int, ...], target: tuple[int, ...]):
    with pytest.raises(ValueError, match="set"):
        chamfer(torch.zeros(predicted), torch.zeros(target))
