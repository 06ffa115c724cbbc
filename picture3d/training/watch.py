"""Signs of life of the processes of a job, and what is said when one of them falls silent."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

SILENT_S = 40.0  # a process that gave no sign of life for so long is dead, or its machine is
LEFT_S = 10.0  # when one has given up, the others learn of it in their own words; one that hangs does not, and is ended
_BEAT_S = 2.0
_MEET_S = 0.1


def job_store(timeout_s: float, *, hosts: bool = False) -> tuple[TCPStore, str]:
    """A connection of one's own to the job's store (the job's is locked while somebody waits on it), and what keys begin with.

    Args:
        timeout_s: how long to look for it.
        hosts: whether this process is to make it.

    Raises:
        RuntimeError: if it is not there.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=hosts, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    return store, f"picture3d/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


class Watch:
    """Tells the store that this process lives and where it is, and ends the process when another one is silent.

    A process whose main thread hangs in a collective operation cannot be reached by an exception: NCCL waits in the driver.
    What the watch finds is therefore said on standard error, and the process is ended from here.
    """

    def __init__(self, rank: int, world: int, timeout_s: float) -> None:
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self.where = "start"
        self.waits = False  # for other processes, not for a disk
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._beats: dict[int, tuple[str, float]] = {}  # rank -> last beat and when it was first seen here
        self._store, self._job = job_store(min(timeout_s, 30.0))
        self._lock = threading.Lock()

    def __enter__(self) -> Watch:
        self._beat(0)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=2 * _BEAT_S)

    def meet(self, where: str) -> None:
        """Waits until every process has come to `where`, a name that is used once, however long that takes.

        One that dies in the meantime ends this process, as it does everywhere else.
        """
        with self._lock:
            self._store.set(self._key(where, self.rank), "here")
        while not self._all_at(where):
            time.sleep(_MEET_S)

    def _all_at(self, where: str) -> bool:
        with self._lock:
            return self._store.check([self._key(where, rank) for rank in range(self.world)])

    def leave(self, why: str) -> None:
        """Tells the others that this process ends, and why."""
        with suppress(RuntimeError), self._lock:
            self._store.set(self._key("left", self.rank), why[:1000])

    def report(self, what: str) -> str:
        """What is known of every process, after each of the others has given another beat or missed two."""
        with suppress(RuntimeError):
            self._look()
        others = [rank for rank in range(self.world) if rank != self.rank]
        before = {rank: self._beats.get(rank, ("", 0.0))[0] for rank in others}
        until = time.monotonic() + 4 * _BEAT_S
        while time.monotonic() < until:
            time.sleep(_BEAT_S / 4)
            with suppress(RuntimeError):
                self._look()
            # The look before the first wait took in what the dead said last: a beat that is new now is one of the living.
            if all(self._state(rank)[0] or self._beats.get(rank, ("", 0.0))[0] != before[rank] for rank in others):
                break
        lost = [rank for rank in range(self.world) if self._state(rank)[0]]
        named = f"rank {', '.join(map(str, lost))} is gone" if lost else "a collective operation failed or took too long"
        states = "; ".join(f"rank {rank} {self._state(rank)[1]}" for rank in range(self.world))
        return (
            f"{named}. Rank {self.rank} was at {what}. Where each was last seen: {states}. The newest checkpoint stands: look "
            f"at what the rank says that is missing or waits elsewhere, then start the job again with --resume. A slow disk "
            f"needs a longer PICTURE3D_TIMEOUT_S (now {self.timeout_s:g} s)."
        )

    def _state(self, rank: int) -> tuple[bool, str]:
        """Whether a process is gone, and what is known of it."""
        if rank == self.rank:
            return False, f"at {self.where} (this one)"
        beat, seen = self._beats.get(rank, ("", 0.0))
        if not beat:
            return True, "was never heard of"
        _, host, pid, where = beat.split("|", 3)
        who = f"(process {pid} on {host})"
        if where.startswith("left: "):
            return True, f"{who} ended with {where.removeprefix('left: ')}"
        silent = time.monotonic() - seen
        return silent > 2 * _BEAT_S, f"{who} at {where}" + (f", silent for {silent:.0f} s" if silent > 2 * _BEAT_S else "")

    def _key(self, kind: str, rank: int) -> str:
        return f"{self._job}/{kind}/{rank}"

    def _beat(self, number: int) -> None:
        with self._lock:
            beat = f"{number}|{socket.gethostname()}|{os.getpid()}|{self.where}"
            self._store.set(self._key("beat", self.rank), beat)

    def _look(self) -> None:
        """Notes what the others last said, and when it was new."""
        with self._lock:
            for rank in range(self.world):
                if rank == self.rank or not self._store.check([self._key("beat", rank)]):
                    continue
                beat = self._store.get(self._key("beat", rank)).decode()
                if self._store.check([self._key("left", rank)]):
                    left = self._store.get(self._key("left", rank)).decode()
                    beat = "|".join([*beat.split("|", 3)[:3], f"left: {left}"])
                if self._beats.get(rank, ("", 0.0))[0] != beat:
                    self._beats[rank] = (beat, time.monotonic())

    def _run(self) -> None:
        number, heard, waiting = 0, time.monotonic(), (self.where, time.monotonic())
        while not self._stop.wait(_BEAT_S):
            number += 1
            with suppress(RuntimeError):
                self._beat(number)
                self._look()
                heard = time.monotonic()
            now = time.monotonic()
            if self.where != waiting[0] or not self.waits:
                waiting = (self.where, now)
            left = [str(rank) for rank, (beat, seen) in self._beats.items() if now - seen > LEFT_S and "|left: " in beat]
            if left:
                self._end(f"rank {', '.join(left)} has given up {LEFT_S:g} s ago")
            silent = [rank for rank, (beat, seen) in self._beats.items() if now - seen > SILENT_S and "|left: " not in beat]
            if silent or now - heard > SILENT_S:
                which = f"rank {', '.join(map(str, silent))} has" if silent else "the store of the job (rank 0's machine) has"
                self._end(f"{which} given no sign of life for {SILENT_S:g} s")
            # The collective's own time-out comes first and is clearer; NCCL's may never come.
            if now - waiting[1] > self.timeout_s + 30 and self.waits:
                self._end(f"waiting for more than {self.timeout_s:g} s")

    def _end(self, why: str) -> None:
        if self._stop.is_set():
            return
        sys.stderr.write(f"Error: {self.report(f'{self.where}, {why}')}\n")
        sys.stderr.flush()
        # The main thread may hang where no exception reaches it; ended from here the launcher sees a failed process.
        os._exit(3)
