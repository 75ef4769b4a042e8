"""A checkpoint: a network, its parameters, and the JSON that describes both."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from qdit_jax.checkpoint import earlier
from qdit_jax.checkpoint.codec import decode_params, logical_shapes
from qdit_jax.errors import UserError
from qdit_jax.files import AnyPath
from qdit_jax.models import TABLE, abstract_params, build_model, config_of, family_of
from qdit_jax.recipes import Recipe
from qdit_jax.types import Params

PLAIN_VERSION = 1  # of a checkpoint that holds no packed kernel
NEWEST_VERSION = earlier.VERSION  # of all others; 1 and 2 stored packed kernels as `earlier` says


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A network with its parameters, and where they come from.

    Attributes:
        model: a linen module made by `build_model`.
        params: nested dict of arrays and quantized leaves; arrays may be deferred.
        recipe: how the parameters were quantized, or None.
        metadata: JSON-able facts: source file, scheduler, ...
        vae: the autoencoder between latents and images, or None.
    """

    model: nn.Module
    params: Params
    recipe: Recipe | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    vae: Checkpoint | None = None


def num_bytes(checkpoint: Checkpoint) -> int:
    """Returns the bytes of all arrays, the autoencoder's included; nothing deferred is computed."""
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint.params))
    return own + (0 if checkpoint.vae is None else num_bytes(checkpoint.vae))


def describe(checkpoint: Checkpoint, manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of `model.json`."""
    return {
        "format_version": version_of(manifest),
        "family": family_of(checkpoint.model).name,
        "config": config_of(checkpoint.model),
        "params": manifest,
        "metadata": checkpoint.metadata,
    }


def version_of(manifest: dict[str, Any]) -> int:
    """Returns the least format version that can say what a manifest does."""
    is_packed = any(leaf["type"] == "QTensor" for leaf in manifest.values())
    return NEWEST_VERSION if is_packed else PLAIN_VERSION


def from_parts(
    path: AnyPath,
    description: dict[str, Any],
    arrays: Params,
    recipe: dict[str, Any] | None,
    vae: Checkpoint | None,
) -> Checkpoint:
    """Returns the checkpoint of a description and its arrays; `recipe` as JSON or None.

    Raises:
        UserError: if the arrays do not fit the description, or `recipe` is not a recipe.
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


def check_description(description: Any, where: str) -> dict[str, Any]:
    """Returns the content of a `model.json`, the shapes of packed kernels those of today's form.

    Raises:
        UserError: if it is damaged or newer.
    """
    try:
        version = description["format_version"]
        family, config, params = (description[key] for key in ("family", "config", "params"))
    except (KeyError, TypeError) as error:
        raise UserError(f"{where} is damaged: {error!r}; write the checkpoint again.") from error
    if version not in range(PLAIN_VERSION, NEWEST_VERSION + 1):
        raise UserError(
            f"{where} has format version {version}; this qdit_jax reads versions {PLAIN_VERSION} to "
            f"{NEWEST_VERSION}: install the release that wrote it."
        )
    if not isinstance(config, dict) or not isinstance(params, dict):
        raise UserError(f"{where} is damaged: config and params must be objects.")
    if not isinstance(family, str) or not all(isinstance(leaf, dict) for leaf in params.values()):
        raise UserError(f"{where} is damaged: every entry of params must be an object.")
    if version < earlier.VERSION:
        return {**description, "params": earlier.as_today(params)}
    return description


def check_network(where: str, description: dict[str, Any]) -> None:
    """Raises `UserError` if a description names an unknown network, or other parameters than that network's."""
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
    """Returns the shape of a label table once quantized: it is transposed, for groups run along a row."""
    return shape[::-1] if path.endswith(TABLE) else None
