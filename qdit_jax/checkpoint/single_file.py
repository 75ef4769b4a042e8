"""A whole checkpoint in one safetensors file, packed, uncompressed, and back bit for bit.

Every array stands under its parameter's path (`blocks_0/attn/qkv/kernel/codes`), an autoencoder's
under `vae/`. The file's metadata holds `qdit_jax`, a JSON object: the format version and what
`model.json` and `recipe.json` of a checkpoint folder hold.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qdit_jax.checkpoint import earlier
from qdit_jax.checkpoint.codec import Placement, abstract_arrays, encode_params
from qdit_jax.checkpoint.deferred import placed
from qdit_jax.checkpoint.description import (
    Checkpoint,
    check_description,
    check_network,
    describe,
    from_parts,
    num_bytes,
)
from qdit_jax.checkpoint.folder import sources_of
from qdit_jax.errors import UserError
from qdit_jax.files import (
    AnyPath,
    PathLike,
    as_path,
    check_free,
    check_space,
    local_copy,
    read_once,
    replaced_file,
)

FORMAT_VERSION = 1
KEY = "qdit_jax"
VAE = "vae/"


def save_safetensors(path: PathLike, checkpoint: Checkpoint, *, overwrite: bool = False) -> None:
    """Writes `checkpoint` to the file `path`: beside it first, then renamed.

    Raises:
        UserError: as `save`.
    """
    check_free(path, overwrite, "export", sources_of(checkpoint))
    check_space(path, num_bytes(checkpoint))
    arrays, description = parts_of(checkpoint)
    metadata = {KEY: json.dumps({"format_version": FORMAT_VERSION, **description})}
    with replaced_file(path, "export") as file:
        save_file(arrays, file, metadata=metadata)


def parts_of(checkpoint: Checkpoint) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns all arrays of a checkpoint by path, and everything else as JSON-able values."""
    nested, manifest = encode_params(checkpoint.params)
    flat = flatten_dict(nested, sep="/")
    arrays = {name: np.asarray(array, order="C") for name, array in flat.items()}
    description: dict[str, Any] = {"model": describe(checkpoint, manifest)}
    if checkpoint.recipe is not None:
        description["recipe"] = checkpoint.recipe.to_json()
    if checkpoint.vae is not None:
        more, description["vae"] = parts_of(checkpoint.vae)
        arrays |= {VAE + name: array for name, array in more.items()}
    return arrays, description


def load_safetensors(path: PathLike, *, sharding: Placement = None) -> Checkpoint:
    """Returns the checkpoint in the file `path`, its arrays placed as by `qdit_jax.load`.

    Raises:
        UserError: if the file is absent, truncated, from a newer version or not an exported
            checkpoint, or if its arrays are not those that its metadata names.
    """
    path = as_path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; give one that `qdit export CKPT FILE` wrote.")
    with local_copy(path) as local:
        try:
            file = safe_open(local, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is not a whole safetensors file ({error}); export the checkpoint again."
            ) from error
        with file:
            return build(path, file, read_metadata(path, file.metadata()), "", sharding)


def exported_parts(path: PathLike) -> dict[str, Any] | None:
    """Returns the metadata of an exported file, or None if `path` is not an exported checkpoint.

    Raises:
        UserError: if the file is an export, but damaged or from a newer version.
    """
    try:
        with local_copy(path) as local, safe_open(local, framework="numpy") as file:
            metadata = file.metadata()
    except (SafetensorError, OSError):
        return None
    return read_metadata(as_path(path), metadata) if KEY in (metadata or {}) else None


def read_metadata(path: AnyPath, metadata: dict[str, str] | None) -> dict[str, Any]:
    """Returns the metadata of an exported file; raises `UserError` if it cannot be used."""
    if KEY not in (metadata or {}):
        raise UserError(
            f"{path} is a safetensors file, but is not an exported checkpoint; `qdit convert {path} OUT` "
            "reads weights in a PyTorch layout."
        )
    try:
        description = read_once((metadata or {})[KEY])
        version = description["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its metadata is damaged ({error!r}); export it again.") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has export format version {version}; this qdit_jax reads version "
            f"{FORMAT_VERSION}: install the release that wrote it."
        )
    return checked_parts(description, f"{path}, metadata")


def checked_parts(description: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the metadata with the description of every network checked, see `check_description`."""
    checked = {**description, "model": check_description(description.get("model"), where)}
    if (vae := description.get("vae")) is not None:
        checked["vae"] = checked_parts(vae, where)
    return checked


class Slices:
    """An array of a file, of which a process reads the parts that its devices hold."""

    def __init__(self, file: safe_open, name: str) -> None:
        self.held = file.get_slice(name)
        self.shape = tuple(self.held.get_shape())
        no_part = (slice(0, 0),) * len(self.shape)  # which an array without values does not have
        self.dtype = (file.get_tensor(name) if 0 in self.shape else self[no_part]).dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.held[index]


def build(
    path: AnyPath, file: safe_open, description: dict[str, Any], prefix: str, sharding: Placement
) -> Checkpoint:
    """Returns the checkpoint whose arrays stand under `prefix`, read one at a time."""
    model = description["model"]
    check_network(f"{path}, metadata", model)
    wanted = flatten_dict(abstract_arrays(model["params"], sharding), sep="/")
    changes = earlier.changes(model)
    stored = earlier.as_stored(wanted, changes)
    found, arrays = set(file.keys()), {}
    for name, abstract in stored.items():
        if prefix + name not in found:
            raise UserError(f"{path} lacks the array {prefix + name}; export it again.")
        place = wanted[name].sharding
        is_read_in_parts = place is not None and name not in changes and abstract.size > 1
        array = Slices(file, prefix + name) if is_read_in_parts else file.get_tensor(prefix + name)
        if array.shape != abstract.shape or array.dtype != abstract.dtype:
            raise UserError(
                f"{path}: {prefix + name} is {array.dtype} {array.shape}, its metadata says "
                f"{abstract.dtype} {abstract.shape}; export it again."
            )
        if not isinstance(array, Slices) and name in changes:
            array = changes[name].apply(array)
        arrays[name] = placed(array, place)
    vae = description.get("vae")
    return from_parts(
        path,
        model,
        unflatten_dict(arrays, sep="/"),
        description.get("recipe"),
        None if vae is None else build(path, file, vae, prefix + VAE, sharding),
    )
