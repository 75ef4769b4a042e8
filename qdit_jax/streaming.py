"""Quantising a checkpoint layer by layer from disk to disk, in the memory of its largest layer.

`quantize_checkpoint` does it in one call. Its parts: `open_checkpoint` gives the tree of `load` with
every array still on disk, `deferred_quantization` the tree of `quantize_params` with every kernel's
arrays still to be computed, and `save` makes and writes one after another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.checkpoint import (
    Checkpoint,
    check_network,
    check_stored,
    damaged,
    from_parts,
    load,
    read_description,
    read_recipe,
    save,
)
from qdit_jax.deferred import DeferredArray
from qdit_jax.files import check_free
from qdit_jax.param_codec import abstract_arrays, split_fields
from qdit_jax.ptq import Recipe, Stats
from qdit_jax.ptq.by_columns import quantize_by_columns
from qdit_jax.ptq.transform import as_matrix, rewrite_kernels
from qdit_jax.quant import QTensor, WeightSpec, check_finite, quantize
from qdit_jax.quant.finite import GREATEST_WEIGHT


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    recipe: Recipe,
    stats: Stats | None = None,
    on_layer: Callable[[str, Any, QTensor], None] | None = None,
    overwrite: bool = False,
) -> Checkpoint:
    """Writes the checkpoint in `source`, rounded to nearest by `recipe`, to the folder `out`.

    Each layer is read, quantised, written and let go before the next: beside the runtime and its
    programs, memory holds two copies of the largest array; call `memory.give_back_freed_memory`
    first, or holes that earlier layers have left stay as well. The result is bit for bit what
    `load`, `quantize_params` and `save` write, and appears under its name once it is complete.

    Args:
        source: a checkpoint folder; an exported file is read as a whole.
        stats: calibration statistics, for static activation scales only.
        on_layer: called with the path, the kernel `[K, N]` and its `QTensor` as each is written.
        overwrite: replace `out` if it exists; it may be `source` itself.

    Returns:
        The new checkpoint as `open_checkpoint` reads it.

    Raises:
        UserError: as `open_checkpoint` and `save`.
        ValueError: as `quantize_params`.
    """
    check_free(out, overwrite)
    checkpoint = open_checkpoint(source)
    params = deferred_quantization(checkpoint.params, recipe=recipe, stats=stats, on_layer=on_layer)
    metadata = {**checkpoint.metadata, "quantized_from": str(source), "rounding": "nearest"}
    quantised = Checkpoint(checkpoint.model, params, recipe, metadata, checkpoint.vae)
    save(out, quantised, overwrite=overwrite)
    return open_checkpoint(out)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Returns the checkpoint in the folder `path` with `DeferredArray` leaves, reading no array.

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
    stored = {
        name: DeferredArray(leaf.shape, leaf.dtype, partial(read_array, folder, name), name)
        for name, leaf in flatten_dict(target, sep="/").items()
    }
    vae = open_checkpoint(folder / "vae") if (folder / "vae").is_dir() else None
    arrays = unflatten_dict(stored, sep="/")
    return from_parts(folder, description, arrays, read_recipe(folder), vae)


def read_array(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Returns one array of a checkpoint folder, under its name.

    Raises:
        UserError: if it is absent or damaged.
    """
    file = (folder / "params" / name.replace("/", ".")).resolve()
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(file)},
        "fill_missing_data_reads": False,
    }
    try:
        # As Orbax would, which reads the description of all arrays again for each.
        return {name: tensorstore.open(spec, open=True, read=True).result().read().result()}
    except Exception as error:  # It raises many kinds.
        raise damaged(folder, error) from error


def deferred_quantization(
    params: Any,
    *,
    recipe: Recipe,
    stats: Stats | None = None,
    on_layer: Callable[[str, Any, QTensor], None] | None = None,
) -> Any:
    """Returns `quantize_params(params, ...)` with kernels that are quantised when they are read.

    A kernel's arrays are `DeferredArray`s; `on_layer` is called whenever they are made.

    Raises:
        ValueError: as `quantize_params`.
    """

    def defer(path: str, name: str, leaf: Any, spec: WeightSpec) -> QTensor:
        def make() -> dict[str, Any]:
            matrix = as_matrix(name, np.asarray(leaf))
            check_finite(path, matrix, GREATEST_WEIGHT)
            q = quantize_by_columns(matrix, spec)
            if on_layer is not None:
                on_layer(path, matrix, q)
            return split_fields(q)[0]

        whole = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        q = jax.eval_shape(lambda w: quantize(as_matrix(name, w), spec), whole)
        arrays = {
            field: DeferredArray(array.shape, array.dtype, make, field)
            for field, array in split_fields(q)[0].items()
        }
        return dataclasses.replace(q, **arrays)

    return rewrite_kernels(params, defer, recipe=recipe, stats=stats)


def materialized(tree: Any) -> Any:
    """Returns a pytree or a `Checkpoint` with its deferred arrays read."""
    if isinstance(tree, Checkpoint):
        vae = None if tree.vae is None else materialized(tree.vae)
        return dataclasses.replace(tree, params=materialized(tree.params), vae=vae)
    return jax.tree.map(lambda leaf: leaf.read() if isinstance(leaf, DeferredArray) else leaf, tree)
