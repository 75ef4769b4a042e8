"""One process at a time: locks that end with the process that holds them, killed or not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from qdit_jax.files.paths import AnyPath, is_remote

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(path: AnyPath) -> Iterator[bool | None]:
    """Yields whether this process has now locked the file or folder `path`; it never waits.

    False says that another process holds it. None says that there is no telling: the system, its
    disk or a store of objects has no such locks, or `path` cannot be opened.
    """
    if fcntl is None or is_remote(path):
        yield None
        return
    descriptor = None
    is_ours: bool | None = None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = True
    except BlockingIOError:
        is_ours = False
    except OSError:
        pass
    try:
        yield is_ours
    finally:
        if descriptor is not None:
            os.close(descriptor)
