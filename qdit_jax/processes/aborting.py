"""A sentence where JAX aborts the process, as it does when process 0 is gone.

Process 0 holds JAX's coordination service. Where it is lost, JAX's client calls `abort` in a thread of
its own, with nothing that Python could catch.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable

HANDLERS: list[object] = []  # the system's reference to them does not keep them


def call_when_aborted(aborted_fn: Callable[[], None]) -> None:
    """Has the system call a function when this process is aborted, in place of an earlier one.

    Where it returns, the process ends as it would have.

    Python's own `signal` would run it in the main thread, and `abort` does not wait for that.
    """
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    handler = kind(lambda number: aborted_fn())
    HANDLERS.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, kind)
    libc.signal(signal.SIGABRT, handler)
