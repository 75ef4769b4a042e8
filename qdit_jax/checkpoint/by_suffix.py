"""`load` and `save`: a path that ends in `.safetensors` is a single file, any other a folder."""

from __future__ import annotations

from collections.abc import Sequence

from qdit_jax.checkpoint.description import Checkpoint
from qdit_jax.checkpoint.folder import Placement, load_folder, save_folder
from qdit_jax.checkpoint.single_file import load_safetensors, save_safetensors
from qdit_jax.errors import UserError
from qdit_jax.files import HubId, PathLike, as_path, downloaded, is_hub_id

SUFFIX = ".safetensors"


def load(path: PathLike, *, sharding: Placement = None) -> Checkpoint:
    """Returns the checkpoint at `path`: a folder or an exported file, local, a URL, or of the hub.

    `hf:OWNER/NAME[@REVISION][/FILE]` is what `qdit push` wrote to the Hugging Face hub.

    Only what is stored is read: a quantized checkpoint stays packed.

    Args:
        sharding: of every array; or a function from an array's path (such as
            `blocks_0/mlp/fc1/kernel/codes`) and shape to its sharding, see `split_over`; None is the
            default device, uncommitted: the arrays follow those that they are used with. Each device
            is given its own part alone: no array is whole on a device that holds a part of it. Over
            the devices of several hosts, all processes call `load` with the same path and sharding,
            and each reads the parts of its own devices (of a folder, whole files of an array, which
            are cut in its memory).

    Raises:
        UserError: if nothing is there, or no checkpoint; if it is damaged or from a newer version; or
            if its parameters do not fit the network that it names.
    """
    path = downloaded(path, exported_file)[0] if is_hub_id(path) else as_path(path)
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


def exported_file(names: Sequence[str], wanted: HubId) -> list[str]:
    """Returns the one exported checkpoint among the files of a repository.

    Raises:
        UserError: if there is none, or several.
    """
    found = [name for name in names if name.endswith(SUFFIX)]
    if wanted.inside:
        found = [name for name in found if name == wanted.inside]
    if len(found) != 1:
        listed = ", ".join(found) or "none"
        raise UserError(
            f"hf:{wanted.repo} should hold one exported checkpoint ({SUFFIX}), or be given with its "
            f"name; found: {listed}. Weights of others are converted: qdit convert hf:{wanted.repo} OUT."
        )
    return found
