"""Block reconstruction of whole networks: block by block, rounding learned over a block's output.

Dimensions: I items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.calibration import Items, Stats, check_items
from qdit_jax.checkpoint import fingerprint
from qdit_jax.files import PathLike
from qdit_jax.ptq.block_learning import (
    NUM_CHUNKS,
    Entries,
    Form,
    ReconstructionSettings,
    Samples,
    errors,
    learn,
    own_costs,
    rounded,
    started,
)
from qdit_jax.ptq.over_time import check_one_weight_format, scheduled_params
from qdit_jax.ptq.rounding import batches_of, held_out_items
from qdit_jax.ptq.sequential import RoundedLayer, only_tables
from qdit_jax.ptq.transform import matrix_shape, rewrite_kernels
from qdit_jax.ptq.unfinished import Result, Unfinished
from qdit_jax.ptq.units import Unit, samples_of, units_of
from qdit_jax.quant import (
    GREATEST_WEIGHT,
    QTensor,
    check_finite,
    quantize,
)
from qdit_jax.recipes import Recipe
from qdit_jax.types import Params, Progress, ProgressFn, untold

# Items that `own_costs` are estimated on.
COST_ITEMS = 64


def reconstruct_params(
    model: nn.Module,
    params: Params,
    items: Items,
    *,
    recipe: Recipe,
    settings: ReconstructionSettings | None = None,
    holdout: float | int = 0.25,
    stats: Stats | None = None,
    batch_size: int = 8,
    unfinished: PathLike | None = None,
    on_layer: Callable[[RoundedLayer], None] | None = None,
    progress_fn: ProgressFn = untold,
) -> Params:
    """Returns `params` quantized by `recipe`, the rounding learned block by block.

    A block's inputs are those of the network with all earlier blocks quantized, its targets the
    outputs of the full-precision network. Where rounding to nearest gives a block the smaller error
    on held-out items, the block keeps it. Memory holds the parameters, and one block's inputs and
    outputs on all items.

    Args:
        items: from `collect_items`.
        settings: of the learning; None for the defaults.
        holdout: the share of trajectories that are held out; 0 for no check.
        stats: calibration statistics, for static activation scales only.
        batch_size: items in one run of the network.
        unfinished: a folder that a file is written to after every block; where it exists, finished
            blocks are read from it and the result is the same. The caller deletes it.
        on_layer: called after each layer; its errors are those of the output of its block.
        progress_fn: called with numbers that add up to `num_reconstruction_batches(...)`.

    Raises:
        ValueError: as `quantize_params` and `units_of`; also if an item or a block's output is not
            finite, `holdout` leaves nothing on one of the sides, or the recipe changes the bits of
            weights over time.
        UserError: if `unfinished` was written with other settings.
    """
    check_items(items)
    check_one_weight_format(params, recipe, "block reconstruction")
    settings = ReconstructionSettings() if settings is None else settings
    held_out = held_out_items(items, holdout)
    begun = rewrite_kernels(params, only_tables, recipe=recipe, stats=stats)
    flat = dict(flatten_dict(begun, sep="/"))
    facts = {"params": begun, "model": model, "items": items, "recipe": recipe.to_json()}
    facts |= {"settings": settings, "holdout": holdout, "batch_size": batch_size}
    facts |= {"layout": "K-major"}  # of the packed codes that are kept, [K, N] in earlier releases
    kept = None if unfinished is None else Unfinished(unfinished, fingerprint(**facts))
    for number, unit in enumerate(units_of(model, params, recipe)):
        nearest = nearest_kernels(unit, flat)
        result = None if kept is None else kept.read(number)
        if result is None:
            now = unflatten_dict(flat, sep="/")
            samples = samples_of(unit, model, now, params, items, batch_size, progress_fn)
            result = reconstructed(
                unit, flat, nearest, samples, held_out, settings, number, progress_fn
            )
            if kept is not None:
                kept.write(number, result)
        else:
            progress_fn(Progress(num_reconstruction_batches(items, batch_size, 1)))
        kernels = {path: flat[f"{path}/kernel"] for path in unit.specs}
        flat |= placed(unit, flat, nearest, result)
        for path, kernel in kernels.items():
            if on_layer is None:
                break
            whole = jnp.asarray(kernel).reshape(matrix_shape(kernel))
            fell_back = bool(held_out.any()) and not result.learned <= result.nearest
            q = flat[f"{path}/kernel"]
            layer = RoundedLayer(path, whole, q, result.nearest, result.learned, fell_back)
            on_layer(layer)
    return scheduled_params(unflatten_dict(flat, sep="/"), recipe.over_time)


def num_reconstruction_batches(items: Items, batch_size: int, num_units: int) -> int:
    """Returns the sum of what `reconstruct_params` calls its `progress_fn` with."""
    count = len(items.x)
    return num_units * (-(-count // min(batch_size, count)) + NUM_CHUNKS)


def placed(
    unit: Unit, flat: Mapping[str, Any], nearest: Mapping[str, QTensor], result: Result
) -> dict[str, Any]:
    """Returns the entries of the whole tree that a module's result replaces."""
    codes = {name: jnp.asarray(codes) for name, codes in result.codes.items()}
    found: dict[str, Any] = {
        f"{unit.path}/{name}": dataclasses.replace(nearest[name], codes=codes[name])
        for name in codes
    }
    for name, scale in result.scales.items():
        key = f"{unit.path}/{name}"
        found[key] = dataclasses.replace(flat[key], scale=jnp.asarray(scale))
    return found


