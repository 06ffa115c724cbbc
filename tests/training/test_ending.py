"""Processes of torchrun that share work without talking to each other."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as settled

import pytest
from torch._C._distributed_c10d import TCPStore

from picture3d.errors import DataError
from picture3d.training import ending
from picture3d.training.ending import ending_together


@pytest.fixture(params=[True, False], ids=["launcher's store", "first process's store"])
def launched(request, monkeypatch):
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(request.param))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    if request.param:
        yield
        del server  # lives until here
    else:
        del server  # the port is free again
        yield


def end(rank: int, world: int, error: Exception | None = None) -> int:
    with ending_together((rank, world)):
        if error is not None:
            raise error
    return rank


def waits(*futures: Future[int]) -> bool:
    return not settled(futures, timeout=0.5).done


@pytest.mark.parametrize("error", [DataError("a.raw: cut off"), OSError("a.raw: cut off")])
def test_an_error_leaves_the_block_after_the_slowest_process_has_come_to_its_end(launched, error):
    with ThreadPoolExecutor(3) as pool:
        failed = pool.submit(end, 0, 3, error)
        well = pool.submit(end, 2, 3)
        assert waits(failed, well)
        assert pool.submit(end, 1, 3).result(timeout=30) == 1
        assert well.result(timeout=30) == 2
        with pytest.raises(type(error), match=r"a\.raw: cut off"):
            failed.result(timeout=30)


def test_a_job_that_torchrun_started_again_waits_anew(launched, monkeypatch):
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(end, range(2), [2, 2], timeout=30)) == [0, 1]
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        first = pool.submit(end, 0, 2)
        assert waits(first)
        assert pool.submit(end, 1, 2).result(timeout=30) == 1
        assert first.result(timeout=30) == 0


def test_nobody_is_awaited_where_nobody_is_ended(launched, monkeypatch):
    assert end(0, 1) == 0, "alone"
    with pytest.raises(KeyboardInterrupt), ending_together((0, 2)):
        raise KeyboardInterrupt
    monkeypatch.setattr(ending, "_CONNECT_S", 0.5)
    monkeypatch.setattr(ending, "_LATE_S", 0.5)
    monkeypatch.setenv("MASTER_PORT", "1")
    assert end(1, 2) == 1, "without a store"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert end(1, 2) == 1, "parts started by hand"
