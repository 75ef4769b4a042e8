"""Free space on a disk, and errors of a disk as sentences."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qdit_jax.errors import UserError
from qdit_jax.files.paths import PathLike, is_remote

# Error numbers of the system when a disk, not the program, is at fault.
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.EEXIST,  # a file where a folder is needed
    errno.EISDIR,
    errno.ENAMETOOLONG,
    getattr(errno, "EDQUOT", errno.ENOSPC),  # not on Windows
}
FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


def check_space(path: PathLike, num_bytes: int) -> None:
    """Raises `UserError` if the disk that is to hold `path` has less room than `num_bytes`."""
    if is_remote(path):
        path = Path(tempfile.gettempdir()) / "x"  # where it is written before the upload
    target = Path(os.path.realpath(path))
    folder = next((parent for parent in target.parents if parent.is_dir()), None)
    if folder is not None and num_bytes > (free := shutil.disk_usage(folder).free):
        raise UserError(f"{path} would take {num_bytes:,} bytes, but its disk has {free:,} left.")


@contextmanager
def disk_errors_told(path: PathLike) -> Iterator[None]:
    """Turns an error of the disk, from whichever library, into a `UserError` about `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = disk_error(error)
        if number is None:
            raise
        advice = "; free some, or choose another disk" if number in FULL else ""
        raise UserError(f"{path} cannot be written: {os.strerror(number)}{advice}.") from error


def disk_error(error: BaseException) -> int | None:
    """Returns the system's error number if the disk is at fault, else None."""
    number = getattr(error, "errno", None) if isinstance(error, OSError) else None
    if number is None:
        # TensorStore and safetensors have it in their text alone.
        found = re.search(r"os[ _]error(?:_code)?[ =:'\"]*(\d+)", str(error))
        number = int(found[1]) if found else None
    return number if number in DISK_ERRORS else None
