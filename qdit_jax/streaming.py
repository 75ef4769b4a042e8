"""Reading a checkpoint's arrays when they are used, so that a large one is quantised in little memory.

`open_checkpoint` gives the same tree as `load` with a `StoredArray` in place of every array.
`quantize_params` reads them one at a time and keeps only packed codes; `materialized` reads what is
left. At no time are two full-precision layers in memory.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.checkpoint import (
    Checkpoint,
    check_network,
    check_stored,
    damaged,
    from_parts,
    load,
    quiet_orbax,
    read_description,
    read_recipe,
)
from qdit_jax.param_codec import abstract_arrays


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a checkpoint folder: its shape is known, its values are read when asked for.

    NumPy and JAX take it for an array; every use reads the file again.
    """

    folder: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self) -> jax.Array:
        """Returns the array on the first local device.

        Raises:
            UserError: if it is absent or damaged.
        """
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=device)
        wanted = unflatten_dict({self.name: target}, sep="/")
        quiet_orbax()
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                how = ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                    partial_restore=True,
                )
                found = checkpointer.restore((self.folder / "params").resolve(), args=how)
            return flatten_dict(found, sep="/")[self.name]
        except Exception as error:  # Orbax and its storage layer raise many kinds.
            raise damaged(self.folder, error) from error

    def __jax_array__(self) -> jax.Array:
        return self.read()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Returns the checkpoint in the folder `path` with `StoredArray` leaves, reading no array.

    An autoencoder's arrays stay on disk as well. An exported file is read as a whole.

    Raises:
        UserError: as `qdit_jax.load`, but for damaged arrays, which are found when they are read.
    """
    folder = Path(path)
    if folder.suffix == ".safetensors" and folder.is_file():
        return load(folder)
    description = read_description(folder)
    check_network(f"{folder}/model.json", description)
    target = abstract_arrays(description["params"])
    check_stored(folder, target)
    flat = flatten_dict(target, sep="/")
    stored = {
        name: StoredArray(folder, name, leaf.shape, np.dtype(leaf.dtype))
        for name, leaf in flat.items()
    }
    vae = open_checkpoint(folder / "vae") if (folder / "vae").is_dir() else None
    arrays = unflatten_dict(stored, sep="/")
    return from_parts(folder, description, arrays, read_recipe(folder), vae)


def materialized(tree: Any) -> Any:
    """Returns a pytree or a `Checkpoint` with its stored arrays read."""
    if isinstance(tree, Checkpoint):
        vae = None if tree.vae is None else materialized(tree.vae)
        return dataclasses.replace(tree, params=materialized(tree.params), vae=vae)
    return jax.tree.map(lambda leaf: leaf.read() if isinstance(leaf, StoredArray) else leaf, tree)
