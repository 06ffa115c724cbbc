"""Set attention: the padded and the bucketed form against stock PyTorch on one set at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from picture3d.ops.attention import AttentionWeights, PositionRows, pooling_attention, set_attention
from picture3d.ops.sets import (
    FullSets,
    PaddedSets,
    SetRuns,
    Windows,
    full_sets,
    padded_sets,
    set_partition,
    set_runs,
    window_partition,
)
from tests.ops.test_sets import random_coords

C, HEADS = 12, 3


def random_weights(seed: int = 0) -> AttentionWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3 * C, C), (3 * C,), (C, C), (C,)]
    return AttentionWeights(*(torch.randn(s, generator=generator, dtype=torch.float64) * 0.3 for s in shapes), heads=HEADS)


def stock_attention(weights: AttentionWeights) -> nn.MultiheadAttention:
    stock = nn.MultiheadAttention(C, HEADS, batch_first=True, dtype=torch.float64)
    keys = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    values = (weights.in_weight, weights.in_bias, weights.out_weight, weights.out_bias)
    stock.load_state_dict(dict(zip(keys, values, strict=True)))
    return stock


def layouts(windows: Windows, set_size: int) -> dict[str, PaddedSets | FullSets | SetRuns]:
    partition = set_partition(windows, set_size)
    return {
        "padded": padded_sets(windows, set_size),
        "full": full_sets(partition),
        "runs": set_runs(partition),
    }


def random_windows(count: int, seed: int = 0) -> Windows:
    return window_partition(random_coords(count, (17, 13, 3), seed=seed), (17, 13, 3), (6, 6, 3), (3, 3, 0))


@pytest.mark.parametrize("shared", [False, True], ids=["own positions", "shared positions"])
@pytest.mark.parametrize("some", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize("count", [1, 2, 37, 400])
@pytest.mark.parametrize("axis", [0, 1])
def test_every_form_equals_stock_attention_set_by_set_values_and_gradients(count: int, axis: int, some: bool, shared: bool):
    windows, weights = random_windows(count), random_weights()
    partition = set_partition(windows, 11)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, C, generator=generator, dtype=torch.float64)
    position = torch.randn(5 if shared else count, C, generator=generator, dtype=torch.float64)
    row_of_voxel = torch.randint(5, (count,), generator=generator) if shared else None
    wanted = torch.randperm(count, generator=generator)[: count // 2] if some else torch.arange(count)
    weight = torch.randn(len(wanted), C, generator=generator, dtype=torch.float64)

    stock, inputs = stock_attention(weights), [x.clone().requires_grad_(), position.clone().requires_grad_()]
    query_key = inputs[0] + (inputs[1] if row_of_voxel is None else inputs[1][row_of_voxel])
    expected = torch.zeros(count, C, dtype=torch.float64)
    for rows in torch.tensor_split(partition.order[axis], partition.set_start[1:-1]):
        asked, answer = query_key[rows][None], inputs[0][rows][None]
        expected = expected.index_add(0, rows, stock(asked, asked, answer, need_weights=False)[0][0])
    (expected[wanted] * weight).sum().backward()
    parts = (stock.in_proj_weight, stock.in_proj_bias, stock.out_proj.weight, stock.out_proj.bias)
    gradients = [tensor.grad for tensor in (*inputs, *parts)]

    for name, sets in layouts(windows, 11).items():
        held = (x, position, weights.in_weight, weights.in_bias, weights.out_weight, weights.out_bias)
        leaves = [t.clone().requires_grad_() for t in held]
        ours, positions = AttentionWeights(*leaves[2:], heads=HEADS), PositionRows(leaves[1], row_of_voxel)
        out = set_attention(leaves[0], positions, sets, axis, ours, wanted if some else None)
        (out * weight).sum().backward()
        torch.testing.assert_close(out, expected[wanted], msg=lambda m, n=name: f"{n}: {m}")
        for leaf, gradient in zip(leaves, gradients, strict=True):
            torch.testing.assert_close(leaf.grad, gradient, msg=lambda m, n=name: f"{n}, gradient: {m}")


def nowhere(count: int, dtype: torch.dtype = torch.float64) -> PositionRows:
    return PositionRows(torch.zeros(count, C, dtype=dtype), None)


@pytest.mark.parametrize("form", ["padded", "full", "runs"])
def test_no_voxels_attend_to_nothing(form: str):
    x = torch.zeros(0, C, dtype=torch.float64, requires_grad=True)
    out = set_attention(x, nowhere(0), layouts(random_windows(0), 11)[form], 0, random_weights())
    assert out.shape == (0, C)
    out.sum().backward()


@pytest.mark.parametrize("form", ["padded", "full", "runs"])
def test_bfloat16_stays_near_float64(form: str):
    windows, weights = random_windows(200), random_weights()
    x = torch.randn(200, C, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sets = layouts(windows, 11)[form]
    exact = set_attention(x, nowhere(200), sets, 0, weights)
    single = AttentionWeights(
        weights.in_weight.float(), weights.in_bias.float(), weights.out_weight.float(), weights.out_bias.float(), HEADS
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = set_attention(x.float(), nowhere(200, torch.float32), sets, 0, single)
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() < 0.05 * exact.abs().max()  # 8 bits of mantissa through three products


def pooled_by_stock_attention(x: Tensor, cell: Tensor, slot: Tensor, embedding: Tensor, weights: AttentionWeights, holes: bool):
    """Cell by cell, slots written out; the published form lets empty slots take part as zeros."""
    stock, slots = stock_attention(weights), len(embedding)
    query, attended = [], []
    for c in range(int(cell.max()) + 1):
        table = x.new_zeros(slots, C).index_copy(0, slot[cell == c], x[cell == c])
        present = torch.zeros(slots, dtype=torch.bool).index_fill_(0, slot[cell == c], True)
        use = torch.ones_like(present) if holes else present
        top = table[use].amax(0)
        keys = (table + embedding)[use]
        attended.append(stock(top[None, None], keys[None], table[use][None], need_weights=False)[0][0, 0])
        query.append(top)
    return torch.stack(query), torch.stack(attended)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("holes", [True, False])
def test_pooling_equals_stock_attention_cell_by_cell_values_and_gradients(holes: bool, padded: bool):
    slots, cells = 6, 25
    generator = torch.Generator().manual_seed(3)
    place = torch.randperm(slots * cells, generator=generator)[:70].sort().values
    _, cell = torch.unique(place // slots, return_inverse=True)
    slot = place % slots
    x = torch.randn(70, C, generator=generator, dtype=torch.float64) - 0.5  # mostly negative: holes decide the maximum
    embedding = torch.randn(slots, C, generator=generator, dtype=torch.float64)
    weights = random_weights()
    count = int(cell.max()) + 1
    ours, theirs = ([t.clone().requires_grad_() for t in (x, embedding)] for _ in range(2))
    got = pooling_attention(ours[0], cell, slot, count, ours[1], weights, empty_slots_take_part=holes, padded=padded)
    expected = pooled_by_stock_attention(theirs[0], cell, slot, theirs[1], weights, holes)
    factors = torch.randn(2, count, C, generator=generator, dtype=torch.float64)
    for pair, leaves in ((got, ours), (expected, theirs)):
        (torch.stack(pair) * factors).sum().backward()
        assert all(leaf.grad is not None for leaf in leaves)
    for name, a, b in zip(("query", "attended"), got, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")
    for name, a, b in zip(("features", "embedding"), ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, n=name: f"gradient of {n}: {m}")


def test_a_pooled_cell_with_a_hole_never_asks_with_a_negative_value():
    x = torch.full((3, C), -2.0, dtype=torch.float64)
    cell, slot = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    embedding = torch.zeros(2, C, dtype=torch.float64)
    for take_part, expected in ((True, [-2.0, 0.0]), (False, [-2.0, -2.0])):
        for padded in (True, False):
            query, _ = pooling_attention(
                x, cell, slot, 2, embedding, random_weights(), empty_slots_take_part=take_part, padded=padded
            )
            assert query[:, 0].tolist() == expected


def test_two_voxels_and_no_embedding_share_by_their_dot_products():
    # One head of width 1, identity projections: weights exp(1 * 1) and exp(1 * 2) for the first voxel.
    eye = torch.tensor([[1.0], [1.0], [1.0]])
    weights = AttentionWeights(eye, torch.zeros(3), torch.ones(1, 1), torch.zeros(1), heads=1)
    windows = window_partition(torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]]), (4, 4, 1), (4, 4, 1), (0, 0, 0))
    x, flat = torch.tensor([[1.0], [2.0]]), PositionRows(torch.zeros(2, 1), None)
    e = math.e
    expected = torch.tensor([[(e * 1 + e**2 * 2) / (e + e**2)], [(e**2 * 1 + e**4 * 2) / (e**2 + e**4)]])
    for sets in layouts(windows, 4).values():
        torch.testing.assert_close(set_attention(x, flat, sets, 0, weights), expected)
