"""A checkpoint whose arrays stay on disk until they are used.

`open_checkpoint` gives the tree of `load` with a `DeferredArray` in place of every array.
"""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import TypeVar, overload

import jax
import numpy as np
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.checkpoint import earlier
from qdit_jax.checkpoint.codec import abstract_arrays
from qdit_jax.checkpoint.deferred import DeferredArray
from qdit_jax.checkpoint.description import Checkpoint, check_network, from_parts
from qdit_jax.checkpoint.folder import (
    check_stored,
    damaged,
    local_params,
    read_description,
    read_recipe,
)
from qdit_jax.checkpoint.single_file import load_safetensors
from qdit_jax.files import AnyPath, PathLike, as_path, local_copy

Tree = TypeVar("Tree")


def open_checkpoint(path: PathLike) -> Checkpoint:
    """Returns the checkpoint in the folder `path` with `DeferredArray` leaves, reading no array.

    An autoencoder's arrays stay on disk as well. An exported file is read as a whole.

    Raises:
        UserError: as `qdit_jax.load`, but for damaged arrays, which are found when they are read.
    """
    folder = as_path(path)
    if folder.suffix == ".safetensors" and folder.is_file():
        return load_safetensors(folder)
    description = read_description(folder)
    check_network(f"{folder}/model.json", description)
    target = flatten_dict(abstract_arrays(description["params"]), sep="/")
    changes = earlier.changes(description)
    with local_params(folder, is_no_chunk) as params:
        check_stored(folder, params, unflatten_dict(earlier.as_stored(target, changes), sep="/"))

    def deferred(name: str, leaf: jax.ShapeDtypeStruct) -> DeferredArray:
        make = partial(read_array, folder, name, changes.get(name))
        return DeferredArray(leaf.shape, leaf.dtype, make, name, folder)

    stored = {name: deferred(name, leaf) for name, leaf in target.items()}
    vae = open_checkpoint(folder / "vae") if (folder / "vae").is_dir() else None
    arrays = unflatten_dict(stored, sep="/")
    return from_parts(folder, description, arrays, read_recipe(folder), vae)


def is_no_chunk(name: str) -> bool:
    """Returns whether a file below `params` describes arrays, and holds none of their values."""
    return not re.fullmatch(r"[\d.]+", name.rpartition("/")[2])


def read_array(
    folder: AnyPath, name: str, change: earlier.Change | None = None
) -> dict[str, np.ndarray]:
    """Returns one array of a checkpoint folder, under its name; `change` brings it into today's form.

    Raises:
        UserError: if it is absent or damaged.
    """
    try:
        with local_copy(folder / "params" / name.replace("/", ".")) as file:
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": str(file.resolve())},
                "fill_missing_data_reads": False,
            }
            # As Orbax would, which reads the description of all arrays again for each.
            array = tensorstore.open(spec, open=True, read=True).result().read().result()
    except Exception as error:  # It raises many kinds.
        raise damaged(folder, error) from error
    return {name: array if change is None else change.apply(array)}


@overload
def materialized(tree: Checkpoint) -> Checkpoint: ...


@overload
def materialized(tree: Tree) -> Tree: ...


def materialized(tree: Checkpoint | Tree) -> Checkpoint | Tree:
    """Returns a pytree or a `Checkpoint` with its deferred arrays read."""
    if isinstance(tree, Checkpoint):
        vae = None if tree.vae is None else materialized(tree.vae)
        return dataclasses.replace(tree, params=materialized(tree.params), vae=vae)
    return jax.tree.map(lambda leaf: leaf.read() if isinstance(leaf, DeferredArray) else leaf, tree)
