"""Writing files and folders so that a reader never sees a half-written one."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qdit_jax.errors import UserError

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

    With `overwrite` the old and new folders change places in one step where the system can.

    Raises:
        UserError: if `path` exists and `overwrite` is off.
    """
    path = Path(path)
    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~umask())
        if path.exists():
            exchange(temporary, path)
        else:
            os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
