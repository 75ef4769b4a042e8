"""Checkpoints on disk: a folder that the next stage, or another machine, reads.

    model.json    format version, family, configuration, what every parameter is, metadata
    params/       the arrays (Orbax)
    recipe.json   how the model was quantized, if it was
    vae/          the autoencoder's own checkpoint, if there is one

Orbax keeps arrays; the static fields of a quantized leaf are in `model.json`. `qdit_jax.export`
puts the same content into one safetensors file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.checkpoint import earlier
from qdit_jax.checkpoint.codec import Placement, abstract_arrays, encode_params
from qdit_jax.checkpoint.deferred import DeferredArray, on_device, placed, save_arrays
from qdit_jax.checkpoint.description import (
    Checkpoint,
    check_description,
    check_network,
    describe,
    from_parts,
    num_bytes,
)
from qdit_jax.errors import UserError
from qdit_jax.files import (
    AnyPath,
    PathLike,
    as_path,
    check_free,
    check_space,
    local_copy,
    read_once,
    replaced_folder,
)
from qdit_jax.types import Params


def save_folder(path: PathLike, checkpoint: Checkpoint, *, overwrite: bool = False) -> None:
    """Writes `checkpoint` to the folder `path`: beside it first, then renamed.

    Each `DeferredArray` is computed just before it is written, and freed afterwards.

    Raises:
        UserError: as `save`.
    """
    sources = sources_of(checkpoint)
    check_free(path, overwrite, "checkpoint", sources)
    check_space(path, num_bytes(checkpoint))
    with replaced_folder(path, overwrite, "checkpoint", sources) as folder:
        write_folder(folder, checkpoint)


def sources_of(checkpoint: Checkpoint) -> set[AnyPath]:
    """Returns the folders from which deferred arrays of a checkpoint are still to be read."""
    leaves = jax.tree.leaves(checkpoint.params)
    found = {x.source for x in leaves if isinstance(x, DeferredArray) and x.source is not None}
    return found if checkpoint.vae is None else found | sources_of(checkpoint.vae)


def write_folder(folder: Path, checkpoint: Checkpoint) -> None:
    arrays, manifest = encode_params(checkpoint.params)
    quiet_orbax()
    save_arrays(folder / "params", arrays)
    # After the arrays, for the metadata may say how they were made.
    (folder / "model.json").write_text(json.dumps(describe(checkpoint, manifest), indent=1))
    if checkpoint.recipe is not None:
        (folder / "recipe.json").write_text(json.dumps(checkpoint.recipe.to_json(), indent=1))
    if checkpoint.vae is not None:
        (folder / "vae").mkdir()
        write_folder(folder / "vae", checkpoint.vae)


def load_folder(path: PathLike, *, sharding: Placement = None) -> Checkpoint:
    """Returns the checkpoint in the folder `path`, its arrays placed by `sharding`.

    Args:
        sharding: as of `load`.

    Raises:
        UserError: if the folder is absent, no checkpoint, from a newer version, damaged, or if
            its parameters do not fit the network that it names.
    """
    folder = as_path(path)
    description = read_description(folder)
    check_network(f"{folder}/model.json", description)
    target = abstract_arrays(description["params"], sharding)
    with local_params(folder) as params:
        arrays = read_arrays(folder, params, target, earlier.changes(description))
    vae = load_folder(folder / "vae", sharding=sharding) if (folder / "vae").is_dir() else None
    return from_parts(folder, description, arrays, read_recipe(folder), vae)


def read_arrays(
    folder: AnyPath, params: Path, target: Params, changes: Mapping[str, earlier.Change]
) -> dict[str, Any]:
    """Returns the arrays in `params` that the nested dicts `target` describe, placed as they say.

    `folder` is the checkpoint that is named where something is wrong; `changes` are applied to arrays
    of an earlier form, by name.

    Raises:
        UserError: if an array is absent, damaged, or of another shape or dtype.
    """
    wanted = flatten_dict(target, sep="/")
    stored = unflatten_dict(earlier.as_stored(wanted, changes), sep="/")
    check_stored(folder, params, stored)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(params.resolve(), jax.tree.map(on_host_or_placed, stored))
    except Exception as error:  # Orbax and its storage layer raise many kinds.
        raise damaged(folder, error) from error
    flat = flatten_dict(arrays, sep="/")
    del arrays
    for name in flat:  # one at a time, so that at most one array is held twice
        if name in changes:
            array = changes[name].apply(np.asarray(flat[name]))
            flat[name] = placed(array, wanted[name].sharding)
        else:
            flat[name] = on_device(flat[name])
    return unflatten_dict(flat, sep="/")


def on_host_or_placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct | np.ndarray:
    """Returns the target that has Orbax read an array to its placement, or else to the host.

    Orbax commits what it places; an array with no place is put onto a device afterwards, so that it
    can follow others.
    """
    if leaf.sharding is not None:
        return leaf
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)  # holds one number


def check_stored(folder: AnyPath, params: Path, target: Params) -> None:
    """Raises `UserError` if the folder `params` stores other arrays than the nested dicts `target` describe.

    `folder` is the checkpoint, for the message.

    Orbax itself would convert another dtype without a word.
    """
    quiet_orbax()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(params.resolve()).item_metadata.tree
        stored = {
            path: (tuple(leaf.shape), np.dtype(leaf.dtype))
            for path, leaf in flatten_dict(tree, sep="/").items()
        }
    except Exception as error:  # as in `read_arrays`
        raise damaged(folder, error) from error
    for path, leaf in flatten_dict(target, sep="/").items():
        found, wanted = stored.get(path), (tuple(leaf.shape), np.dtype(leaf.dtype))
        if found != wanted:
            is_now = "is absent" if found is None else f"is {found[1]} {found[0]}"
            raise UserError(
                f"{folder}/params: {path} {is_now}, but model.json says {wanted[1]} {wanted[0]}; "
                "write the checkpoint again."
            )


@contextmanager
def local_params(
    folder: AnyPath, keep: Callable[[str], bool] = lambda name: True
) -> Iterator[Path]:
    """Yields the folder of a checkpoint's arrays on a local disk, see `local_copy`.

    Raises:
        UserError: if there is none.
    """
    if not (folder / "params").is_dir():
        raise damaged(folder, FileNotFoundError("there is no folder params"))
    with local_copy(folder / "params", keep) as params:
        yield params


def damaged(folder: AnyPath, error: Exception) -> UserError:
    """Returns the error that arrays of a checkpoint cannot be read."""
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"{folder}/params is damaged or incomplete ({reason[0][:200]}); write the checkpoint again."
    )


def read_recipe(folder: AnyPath) -> dict[str, Any] | None:
    """Returns the content of `recipe.json`, None if there is none."""
    file = folder / "recipe.json"
    if not file.exists():
        return None
    try:
        return read_once(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}; write the checkpoint again.") from error


def split_over(
    mesh: jax.sharding.Mesh,
) -> Callable[[str, tuple[int, ...]], jax.sharding.NamedSharding]:
    """Returns the placement that cuts every array over all devices of `mesh`.

    The last axis that their number divides is cut, of packed codes the output channels where it
    divides them; an array without one is copied to all.
    """

    def place(path: str, shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
        axes = [i for i, size in enumerate(shape) if size and size % mesh.size == 0]
        channels = len(shape) - 2
        if channels in axes and path.endswith("/codes"):
            axes = [channels]
        spec = [None] * (axes[-1] if axes else 0) + [mesh.axis_names] * bool(axes)
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    return place


def read_description(folder: AnyPath) -> dict[str, Any]:
    """Returns the content of `model.json`; raises `UserError` where `folder` is not a checkpoint."""
    if not folder.exists():
        raise UserError(
            f"{folder} does not exist; make a checkpoint with `qdit convert SRC {folder}`."
        )
    file = folder / "model.json"
    if not file.is_file():
        raise UserError(
            f"{folder} is not a checkpoint (no model.json); convert PyTorch weights with "
            "`qdit convert SRC OUT` first."
        )
    try:
        description = read_once(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}; write the checkpoint again.") from error
    return check_description(description, str(file))


def quiet_orbax() -> None:
    """Keeps Orbax's notes about saving and sharding out of a command's output.

    Its threads also log what they raise, which the caller reports in one sentence anyway.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
