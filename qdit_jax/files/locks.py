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
    """Locks the file or folder `path` without waiting; yields whether this process has the lock.

    False means that another process holds it. None means that locking is impossible: the system,
    the disk or the object store has no locks, or `path` cannot be opened.
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
