from __future__ import annotations

import pytest
import torch

from picture3d.ops import local_attention as module
from picture3d.ops.local_attention import local_attention


def drawn(queries: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(queries, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    cells = torch.randn(11, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 11, (queries, 4), generator=generator)
    masked = torch.rand(queries, 4, generator=generator) < 0.4
    masked[:, 0] = False
    return query, cells, index, masked


@pytest.mark.parametrize("room", [1, 1 << 24])
def test_attention_over_listed_cells_equals_the_plain_formula_however_many_queries_go_at_once(monkeypatch, room):
    monkeypatch.setattr(module, "_BYTES_AT_ONCE_CPU", room)
    query, cells, index, masked = drawn()
    found = local_attention(query, cells, index, masked)
    for q in range(5):
        near = cells[index[q][~masked[q]]]
        for head in range(2):
            share = torch.exp(near @ query[q, head])
            torch.testing.assert_close(found[q, head], (share[:, None] * near).sum(0) / share.sum())


@pytest.mark.parametrize("room", [1, 1 << 24])
def test_gradients_agree_with_finite_differences(monkeypatch, room):
    monkeypatch.setattr(module, "_BYTES_AT_ONCE_CPU", room)
    query, cells, index, masked = drawn()
    assert torch.autograd.gradcheck(lambda q, c: local_attention(q, c, index, masked), (query, cells))


def test_no_query_gives_no_result():
    query, cells, index, masked = drawn(0)
    assert local_attention(query, cells, index, masked).shape == (0, 2, 3)
