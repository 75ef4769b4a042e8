"""Quantizing a checkpoint layer by layer from disk to disk, in the memory of its largest layer.

`quantize_checkpoint` does it in one call. Its parts: `open_checkpoint` returns the tree of `load`
with every array still on disk, `deferred_quantization` the tree of `quantize_params` with no
kernel's arrays computed yet, and `save` computes and writes them one at a time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from qdit_jax.calibration import Stats
from qdit_jax.checkpoint import Checkpoint, DeferredArray, open_checkpoint, save, split_fields
from qdit_jax.files import PathLike, check_free
from qdit_jax.ptq.by_columns import quantize_by_columns
from qdit_jax.ptq.over_time import NameFn, quantized_over_time
from qdit_jax.ptq.transform import OnLayer, as_matrix, rewrite_kernels
from qdit_jax.quant import GREATEST_WEIGHT, QTensor, WeightSpec, check_finite, quantize
from qdit_jax.recipes import Recipe
from qdit_jax.types import AbstractArray, Params


def quantize_checkpoint(
    source: PathLike | Checkpoint,
    out: PathLike,
    *,
    recipe: Recipe,
    stats: Stats | None = None,
    on_layer: OnLayer | None = None,
    overwrite: bool = False,
    metadata: dict[str, Any] | None = None,
) -> Checkpoint:
    """Writes the checkpoint in `source`, rounded to nearest by `recipe`, to the folder `out`.

    Each layer is read, quantized, written and freed before the next: beside the runtime and its
    compiled programs, memory holds two copies of the largest array. Call
    `memory.give_back_freed_memory` first, or the process keeps the memory of earlier layers too.
    The result is bit for bit what `load`, `quantize_params` and `save` write, and appears under its
    name once it is complete.

    Args:
        source: a checkpoint folder; an exported file is read as a whole. Or an open checkpoint.
        stats: calibration statistics, for static activation scales only.
        on_layer: called with the path, the kernel `[K, N]` and its `QTensor` as each is written.
        overwrite: replace the checkpoint at `out`; never `source`, nor what lies around or inside it.
        metadata: of the new checkpoint, written after all layers; by default that of `source`, with
            the path of `source` added.

    Returns:
        The new checkpoint as `open_checkpoint` reads it.

    Raises:
        UserError: as `open_checkpoint` and `save`.
        ValueError: as `quantize_params`.
    """
    inputs = [] if isinstance(source, Checkpoint) else [source]
    check_free(out, overwrite, "checkpoint", inputs)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    params = deferred_quantization(checkpoint.params, recipe=recipe, stats=stats, on_layer=on_layer)
    if metadata is None:
        named = {} if source is checkpoint else {"quantized_from": str(source)}
        metadata = {**checkpoint.metadata, **named, "rounding": "nearest"}
    quantized = Checkpoint(checkpoint.model, params, recipe, metadata, checkpoint.vae)
    save(out, quantized, overwrite=overwrite)
    return open_checkpoint(out)


def deferred_quantization(
    params: Params,
    *,
    recipe: Recipe,
    stats: Stats | None = None,
    on_layer: OnLayer | None = None,
) -> dict[str, Any]:
    """Returns `quantize_params(params, ...)` with kernels that are quantized when they are read.

    A kernel's arrays are `DeferredArray`s; `on_layer` is called whenever they are computed.

    Raises:
        ValueError: as `quantize_params`.
    """

    def once(recipe: Recipe, name_fn: NameFn) -> Params:
        def defer(path: str, name: str, leaf: AbstractArray, spec: WeightSpec) -> QTensor:
            def make() -> dict[str, Any]:
                matrix = as_matrix(name, np.asarray(leaf))
                check_finite(path, matrix, GREATEST_WEIGHT)
                q = quantize_by_columns(matrix, spec)
                if on_layer is not None and (called := name_fn(path)) is not None:
                    on_layer(called, matrix, q)
                return split_fields(q)[0]

            whole = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            q = jax.eval_shape(lambda w: quantize(as_matrix(name, w), spec), whole)
            source = getattr(leaf, "source", None)
            arrays = {
                field: DeferredArray(array.shape, array.dtype, make, field, source)
                for field, array in split_fields(q)[0].items()
            }
            return dataclasses.replace(q, **arrays)

        return rewrite_kernels(params, defer, recipe=recipe, stats=stats)

    return quantized_over_time(params, recipe, once)
