"""Folders into which several processes write, each its own files."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from qdit_jax.errors import UserError
from qdit_jax.files import AnyPath, PathLike, as_path, renewed_folder
from qdit_jax.processes.sharing import ALONE, Processes, comes_true

SEEN_WITHIN = 20  # seconds in which a disk that hosts share shows a new file to all


@contextmanager
def shared_folder(
    path: PathLike,
    overwrite: bool,
    kind: str,
    inputs: Iterable[PathLike | None] = (),
    *,
    processes: Processes = ALONE,
) -> Iterator[AnyPath]:
    """Yields the same folder in all processes: that of `renewed_folder` in the first.

    It replaces `path`, if it does, when all processes are done with it.
    """
    if not processes.is_first:
        yield as_path(processes.told("folder", ""))
        processes.meet("all are done with the folder")
        return
    with renewed_folder(path, overwrite, kind, inputs) as folder:
        processes.told("folder", str(folder))
        yield folder
        processes.meet("all are done with the folder")


def check_shared(folder: AnyPath, processes: Processes) -> None:
    """Raises `UserError` if a process does not see what the first one writes to `folder`.

    The folder is made; other processes know of its files afterwards.
    """
    if not processes.are_several:
        return
    # A name that no process has looked for: network disks remember what was absent.
    file = folder / f".seen-by-all-{processes.told('file', uuid.uuid4().hex)}"
    if processes.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    try:
        processes.meet("the file is written")
        if not comes_true(file.exists, SEEN_WITHIN):
            raise UserError(
                f"process {processes.index} does not see what process 0 wrote to {folder}; give a path "
                "on a disk that all hosts share."
            )
        processes.meet("the file is seen")
    finally:
        if processes.is_first:
            file.unlink(missing_ok=True)
