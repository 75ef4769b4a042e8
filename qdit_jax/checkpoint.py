"""Checkpoints on disk: a folder that the next stage, or another machine, reads.

    model.json    format version, family, configuration, what every parameter is, metadata
    params/       the arrays (Orbax)
    recipe.json   how the model was quantised, if it was
    vae/          the autoencoder's own checkpoint, if there is one

Orbax keeps arrays; the static fields of a quantised leaf stand in `model.json`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn

from qdit_jax.errors import UserError
from qdit_jax.files import replaced_folder
from qdit_jax.models import abstract_params, build_model, config_of, family_of
from qdit_jax.param_codec import abstract_arrays, decode_params, encode_params, logical_shapes
from qdit_jax.ptq.recipe import Recipe

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A network with its parameters, and how they came about.

    Attributes:
        model: a linen module made by `build_model`.
        params: nested dict of arrays and quantised leaves.
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

    Raises:
        UserError: if `path` exists and `overwrite` is off.
    """
    with replaced_folder(path, overwrite) as folder:
        write_folder(folder, checkpoint)


def write_folder(folder: Path, checkpoint: Checkpoint) -> None:
    arrays, manifest = encode_params(checkpoint.params)
    description = {
        "format_version": FORMAT_VERSION,
        "family": family_of(checkpoint.model),
        "config": config_of(checkpoint.model),
        "params": manifest,
        "metadata": checkpoint.metadata,
    }
    (folder / "model.json").write_text(json.dumps(description, indent=1))
    if checkpoint.recipe is not None:
        (folder / "recipe.json").write_text(json.dumps(checkpoint.recipe.to_json(), indent=1))
    quiet_orbax()
    # One file an array: the other layout gathers all arrays in memory a second time.
    with ocp.StandardCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save((folder / "params").resolve(), arrays)
    if checkpoint.vae is not None:
        (folder / "vae").mkdir()
        write_folder(folder / "vae", checkpoint.vae)


def load(path: str | Path, *, sharding: jax.sharding.Sharding | None = None) -> Checkpoint:
    """Returns the checkpoint in the folder `path`, its arrays placed by `sharding`.

    Raises:
        UserError: if the folder is absent, no checkpoint, from a newer version, damaged, or if
            its parameters do not fit the network that it names.
    """
    folder = Path(path)
    description = read_description(folder)
    try:
        model = build_model(description["family"], description["config"])
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{folder}/model.json does not describe a known network: {error}"
        ) from error
    manifest = description["params"]
    check_shapes(folder, model, manifest)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    quiet_orbax()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            target = abstract_arrays(manifest, sharding)
            arrays = checkpointer.restore((folder / "params").resolve(), target)
    except Exception as error:  # Orbax and its storage layer raise many kinds.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{folder}/params is damaged or incomplete ({reason[0][:200]}); write the checkpoint again."
        ) from error
    recipe_file = folder / "recipe.json"
    return Checkpoint(
        model=model,
        params=decode_params(arrays, manifest),
        recipe=Recipe.from_json(recipe_file) if recipe_file.exists() else None,
        metadata=description.get("metadata", {}),
        vae=load(folder / "vae", sharding=sharding) if (folder / "vae").is_dir() else None,
    )


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
        version = description["format_version"]
        fields = [description[key] for key in ("family", "config", "params")]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: {error!r}; write the checkpoint again.") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {version}; this qdit_jax reads version {FORMAT_VERSION}: "
            "install the release that wrote it."
        )
    if not isinstance(fields[1], dict) or not isinstance(fields[2], dict):
        raise UserError(f"{file} is damaged: config and params must be objects.")
    return description


def check_shapes(folder: Path, model: nn.Module, manifest: dict[str, Any]) -> None:
    """Raises `UserError` if the stored parameters are not those of `model`."""
    expected = {path: leaf.shape for path, leaf in abstract_params(model).items()}
    try:
        found = logical_shapes(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/model.json is damaged: {error!r}.") from error
    if missing := sorted(set(expected) - set(found)):
        raise UserError(f"{folder} lacks {len(missing)} parameters, the first is {missing[0]}.")
    if unknown := sorted(set(found) - set(expected)):
        raise UserError(
            f"{folder} has {len(unknown)} unknown parameters, the first is {unknown[0]}."
        )
    for path, shape in expected.items():
        as_matrix = (int(np.prod(shape[:-1])), shape[-1]) if len(shape) > 1 else shape
        if found[path] not in (shape, as_matrix):
            raise UserError(f"{folder}: {path} has shape {found[path]}, the network needs {shape}.")


def quiet_orbax() -> None:
    """Keeps Orbax's notes about saving and sharding out of a command's output."""
    logging.getLogger("absl").setLevel(logging.ERROR)
