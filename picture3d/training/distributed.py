"""Several processes that train as one: who they are, how they agree, and who is missed when one falls silent.

`torchrun` (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as it does) starts the processes; without it
there is one, and everything here costs nothing. On a CPU they talk by gloo, between GPUs by NCCL.

Each process tells the job's key-value store every other second that it lives and where it is. When a collective operation
fails or takes too long, the message says of every process where it was last seen. See `docs/cluster.md`.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from picture3d.errors import Picture3dError, TrainingError
from picture3d.training.watch import Watch

TIMEOUT_S = 600.0  # a collective operation may take so long: the slowest process may be reading a far-away disk
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Place:
    """Which process of a job this is."""

    rank: int = 0  # 0..world - 1
    world: int = 1
    local_rank: int = 0  # among those of its machine: which GPU is its own


def launched_place(environment: Mapping[str, str] | None = None) -> Place:
    """This process's place, as `torchrun` says it; alone if nobody says anything.

    Raises:
        TrainingError: if RANK and WORLD_SIZE contradict each other, or only some of the variables are set.
    """
    found = os.environ if environment is None else environment
    if "RANK" not in found and "WORLD_SIZE" not in found:
        return Place()
    try:
        place = Place(int(found["RANK"]), int(found["WORLD_SIZE"]), int(found.get("LOCAL_RANK", "0")))
    except (KeyError, ValueError):
        said = ", ".join(f"{name}={found.get(name, '(unset)')}" for name in _ENVIRONMENT)
        raise TrainingError(f"the environment names a rank but no job ({said}). Start with torchrun, or unset RANK.") from None
    if not 0 <= place.rank < place.world:
        raise TrainingError(f"RANK={place.rank} is not among the {place.world} processes of WORLD_SIZE. Start with torchrun.")
    return place


@dataclass(eq=False)
class Team:
    """The processes of a job, seen from one of them. `Team()` is one alone: every method answers at once."""

    place: Place = Place()
    norms: dist.ProcessGroup | None = None  # for what happens within a step, apart from the gradients' own traffic
    watch: Watch | None = field(default=None, repr=False)
    gatherings: int = field(default=0, repr=False)  # so far

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self.place.world == 1

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes files: the first."""
        return self.place.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose call computes a loss and whose gradients become means over all processes.

        Raises:
            TrainingError: if a norm in it knows only the rows of its own process.
        """
        if self.alone:
            return module
        for name, layer in module.named_modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not getattr(layer, "synchronised", False):
                raise TrainingError(
                    f"layer {name} is a {type(layer).__name__} that sees the rows of its own process only. Build it from "
                    "picture3d.models.row_norm, or train in one process."
                )
        # Statistics of synchronised norms are equal everywhere: there is nothing to broadcast but the start.
        with warnings.catch_warnings():
            # The newest PyTorch wants another name for it, which older ones do not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor of equal shape over all processes."""
        if self.alone:
            return values
        with self.at("the losses of all processes"):
            summed = values.detach().to("cpu", torch.float64)
            dist.all_reduce(summed)
        return (summed / self.place.world).to(values.dtype).to(values.device)

    def any(self, value: bool) -> bool:
        """Whether it is true in at least one process."""
        if self.alone:
            return value
        with self.at("an agreement"):
            flag = torch.tensor([int(value)])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def texts(self, text: str) -> list[str]:
        """What each process says, by rank."""
        if self.alone:
            return [text]
        with self.at("a gathering of texts"):
            own, sizes = self._padded(text.encode())
            rows = [torch.empty_like(own) for _ in sizes]
            dist.all_gather(rows, own)
        return [row[:size].numpy().tobytes().decode() for row, size in zip(rows, sizes, strict=True)]

    def gather(self, own: bytes) -> list[bytes]:
        """What each process brings, by rank, in the first process; nothing in the others.

        The processes may come at very different times: nobody's patience ends while all of them live.
        """
        if self.alone:
            return [own]
        assert self.watch is not None
        self.gatherings += 1
        with self.at("the results of the others", waits=False):
            self.watch.meet(f"gathering {self.gatherings}")
        with self.at("a gathering of results"):
            padded, sizes = self._padded(own)
            rows = [torch.empty_like(padded) for _ in sizes] if self.writes else []
            dist.gather(padded, rows or None, dst=0)
        return [row[:size].numpy().tobytes() for row, size in zip(rows, sizes, strict=False)]

    def _padded(self, own: bytes) -> tuple[Tensor, list[int]]:
        """The bytes, at the length of the longest of all processes (one at least), and the length of each."""
        size = torch.tensor([len(own)])
        sizes = [torch.empty_like(size) for _ in range(self.place.world)]
        dist.all_gather(sizes, size)
        lengths = [int(n) for n in sizes]
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8)
        padded[: len(own)] = torch.frombuffer(bytearray(own or b" "), dtype=torch.uint8)[: len(own)]
        return padded, lengths

    def first_does(self, what: str, work: Callable[[], str]) -> str:
        """Lets the first process do something and tells all what came out; nobody goes on before it is done.

        Raises:
            Picture3dError: what `work` raised, in the first process as it was, in the others as a TrainingError that quotes it.
        """
        if self.alone:
            return work()
        with self.at(what):
            error: Picture3dError | None = None
            said = ""
            if self.writes:
                try:
                    said = f"+{work()}"
                except Picture3dError as found:
                    error, said = found, f"-{found}"
        said = self.texts(said)[0]
        if error is not None:
            raise error
        if said.startswith("-"):
            raise TrainingError(f"rank 0 refused: {said[1:]}")
        return said[1:]

    @contextmanager
    def at(self, where: str, *, waits: bool = True) -> Iterator[None]:
        """Says where this process is, and turns a broken or timed-out collective operation into words.

        `waits`: for other processes; False: for a disk, or for nobody.

        Raises:
            TrainingError: naming the processes that are gone, and where each was last seen.
        """
        if self.watch is None:
            yield
            return
        before = self.watch.where, self.watch.waits
        self.watch.where, self.watch.waits = where, waits
        try:
            yield
        except RuntimeError as error:
            if not _is_broken_collective(error):
                raise
            raise TrainingError(self.watch.report(f"{where}: {str(error).splitlines()[0][:200]}")) from error
        self.watch.where, self.watch.waits = before


