"""Freed memory stays with the process, compiled operations do not: by the books of glibc and oneDNN, in processes apart."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys

import pytest

from picture3d.training.host_memory import can_keep_freed_memory

# Bytes that glibc has asked the system for block by block while a tensor of 64 MiB is held, and resident bytes afterwards.
# Where the heap begins is drawn anew for every process: it takes one to four steps until every block has found its place.
PROGRAM = """
import ctypes, json, sys, torch
from picture3d.training.host_memory import keep_freed_memory

class Books(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Books
kept = keep_freed_memory()
assert keep_freed_memory() == kept

def resident():  # counted page by page; statm is off by up to 16 MiB after a process has changed cores
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))

peaks = []
for step in range(40):  # the same sizes step after step, with small tensors that outlive them
    blocks = [torch.ones(size, 1 << 18) for size in (64, 3, 40)]
    mapped, held = library.mallinfo2().hblkhd, resident()
    small = [torch.ones(1000) for _ in range(50)]
    del blocks
    peaks.append(resident())
print(json.dumps({"kept": kept, "mapped": mapped, "freed": held - resident(), "growth": peaks[-1] - peaks[10]}))
"""


def run(**environment: str) -> dict[str, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "PICTURE3D_KEEP"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


@needs_glibc
def test_large_blocks_come_from_kept_memory_which_does_not_grow():
    found = run()
    assert found["kept"]
    assert found["mapped"] < 1 << 25  # none of the tensors
    assert abs(found["freed"]) < 1 << 20
    assert found["growth"] < 1 << 20


@needs_glibc
@pytest.mark.parametrize("name", ["PICTURE3D_KEEP_FREED_MEMORY", "MALLOC_TRIM_THRESHOLD_"])
def test_a_switch_or_a_threshold_set_from_outside_leaves_the_library_alone(name: str):
    found = run(**{name: "0"})
    assert not found["kept"]
    assert found["mapped"] > 1 << 26  # the tensor of 64 MiB
    assert found["freed"] > 1 << 26


SHAPES = """
import torch
from picture3d.training.host_memory import keep_few_operations

keep_few_operations()
for rows in (*range(2, 302), 301, 2):
    torch.nn.functional.gelu(torch.ones(rows, 8))
"""


@pytest.mark.parametrize(("capacity", "last_two"), [(None, ["hit", "miss"]), ("1024", ["hit", "hit"]), ("0", ["miss", "miss"])])
def test_compiled_operations_of_long_ago_are_dropped_unless_the_environment_keeps_them(capacity, last_two):
    environment = os.environ | {"ONEDNN_VERBOSE": "2"}
    environment.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    if capacity is not None:
        environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = capacity
    done = subprocess.run([sys.executable, "-c", SHAPES], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = re.findall(r"create:cache_(hit|miss),cpu,eltwise", done.stdout)
    if not found:
        pytest.skip("this PyTorch does not compute GELU with oneDNN")
    assert len(found) == 302
    assert found[-2:] == last_two


def test_another_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not can_keep_freed_memory()
