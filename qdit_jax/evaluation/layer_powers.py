"""How far each layer of a quantized network is from full precision, one layer at a time.

A network whose inputs were given other coordinates computes some outputs in other coordinates too:
where `Family.folds` let a scale or shift of a layer's input pass into the layer that produces it,
those columns of the producer cannot be compared with the reference's. All other outputs can. So both
networks run side by side on the same input, and wherever an output can be compared, it is measured
and the reference's output goes on in its place. A layer is thus measured on the reference's own
activations, expressed in the layer's own input coordinates, and the errors of others do not count.
What cannot be compared goes on as it is, straight into the one layer that reads it: the error of a
quantized producer's folded columns counts there, and the row says so.

Dimensions: I items, R rows of an item (the condition, and null), S steps, B samples, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool

from qdit_jax.evaluation.layer_facts import LayerFacts, is_quantized, operand_entry
from qdit_jax.evaluation.measures import first_of
from qdit_jax.evaluation.trajectories import Trajectory
from qdit_jax.models import (
    TABLE,
    Network,
    family_of_params,
    layers_of,
    null_condition_of,
    rows_per_sample,
    runs_layer,
    tapped,
    without_null,
)
from qdit_jax.quant import ActQuant, QTensor, dequantize, select_timestep, with_weight_bits
from qdit_jax.sampling import Denoiser
from qdit_jax.types import Condition, Params

# A fold multiplies columns; rounding alone leaves a column's projection on the reference's this near to 1.
ONLY_ROUNDED = 0.05


class Items(NamedTuple):
    """Inputs of single calls, on the reference's trajectories.

    Attributes:
        x: `[I, R, ...]`, the same for all rows of an item.
        timestep: `[I, R]`.
        condition: leaves `[I, R, ...]`: the sample's own, then null where the network has one.
    """

    x: Any
    timestep: Any
    condition: Any


class Folded(NamedTuple):
    """Where outputs are, or may be, in other coordinates than the reference's.

    Attributes:
        comparable: of each producer concerned, which of its outputs can be compared, `[N]`.
        columns: of each producer, the names of those that cannot.
        sources: of each reader, the quantized producers whose error counts in it.
    """

    comparable: dict[str, Bool[np.ndarray, " N"]]
    columns: dict[str, list[str]]
    sources: dict[str, list[str]]


def items_of(
    trajectory: Trajectory,
    condition: Condition,
    model: Network,
    params: Params,
    num_timesteps: int,
    num_samples: int,
) -> Items:
    """Returns items at timesteps spread evenly over a trajectory, for its first samples."""
    steps = len(trajectory.timestep)
    at = np.unique(np.linspace(0, steps - 1, min(steps, num_timesteps)).round().astype(int))
    count = min(num_samples, trajectory.x.shape[1])
    condition = jax.tree.map(jnp.asarray, first_of(condition, count))
    rows = [without_null(condition)]
    if model.has_null:
        rows.append(null_condition_of(model, params, condition))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *rows)  # [B, R, ...]
    repeated = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * len(at)), stacked)
    x = trajectory.x[at][:, :count].reshape(-1, *trajectory.x.shape[2:])
    timestep = np.repeat(trajectory.timestep[at].astype(np.float32), count)
    return Items(
        jnp.repeat(x[:, None], len(rows), axis=1),
        jnp.repeat(timestep[:, None], len(rows), axis=1),
        repeated,
    )


def folded(params: Params, reference: Params) -> Folded:
    """Returns which outputs cannot be compared, from the parameters of both networks.

    Columns that produce another layer's input are taken to be as in the reference if their bias is
    the same and not all zero, or their kernel is the same but for rounding; a fold leaves neither. Others
    may be in other coordinates.
    """
    flat, full = (flatten_dict(tree, sep="/") for tree in (params, reference))
    family = family_of_params(reference)
    found = Folded({}, {}, {})
    if family is None:
        return found
    for reader in layers_of(flat):
        fold = family.fold_of(reader, full)
        for producer in () if fold is None else fold.producers:
            if producer.weight != "kernel":
                continue  # a norm, which is no layer that is compared
            layer, shape = producer.layer, full[f"{producer.layer}/kernel"].shape
            columns = family.chunk(layer, producer.output, shape)
            if is_same(flat, full, layer, columns):
                continue
            found.comparable.setdefault(layer, np.ones(shape[-1], bool))[columns] = False
            names = found.columns.setdefault(layer, [])
            if (name := producer.output or "all") not in names:
                names.append(name)
            if is_quantized(flat, layer):
                sources = found.sources.setdefault(reader, [])
                sources += [layer] if layer not in sources else []
    return found


def is_same(flat: Mapping[str, Any], full: Mapping[str, Any], layer: str, columns: slice) -> bool:
    """Returns whether columns of a layer certainly are in the reference's coordinates."""
    if f"{layer}/bias" not in full:  # a fold needs one
        return True
    ours, theirs = (np.asarray(tree[f"{layer}/bias"])[columns] for tree in (flat, full))
    if not np.array_equal(ours, theirs):
        return False
    if theirs.any():
        return True
    kernel = flat[f"{layer}/kernel"]
    if isinstance(kernel, QTensor):
        ours, theirs = (
            np.asarray(a, np.float32).reshape(-1, kernel.shape[1])[:, columns]
            for a in (dequantize(kernel), full[f"{layer}/kernel"])
        )
        power = np.square(theirs).sum(0)
        factors = (ours * theirs).sum(0) / np.where(power > 0, power, 1)
        return bool((np.abs(factors - 1)[power > 0] < ONLY_ROUNDED).all())
    ours, theirs = (np.asarray(a)[..., columns] for a in (kernel, full[f"{layer}/kernel"]))
    return np.array_equal(ours, theirs)