@contextmanager
def joined_team(device: torch.device, *, timeout_s: float | None = None, place: Place | None = None) -> Iterator[Team]:
    """The team of this process: the job's if it was launched as part of one, else `Team()`.

    Args:
        device: what this process computes on.
        timeout_s: longest time of a collective operation; None: PICTURE3D_TIMEOUT_S of the environment, or 600.
        place: as found by `launched_place`.

    Raises:
        TrainingError: if the processes do not find each other in time.
    """
    place = launched_place() if place is None else place
    if place.world == 1:
        yield Team()
        return
    limit = float(os.environ.get("PICTURE3D_TIMEOUT_S", TIMEOUT_S)) if timeout_s is None else timeout_s
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            backend, rank=place.rank, world_size=place.world, timeout=timedelta(seconds=limit), init_method="env://"
        )
        norms = dist.new_group()
        assert isinstance(norms, dist.ProcessGroup)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise TrainingError(
            f"rank {place.rank} of {place.world} on {socket.gethostname()}: the processes of the job did not find each other "
            f"at {address} within {limit:g} s ({str(error).splitlines()[0][:200]}). Look whether all were started, and whether "
            "that address and port can be reached from every machine."
        ) from error
    watch = Watch(place.rank, place.world, limit)
    team = Team(place, norms, watch)
    try:
        with watch:
            try:
                yield team
                with team.at("the end of the job"):
                    dist.barrier()
            except BaseException as error:
                watch.leave(f"{type(error).__name__}: {error}")
                raise
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _is_broken_collective(error: RuntimeError) -> bool:
    text = str(error).lower()
    signs = ("gloo", "nccl", "connection closed", "connection reset", "timed out waiting", "pair closure", "broken pipe")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)
