"""Writing beside and renaming, so that a reader never sees a half-written file or folder."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qdit_jax.errors import UserError
from qdit_jax.files.disk import disk_errors_told
from qdit_jax.files.kinds import KINDS, check_free, is_empty
from qdit_jax.files.locks import locked
from qdit_jax.files.paths import (
    AnyPath,
    PathLike,
    as_path,
    check_apart,
    copy_file,
    files_below,
    is_remote,
)

RENAME_EXCHANGE = 2
AT_FDCWD = -100


@contextmanager
def replaced_file(path: PathLike, kind: str | None = None) -> Iterator[Path]:
    """Yields a temporary path; on success its content becomes `path`, else it is removed.

    Where `path` is a link, the file that it leads to is replaced.

    Args:
        kind: of `KINDS`; anything else that stands at `path` is refused.

    Raises:
        UserError: if `path` holds another thing, or cannot be written.
    """
    path = as_path(path)
    if kind is not None:
        check_free(path, True, kind)
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="qdit-") as folder, disk_errors_told(path):
            yield Path(folder) / path.name
            copy_file(Path(folder) / path.name, path)
        return
    target = Path(os.path.realpath(path))
    with disk_errors_told(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent
        )
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~umask())
            if kind is not None:
                check_free(target, True, kind)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(
    path: PathLike,
    overwrite: bool = False,
    kind: str = "checkpoint",
    inputs: Iterable[PathLike | None] = (),
) -> Iterator[Path]:
    """Yields a new local folder; on success it becomes `path`, else it is removed.

    With `overwrite` the old and new folders change places in one step where the system can. What a
    killed process of this machine has left of the same folder is removed first. Where `path` is a
    link, the folder that it leads to is replaced. Of a URL, the file that marks the kind is removed
    first and written last, so that a reader never takes an incomplete folder for a complete one.

    Raises:
        UserError: as `check_free`, or if `path` cannot be written.
    """
    path, inputs = as_path(path), list(inputs)
    check_free(path, overwrite, kind, inputs)
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="qdit-") as folder, disk_errors_told(path):
            yield Path(folder)
            check_free(path, overwrite, kind, inputs)
            upload(Path(folder), path, KINDS[kind].marker)
        return
    target = Path(os.path.realpath(path))
    with disk_errors_told(path), made_parents(target):
        mark = f".{target.name}.partial-{socket.gethostname()}-"
        remove_abandoned(target.parent, mark)
        unmarked = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        with locked(unmarked):
            temporary = unmarked.rename(target.with_name(mark + unmarked.name.rpartition(".")[2]))
            try:
                yield temporary
                temporary.chmod(0o777 & ~umask())
                check_free(path, overwrite, kind, inputs)
                if target.exists():
                    exchange(temporary, target)
                else:
                    os.rename(temporary, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def made_parents(target: Path) -> Iterator[None]:
    """Makes the folders above `target` that are missing, and removes them again on failure."""
    missing = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # another process may have put something there
                parent.rmdir()
        raise


@contextmanager
def renewed_folder(
    path: PathLike, overwrite: bool, kind: str, inputs: Iterable[PathLike | None] = ()
) -> Iterator[AnyPath]:
    """Yields the folder in which a long computation keeps its state and its results.

    That is `path` itself; but with `overwrite`, if there is a thing of `kind`, a folder beside it
    that replaces it on success. A computation that failed or was killed finds its state there
    again, and `path` is unchanged.

    Raises:
        UserError: if something else is at `path`, or it cannot be replaced.
    """
    path, inputs = as_path(path), list(inputs)
    check_apart(path, inputs)
    work = renewed_path(path, overwrite, kind)
    yield work
    if work == path:
        return
    check_free(path, True, kind, inputs)
    with disk_errors_told(path):
        exchange(work, Path(os.path.realpath(path)))
    shutil.rmtree(work, ignore_errors=True)


def renewed_path(path: AnyPath, overwrite: bool, kind: str) -> AnyPath:
    """Returns the folder that `renewed_folder` yields."""
    if not overwrite or not path.exists() or is_empty(path):
        return path
    check_free(path, True, kind)
    if is_remote(path):
        raise UserError(f"{path}: no folder of a URL is replaced; remove it, or choose another.")
    target = Path(os.path.realpath(path))
    return target.with_name(f".{target.name}.renewed")


def remove_folder(folder: AnyPath, keep: str = "") -> None:
    """Removes a folder of ours, local or remote; with `keep`, all in it but that name."""
    for entry in list(folder.iterdir()) if folder.is_dir() else ():
        if entry.name == keep:
            continue
        if entry.is_dir():
            remove_folder(entry)
        else:
            entry.unlink()
    if not keep and folder.is_dir():
        folder.rmdir()


def upload(folder: Path, path: AnyPath, marker: str) -> None:
    """Makes the remote folder `path` hold what the local `folder` holds, `marker` last."""
    names = files_below(folder)
    for name in [marker, *files_below(path)] if path.is_dir() else ():
        (path / name).unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: (name == marker, name)):
        copy_file(folder / name, path / name)


def remove_abandoned(parent: Path, mark: str) -> None:
    """Removes the folders in `parent` whose names begin with `mark` and that nobody has locked."""
    for folder in parent.iterdir():
        if folder.name.startswith(mark):
            with locked(folder) as is_ours:
                if is_ours:
                    shutil.rmtree(folder, ignore_errors=True)


def exchange(new: Path, old: Path) -> None:
    """Swaps two existing folders, in one step on Linux, else in renames."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        done = rename(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE)
        if done == 0:
            return
    aside = new.with_name(new.name + ".old")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise
    os.rename(aside, new)


def umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
