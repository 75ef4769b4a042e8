"""Checkpoints on disk: a folder that the next stage, or another machine, reads.

    model.json    format version, family, configuration, what every parameter is, metadata
    params/       the arrays (Orbax)
    recipe.json   how the model was quantised, if it was
    vae/          the autoencoder's own checkpoint, if there is one

Orbax keeps arrays; the static fields of a quantised leaf stand in `model.json`. `qdit_jax.export`
puts the same content into one safetensors file.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from qdit_jax.deferred import save_arrays
from qdit_jax.errors import UserError
from qdit_jax.files import replaced_folder
from qdit_jax.models import abstract_params, build_model, config_of, family_of
from qdit_jax.param_codec import abstract_arrays, decode_params, encode_params, logical_shapes
from qdit_jax.ptq.recipe import Recipe

FORMAT_VERSION = 1
Placement = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A network with its parameters, and how they came about.

    Attributes:
        model: a linen module made by `build_model`.
        params: nested dict of arrays and quantised leaves; arrays may be deferred.
        recipe: how the parameters were quantised, or None.
        metadata: JSON-able facts: source file, scheduler, ...
        vae: the autoencoder between latents and images, or None.
    """

    model: nn.Module
    params: Any
    recipe: Recipe | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    vae: Checkpoint | None = None


def save(path: str | Path, checkpoint: Checkpoint, *, overwrite: bool = False) -> None:
    """Writes `checkpoint` to the folder `path`: beside it first, then renamed.

    A `DeferredArray` is made when its turn comes and dropped once it is written.

    Raises:
        UserError: if `path` exists and `overwrite` is off.
    """
    with replaced_folder(path, overwrite) as folder:
        write_folder(folder, checkpoint)


def write_folder(folder: Path, checkpoint: Checkpoint) -> None:
    arrays, manifest = encode_params(checkpoint.params)
    (folder / "model.json").write_text(json.dumps(describe(checkpoint, manifest), indent=1))
    if checkpoint.recipe is not None:
        (folder / "recipe.json").write_text(json.dumps(checkpoint.recipe.to_json(), indent=1))
    quiet_orbax()
    save_arrays(folder / "params", arrays)
    if checkpoint.vae is not None:
        (folder / "vae").mkdir()
        write_folder(folder / "vae", checkpoint.vae)