def nearest_kernels(unit: Unit, flat: Mapping[str, Any]) -> dict[str, QTensor]:
    """Returns a module's kernels rounded to nearest, by their names within it."""
    found = {}
    for path, spec in unit.specs.items():
        kernel = jnp.asarray(flat[f"{path}/kernel"])
        check_finite(path, kernel, GREATEST_WEIGHT)
        found[unit.within(f"{path}/kernel")] = quantize(kernel.reshape(matrix_shape(kernel)), spec)
    return found


def reconstructed(
    unit: Unit,
    flat: Mapping[str, Any],
    nearest: dict[str, QTensor],
    samples: Samples,
    held_out: np.ndarray,
    settings: ReconstructionSettings,
    number: int,
    progress_fn: ProgressFn,
) -> Result:
    """Returns what learning finds for one module, or rounding to nearest where that is better."""
    form, entries = unit.form, unit.entries(flat)
    rows = np.flatnonzero(~held_out)
    size = min(settings.minibatch, len(rows))
    judged = np.flatnonzero(held_out) if held_out.any() else rows
    base = mean_error(form, {**entries, **nearest}, samples, rows, size)[0]
    check_finite(f"the output error of {unit.path}", np.float32(base))
    some = rows[np.linspace(0, len(rows) - 1, min(COST_ITEMS, len(rows))).round().astype(int)]
    costs = own_costs(form, entries, nearest, samples, jnp.asarray(some, jnp.int32))
    state = started(form, entries, nearest, settings)
    batches = minibatches(rows, size, settings, number)
    limit = jnp.float32(max(base, float(jnp.finfo(jnp.float32).tiny)))
    for first in range(0, len(batches), settings.chunk):
        state = learn(
            state,
            jnp.int32(first),
            batches[first : first + settings.chunk],
            entries,
            nearest,
            costs,
            limit,
            samples,
            form=form,
            settings=settings,
        )
        jax.block_until_ready(state)
        progress_fn(Progress(1))
    changed = rounded(form, entries, nearest, state[0], settings)
    before = mean_error(form, {**entries, **nearest}, samples, judged, size)
    after = mean_error(form, {**entries, **changed}, samples, judged, size)
    relative = [error / max(power, 1e-30) for error, power in (before, after)]
    keep = not held_out.any() or relative[1] <= relative[0]
    kernels = {name: (changed if keep else nearest)[name].codes for name in nearest}
    scales = {name: changed[name].scale for name in changed if keep and name not in nearest}
    return Result(kernels, scales, *relative)


def minibatches(
    rows: np.ndarray, size: int, settings: ReconstructionSettings, number: int
) -> jax.Array:
    """Returns the items of every step: one permutation of all after another."""
    num_steps = settings.chunk * NUM_CHUNKS
    rng = np.random.default_rng((settings.seed, number))
    epochs = [rng.permutation(rows) for _ in range(-(-num_steps * size // len(rows)))]
    drawn = np.concatenate(epochs)[: num_steps * size]
    return jnp.asarray(drawn.reshape(num_steps, size), jnp.int32)


def mean_error(
    form: Form, entries: Entries, samples: Samples, rows: Sequence[int] | np.ndarray, size: int
) -> tuple[float, float]:
    """Returns the items' mean squared output error and mean squared output."""
    total = np.zeros(2)
    for batch, weight in batches_of(np.asarray(rows), size):
        found = errors(form, entries, samples, jnp.asarray(batch, jnp.int32), jnp.asarray(weight))
        total += np.asarray(found)
    return float(total[0]) / len(rows), float(total[1]) / len(rows)
