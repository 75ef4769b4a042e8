"""Memory of a process: how the C library (glibc) treats freed arrays."""

from __future__ import annotations

import ctypes
import platform

# Of glibc's malloc.h.
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
LARGE = 1 << 18


def give_back_freed_memory() -> None:
    """Makes this process return a large array's memory as soon as the array is freed (glibc).

    By default freed memory stays with the process, fragmented, and every compiling thread has an
    arena of its own. For DiT-XL/2: 0.41 GB instead of 0.7 to quantize, 3.1 instead of 3.9 to sample
    in full precision, 0.1 less for every large network that is compiled. Sampling is as fast as
    before; quantizing takes 1.5 times as long, because every array gets new pages.
    Every command of `qdit` calls it; your own program should call it first, before JAX starts threads.
    It does nothing on systems other than Linux.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_ARENA_MAX, 1)
