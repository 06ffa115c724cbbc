"""What the processes of a step share: counts, sums, draws and the group they talk in. One process alone shares nothing.

A loss is a sum over rows divided by a count. Where W processes hold the rows of one batch, each divides its own sum by the mean
of the counts; the mean of these W quotients, which is what averaged gradients follow, is then the sum over the whole batch
divided by its count: the loss of one process with all rows. Random numbers of rows are drawn for the whole batch by everyone,
and each takes its own: what is drawn for a row does not depend on how many processes there are.

The training loop says with `computing_together` when processes compute one step. Outside of it every function here is local and
gives exactly what the plain expression gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

_group: dist.ProcessGroup | None = None
_zeros: list[Tensor] = []


@contextmanager
def computing_together(group: dist.ProcessGroup | None) -> Iterator[None]:
    """While the block runs, this process computes its share of a batch beside the other processes of `group` (None: alone).

    All of them have to make the same calls in the same order.
    """
    global _group
    before, _group = _group, group
    _zeros.clear()
    try:
        yield
    finally:
        _group = before
        _zeros.clear()


def group_of_step() -> dist.ProcessGroup | None:
    """The processes that compute this step together; None for one alone."""
    return _group


def add_to_loss(zero: Tensor) -> None:
    """Gives the step's loss a term: a scalar 0 whose backward pass talks to the other processes.

    The backward pass of an operation runs only where the loss depends on it. In a process without a row it may not, and the
    others would wait for ever.
    """
    _zeros.append(zero)


def with_added_terms(loss: Tensor) -> Tensor:
    """The loss and what was given to `add_to_loss` since `computing_together` began: the same number."""
    for zero in _zeros:
        loss = loss + zero.to(loss.dtype)
    return loss


def mean_count(count: int | Tensor, like: Tensor) -> int | Tensor:
    """What to divide a sum over `count` rows by: the mean of the processes' counts; one row at least is counted.

    Args:
        count: rows of this process, or a sum of weights of rows (a scalar tensor).
        like: any tensor on the device where it is wanted.

    Returns:
        Of one process alone the count itself, at least 1 (a float mass of 0 becomes 1 too); else a float32 scalar, or float64
        beside a float64 `count`.
    """
    if _group is None:
        if isinstance(count, int):
            return max(1, count)
        return torch.where(count > 0, count, 1.0) if count.is_floating_point() else count.clamp(min=1)
    exact = torch.as_tensor(count, dtype=torch.float64, device=like.device).detach().clone()
    dist.all_reduce(exact, group=_group)
    kind = torch.float64 if not isinstance(count, int) and count.dtype == torch.float64 else torch.float32
    return (torch.where(exact > 0, exact, 1.0) / dist.get_world_size(_group)).to(kind)


def total_of_processes(own: Tensor) -> Tensor:
    """The sum of all processes' tensors, for losses that are no sum over rows but a function of such sums.

    Each process then has the loss of the whole batch. The gradient of its own part is taken once for every process, so that the
    mean of the processes' gradients is that of one process with all rows.
    """
    if _group is None:
        return own
    total = own.detach().clone()
    dist.all_reduce(total, group=_group)
    return total + (own - own.detach()) * dist.get_world_size(_group)


def rand_rows(rows: int, generator: torch.Generator, columns: tuple[int, ...] = ()) -> Tensor:
    """(rows, *columns) float32 uniform in 0..1, on the generator's device: this process's part of the draw for all rows.

    The generators of all processes have to be in the same state; they are in the same state afterwards.
    """
    if _group is None:
        return torch.rand(rows, *columns, generator=generator, device=generator.device)
    each = rows_of_processes(rows, generator.device, _group)
    begin = sum(each[: dist.get_rank(_group)])
    drawn = torch.rand(sum(each), *columns, generator=generator, device=generator.device)
    return drawn[begin : begin + rows].clone()


def rows_of_processes(rows: int, device: torch.device, group: dist.ProcessGroup) -> list[int]:
    """How many rows each process of the group has."""
    own = torch.tensor([rows], dtype=torch.int64, device=device)
    all_rows = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_rows, own, group=group)
    return [int(n) for n in torch.cat(all_rows).tolist()]