def describe(checkpoint: Checkpoint, manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of `model.json`."""
    return {
        "format_version": FORMAT_VERSION,
        "family": family_of(checkpoint.model),
        "config": config_of(checkpoint.model),
        "params": manifest,
        "metadata": checkpoint.metadata,
    }


def load(path: str | Path, *, sharding: Placement = None) -> Checkpoint:
    """Returns the checkpoint in the folder `path`, its arrays placed by `sharding`.

    Only what is stored is read: a quantised checkpoint stays packed. A `.safetensors` file that
    was exported is read as well.

    Args:
        sharding: of every array; or a function from an array's path (such as
            `blocks_0/mlp/fc1/kernel/codes`) and shape to its sharding, see `split_over`; None is
            the first local device.

    Raises:
        UserError: if the folder is absent, no checkpoint, from a newer version, damaged, or if
            its parameters do not fit the network that it names.
    """
    folder = Path(path)
    if folder.suffix == ".safetensors" and folder.is_file():
        from qdit_jax.export import load_safetensors  # which builds on this module

        return load_safetensors(folder, sharding=sharding)
    description = read_description(folder)
    check_network(f"{folder}/model.json", description)
    target = abstract_arrays(description["params"], sharding)
    arrays = read_arrays(folder, target)
    vae = load(folder / "vae", sharding=sharding) if (folder / "vae").is_dir() else None
    return from_parts(folder, description, arrays, read_recipe(folder), vae)


def from_parts(
    path: Path, description: dict[str, Any], arrays: Any, recipe: Any, vae: Checkpoint | None
) -> Checkpoint:
    """Returns the checkpoint of a description and its arrays; `recipe` as JSON or None.

    Raises:
        UserError: if the arrays make no parameters, or `recipe` is none.
    """
    try:
        return Checkpoint(
            model=build_model(description["family"], description["config"]),
            params=decode_params(arrays, description["params"]),
            recipe=None if recipe is None else Recipe.from_json(recipe),
            metadata=description.get("metadata", {}),
            vae=vae,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def read_arrays(folder: Path, target: Any) -> Any:
    """Returns the stored arrays that the nested dicts `target` describe, placed as they say.

    Raises:
        UserError: if an array is absent, damaged, or of another shape or dtype.
    """
    check_stored(folder, target)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore((folder / "params").resolve(), target)
    except Exception as error:  # Orbax and its storage layer raise many kinds.
        raise damaged(folder, error) from error


def check_stored(folder: Path, target: Any) -> None:
    """Raises `UserError` if `folder` stores other arrays than the nested dicts `target` describe.

    Orbax itself would convert another dtype without a word.
    """
    quiet_orbax()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata((folder / "params").resolve()).item_metadata.tree
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


def damaged(folder: Path, error: Exception) -> UserError:
    """Returns the error that arrays of a checkpoint cannot be read."""
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"{folder}/params is damaged or incomplete ({reason[0][:200]}); write the checkpoint again."
    )


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """Returns the content of `recipe.json`, None if there is none."""
    file = folder / "recipe.json"
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}; write the checkpoint again.") from error


def split_over(mesh: jax.sharding.Mesh) -> Callable[[str, tuple[int, ...]], Any]:
    """Returns the placement that cuts every array over all devices of `mesh`.

    The last axis that their number divides is cut; an array without one is copied to all.
    """

    def place(path: str, shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
        axes = [i for i, size in enumerate(shape) if size and size % mesh.size == 0]
        spec = [None] * (axes[-1] if axes else 0) + [mesh.axis_names] * bool(axes)
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    return place


def read_description(folder: Path) -> dict[str, Any]:
    """Returns the content of `model.json`; raises `UserError` where `folder` is no checkpoint."""
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
        description = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error!r}; write the checkpoint again.") from error
    return check_description(description, str(file))


def check_description(description: Any, where: str) -> dict[str, Any]:
    """Returns the content of a `model.json`; raises `UserError` if it is damaged or newer."""
    try:
        version = description["format_version"]
        family, config, params = (description[key] for key in ("family", "config", "params"))
    except (KeyError, TypeError) as error:
        raise UserError(f"{where} is damaged: {error!r}; write the checkpoint again.") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{where} has format version {version}; this qdit_jax reads version {FORMAT_VERSION}: "
            "install the release that wrote it."
        )
    if not isinstance(config, dict) or not isinstance(params, dict):
        raise UserError(f"{where} is damaged: config and params must be objects.")
    if not isinstance(family, str) or not all(isinstance(leaf, dict) for leaf in params.values()):
        raise UserError(f"{where} is damaged: every entry of params must be an object.")
    return description


def check_network(where: str, description: dict[str, Any]) -> None:
    """Raises `UserError` if a description names no known network, or not its parameters."""
    try:
        model = build_model(description["family"], description["config"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{where} does not describe a known network: {error}") from error
    manifest = description["params"]
    expected = {path: leaf.shape for path, leaf in abstract_params(model).items()}
    try:
        found = logical_shapes(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} is damaged: {error}.") from error
    if missing := sorted(set(expected) - set(found)):
        raise UserError(f"{where} lacks {len(missing)} parameters, the first is {missing[0]}.")
    if unknown := sorted(set(found) - set(expected)):
        raise UserError(
            f"{where} has {len(unknown)} unknown parameters, the first is {unknown[0]}."
        )
    for path, shape in expected.items():
        as_matrix = (int(np.prod(shape[:-1])), shape[-1]) if len(shape) > 1 else shape
        if found[path] not in (shape, as_matrix, table_shape(path, shape)):
            raise UserError(f"{where}: {path} has shape {found[path]}, the network needs {shape}.")


def table_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the shape of a label table once quantised: groups run along a row, so it is turned."""
    return shape[::-1] if path.endswith("/embedding_table") else None


def quiet_orbax() -> None:
    """Keeps Orbax's notes about saving and sharding out of a command's output."""
    logging.getLogger("absl").setLevel(logging.ERROR)
