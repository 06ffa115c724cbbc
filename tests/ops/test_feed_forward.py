"""The second half of an encoder layer against its operations one by one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from picture3d.ops.feed_forward import FeedForwardWeights, feed_forward, feed_forward_plain

C, F = 6, 9
SHAPES = ((C,), (C,), (F, C), (F,), (C, F), (C,), (C,), (C,), (C,), (C,))  # in the order of the fields


def random_tensors(rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Features, what attention says, and the parameters."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rows, C), (rows, C), *SHAPES))
    return [values.to(dtype) for values in drawn]


def weights_of(flat: list[Tensor]) -> FeedForwardWeights:
    return FeedForwardWeights(
        (flat[0], flat[1]), (flat[2], flat[3]), (flat[4], flat[5]), (flat[6], flat[7]), (flat[8], flat[9]), 1e-5
    )


@pytest.mark.parametrize("rows", [0, 1, 30])
def test_values_and_gradients_equal_the_operations_one_by_one(rows: int):
    results, leaves = [], [[t.clone().requires_grad_() for t in random_tensors(rows)] for _ in range(2)]
    factors = torch.randn(rows, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for form, (x, attended, *flat) in zip((feed_forward, feed_forward_plain), leaves, strict=True):
        results.append(form(x, attended, weights_of(flat)))
        (results[-1] * factors).sum().backward()
    torch.testing.assert_close(*results)
    for one, other in zip(*leaves, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_products_run_in_the_dtype_of_attention_and_gradients_come_back_in_that_of_their_tensors():
    wide = random_tensors(50)
    exact = feed_forward_plain(wide[0], wide[1], weights_of(wide[2:]))
    x, attended, *flat = (t.requires_grad_() for t in random_tensors(50, torch.float32))
    low = attended.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = feed_forward(x, low, weights_of(flat))
    assert out.dtype == torch.float32
    assert (out - exact).abs().mean() < 0.02  # of values around 1, with 8 bits of mantissa through two products
    out.square().sum().backward()
    assert [t.grad.dtype for t in (x, low, *flat) if t.grad is not None] == [torch.float32, torch.bfloat16] + [
        torch.float32
    ] * 10


def test_only_what_is_dear_to_compute_is_kept():
    x, attended, *flat = (t.requires_grad_() for t in random_tensors(50))
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        feed_forward(x, attended, weights_of(flat))
    assert sorted(shape for shape in kept if shape[0] == 50 and shape[1] > 1) == [(50, C)] * 3


ANY_NUMBER_OF_ROWS = """
import torch
from tests.ops.test_feed_forward import feed_forward, random_tensors, weights_of

for rows in (5, 6, 7):
    leaves = [t.requires_grad_() for t in random_tensors(rows, torch.float32)]
    feed_forward(leaves[0], leaves[1], weights_of(leaves[2:])).sum().backward()
print("done")
"""


def test_no_operation_is_compiled_for_a_number_of_rows():
    environment = os.environ | {"ONEDNN_VERBOSE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", ANY_NUMBER_OF_ROWS]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.rstrip().endswith("done")
    assert "exec,cpu,eltwise" not in done.stdout