def linears_alone(params: Params, reference: Params, model: Any) -> Params:
    """Returns `params` with everything quantized that is not a linear layer as in the reference.

    Label tables and attention operands are measured by themselves; here they would add their error
    to the inputs of layers. Kernels of other bits are left out.
    """
    linear = rows_per_sample(model)
    trees = (with_weight_bits(params, None), reference)
    flat, full = (dict(flatten_dict(tree, sep="/")) for tree in trees)
    for name, leaf in list(flat.items()):
        if isinstance(leaf, QTensor) and name.removesuffix("/kernel") not in linear:
            flat[name] = full[name]
        elif isinstance(leaf, ActQuant) and name.removesuffix("/act_quant") not in linear:
            del flat[name]
    return unflatten_dict(flat, sep="/")


def operand_quantizers(params: Params, layers: Sequence[LayerFacts]) -> dict[str, ActQuant]:
    """Returns the quantizers of attention operands, by their paths."""
    flat = flatten_dict(params, sep="/")
    paths = [layer.path for layer in layers if layer.kind == "operand"]
    return {path: flat[operand_entry(path)] for path in paths if operand_entry(path) in flat}


def table_powers(
    params: Params, reference: Params, layers: Sequence[LayerFacts]
) -> dict[str, np.ndarray]:
    """Returns the powers of the rows of each quantized label table, and of their errors."""
    flat, full = (flatten_dict(tree, sep="/") for tree in (params, reference))
    found = {}
    for layer in layers:
        table = flat.get(layer.path + TABLE)
        if layer.kind == "table" and isinstance(table, QTensor):
            exact = np.asarray(full[layer.path + TABLE], np.float64)
            error = np.asarray(dequantize(table), np.float64).T - exact
            found[layer.path] = np.array([np.square(exact).sum(), np.square(error).sum()])
    return found


@jax.jit
def call_powers(
    reference: Denoiser,
    other: Denoiser,
    alone: Params,
    operands: Mapping[str, ActQuant],
    comparable: Mapping[str, Array],
    items: Items,
) -> tuple[Array, dict[str, Array]]:
    """Returns powers of the outputs and of their errors, `[I, 2, R]`, and by layer, `[I, 2]`.

    `alone` are the parameters of `other` as `linears_alone` returns them. The channels of a learned
    variance do not count.
    """

    def of_item(item: Items) -> tuple[Array, dict[str, Array]]:
        exact: dict[str, list[Array]] = {}
        powers: dict[str, Array] = {}

        def record(path: str, module: Any, x: Array, call: Callable[[], Array]) -> Array:
            exact.setdefault(path, []).append(call())
            return exact[path][-1]

        def compare(path: str, module: Any, x: Array, call: Callable[[], Array]) -> Array:
            y, wanted = call(), exact[path].pop(0)
            mask = comparable.get(path, jnp.ones(y.shape[-1], bool))
            add(path, jnp.where(mask, wanted, 0), jnp.where(mask, y - wanted, 0))
            return jnp.where(mask, wanted, y)

        def add(path: str, signal: Array, error: Array) -> None:
            # Of experts, the one of the item's timestep counts.
            runs = runs_layer(reference.model, path, item.timestep).any()
            both = jnp.where(runs, jnp.stack([power(signal), power(error)]), 0)
            powers[path] = powers[path] + both if path in powers else both

        def round_operand(path: str, x: Array) -> None:
            if path in operands:
                add(path, x, select_timestep(operands, item.timestep)[path](x) - x)

        with tapped(record):
            a = applied(reference, reference.params, item)
        with tapped(compare, round_operand if operands else None):
            applied(other, alone, item)
        b = applied(other, other.params, item)
        a, b = (out[..., : item.x.shape[-1]].astype(jnp.float32) for out in (a, b))
        axes = tuple(range(1, a.ndim))
        return jnp.stack([jnp.square(a).sum(axes), jnp.square(a - b).sum(axes)]), powers

    return jax.lax.map(of_item, items)


def power(values: Array) -> Array:
    """Returns the sum of squares in float32."""
    return jnp.square(values.astype(jnp.float32)).sum()


def applied(denoise_fn: Denoiser, params: Params, item: Items) -> Array:
    """Returns the network's output, with the static scales of the nearest timestep if any."""
    picked = select_timestep(params, item.timestep)
    return cast(Array, denoise_fn.model.apply({"params": picked}, *item))
