"""What a process does with memory it no longer needs: what it has freed stays with it, compiled operations do not pile up.

PyTorch takes a CPU tensor from the C library and gives it back as soon as it is no longer used. glibc asks the system for every
block above 32 MiB anew and returns it at once; the next one is then filled page by page by the kernel, which at the size of a
Waymo frame takes a third of a training step. A process that computes the same sizes step after step does better to keep what it
has had: its resident memory stays at its peak, which it would reach again in the next step anyway.

oneDNN, with which PyTorch computes convolutions and some activations on a CPU, compiles an operation for each shape it meets
and keeps the last 1,024 of them. Sparse voxels bring new shapes with every step: what is kept serves nobody, and lies scattered
over the heap, so that no large block fits between. Resident memory then grows for hundreds of steps.
"""

from __future__ import annotations

import ctypes
import os
import platform

SWITCH = "PICTURE3D_KEEP_FREED_MEMORY"  # 0 in the environment: leave the C library alone

# Parameters of glibc's mallopt, <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER_TRIM, _LARGEST_BLOCK = -1, 2**31 - 1

_KEPT_OPERATIONS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"  # oneDNN reads it at its first operation
_ENOUGH_OPERATIONS = "256"  # those of a detector's convolutions and their gradients, whose shapes do recur


def keep_few_operations() -> None:
    """Lets oneDNN keep few compiled operations, unless the environment says how many; before the first one is computed."""
    os.environ.setdefault(_KEPT_OPERATIONS, _ENOUGH_OPERATIONS)


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory, from now on and for the whole process; returns whether it will.

    Nothing is done, and False returned, where the C library is another one, where `PICTURE3D_KEEP_FREED_MEMORY` is 0, and where
    the thresholds are already set from outside (`MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_`, `GLIBC_TUNABLES`). Calling
    it again changes nothing.
    """
    if not can_keep_freed_memory():
        return False
    try:
        library = ctypes.CDLL(None)
        return bool(library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and library.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM))
    except (OSError, AttributeError):  # a glibc by name that has no mallopt
        return False


def can_keep_freed_memory() -> bool:
    """Whether :func:`keep_freed_memory` would do anything here."""
    set_outside = any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"))
    return platform.libc_ver()[0] == "glibc" and os.environ.get(SWITCH, "1") != "0" and not set_outside
