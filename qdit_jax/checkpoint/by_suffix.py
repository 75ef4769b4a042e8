"""`load` and `save`: a path that ends in `.safetensors` is a single file, any other a folder."""

from __future__ import annotations

from qdit_jax.checkpoint.description import Checkpoint
from qdit_jax.checkpoint.folder import Placement, load_folder, save_folder
from qdit_jax.checkpoint.single_file import load_safetensors, save_safetensors
from qdit_jax.files import PathLike, as_path

SUFFIX = ".safetensors"


def load(path: PathLike, *, sharding: Placement = None) -> Checkpoint:
    """Returns the checkpoint at `path`, a folder or an exported file, local or a URL.

    Only what is stored is read: a quantized checkpoint stays packed.

    Args:
        sharding: of every array; or a function from an array's path (such as
            `blocks_0/mlp/fc1/kernel/codes`) and shape to its sharding, see `split_over`; None is the
            default device, uncommitted: the arrays follow those that they are used with.

    Raises:
        UserError: if nothing is there, or no checkpoint; if it is damaged or from a newer version; or
            if its parameters do not fit the network that it names.
    """
    path = as_path(path)
    is_file = path.suffix == SUFFIX and path.is_file()
    return (load_safetensors if is_file else load_folder)(path, sharding=sharding)


def save(path: PathLike, checkpoint: Checkpoint, *, overwrite: bool = False) -> None:
    """Writes `checkpoint` to `path`, a folder or a `.safetensors` file: beside it, then renamed.

    Args:
        path: local or a URL, as `gs://bucket/name`.
        overwrite: replace a checkpoint of the same form at `path`; anything else there is kept.

    Raises:
        UserError: if `path` exists and may not be replaced, if `checkpoint` has arrays that are still
            to be read from there, or if its disk is too full.
    """
    writer = save_safetensors if as_path(path).suffix == SUFFIX else save_folder
    writer(path, checkpoint, overwrite=overwrite)
