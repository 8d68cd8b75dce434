"""Settings of the memory allocator that torch is fastest with on CPUs."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def tune_allocator() -> None:
    """Keep freed memory in the process rather than map and fault it anew for every large tensor.

    A training step on a CPU takes 0.7 of the time (measured on two cores, `docs/benchmarks.md`). Threads share the
    arena of the first one: in arenas of their own a network takes 1.6 times as long, for these are given back all the
    same. glibc alone knows these settings; elsewhere nothing happens. Call it before torch is imported.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Give the system the memory that was freed, which glibc otherwise keeps for the process."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
