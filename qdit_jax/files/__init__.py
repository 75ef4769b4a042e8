"""Paths, and writing so that nothing is lost: no reader sees half a file, no stranger is replaced.

What stands at a path is replaced only by a thing of its own kind (`KINDS`), never where an input
lies, and after everything new has been written.
"""

from qdit_jax.files.archives import write_arrays
from qdit_jax.files.disk import check_space, disk_errors_told
from qdit_jax.files.hub import HubId, downloaded, hub_id, is_hub_id, uploaded
from qdit_jax.files.json_text import read_once
from qdit_jax.files.kinds import GENERATOR, KINDS, check_free
from qdit_jax.files.locks import locked
from qdit_jax.files.paths import (
    AnyPath,
    PathLike,
    as_path,
    check_apart,
    files_below,
    is_remote,
    local_copy,
    num_bytes,
)
from qdit_jax.files.replacing import (
    remove_folder,
    renewed_folder,
    renewed_path,
    replaced_file,
    replaced_folder,
)

__all__ = [
    "GENERATOR",
    "KINDS",
    "AnyPath",
    "HubId",
    "PathLike",
    "as_path",
    "check_apart",
    "check_free",
    "check_space",
    "disk_errors_told",
    "downloaded",
    "files_below",
    "hub_id",
    "is_hub_id",
    "is_remote",
    "local_copy",
    "locked",
    "num_bytes",
    "read_once",
    "remove_folder",
    "renewed_folder",
    "renewed_path",
    "replaced_file",
    "replaced_folder",
    "uploaded",
    "write_arrays",
]
