"""Writing files and folders so that a reader never sees a half-written one."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qdit_jax.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

RENAME_EXCHANGE = 2
AT_FDCWD = -100


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it becomes `path`, else it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a new folder beside `path`; on success it becomes `path`, else it is removed.

    With `overwrite` the old and new folders change places in one step where the system can. What a
    killed process of this machine has left of the same folder is removed first.

    Raises:
        UserError: if `path` exists and `overwrite` is off.
    """
    path = Path(path)
    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{path.name}.partial-{socket.gethostname()}-"
    remove_abandoned(path.parent, mark)
    unmarked = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    with locked(unmarked):
        temporary = unmarked.rename(path.with_name(mark + unmarked.name.rpartition(".")[2]))
        try:
            yield temporary
            temporary.chmod(0o777 & ~umask())
            if path.exists():
                exchange(temporary, path)
            else:
                os.rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_abandoned(parent: Path, mark: str) -> None:
    """Removes the folders in `parent` whose names begin with `mark` and that nobody has locked."""
    for folder in parent.iterdir():
        if folder.name.startswith(mark):
            with locked(folder) as is_ours:
                if is_ours:
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Yields whether this process has now locked `folder`; the lock ends with it, killed or not.

    Where the system or its disk has no such locks, it never has.
    """
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = True
    except (OSError, AttributeError):
        is_ours = False
    try:
        yield is_ours
    finally:
        if descriptor is not None:
            os.close(descriptor)


def check_free(path: str | Path, overwrite: bool) -> None:
    """Raises `UserError` if `path` exists and may not be replaced."""
    if Path(path).exists() and not overwrite:
        raise UserError(
            f"{path} exists already; choose another path, or pass --force to replace it."
        )


def exchange(new: Path, old: Path) -> None:
    """Swaps two existing folders, in one step on Linux, else in two renames."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        done = rename(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE)
        if done == 0:
            return
    aside = new.with_name(new.name + ".old")
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)


def umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
