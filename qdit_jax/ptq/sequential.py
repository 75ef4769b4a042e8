"""Sequential rounding: each layer is calibrated on inputs from the already quantized layers.

Stage by stage, Hessians of the stage's inputs come from the network whose earlier layers are
quantized and whose activation quantizers all work; then the stage's kernels are rounded.

Dimensions: K input channels, N output channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.calibration import Stats
from qdit_jax.models import TABLE, Family
from qdit_jax.ptq.over_time import NameFn, quantized_over_time
from qdit_jax.ptq.transform import as_matrix, matrix_shape, rewrite_kernels
from qdit_jax.quant import (
    GREATEST_WEIGHT,
    QTensor,
    WeightSpec,
    check_finite,
    output_error,
    quantize,
)
from qdit_jax.recipes import Recipe

# `(kernel [K, N], hessian [K, K], spec) -> QTensor`: `quant.gptq`, `quant.adaround`, ...
RoundFn = Callable[[Any, Any, WeightSpec], QTensor]
# `(params, paths) -> (hessians, held-out hessians or None)`, both by path.
HessiansFn = Callable[[Any, Sequence[str]], tuple[dict[str, Any], dict[str, Any] | None]]

# Kernels of one shape that are rounded in one vmapped call hold at most this many values.
MAX_STACKED = 2**24


@dataclasses.dataclass(frozen=True)
class RoundedLayer:
    """How one layer was rounded.

    `nearest` and `rounded` are the layer's relative squared output errors, on held-out inputs
    where there are any, of rounding to nearest and of the rounding asked for. `fell_back` says
    that the former was kept because it is better on held-out inputs.
    """

    path: str
    kernel: Any
    q: QTensor
    nearest: float
    rounded: float
    fell_back: bool


def quantize_in_order(
    params: Any,
    *,
    recipe: Recipe,
    hessians_fn: HessiansFn,
    round_fn: RoundFn,
    stages: Iterable[Sequence[str]],
    stats: Stats | None = None,
    on_layer: Callable[[RoundedLayer], None] | None = None,
) -> Any:
    """Returns `params` with each kernel that `recipe` names as a `QTensor`, rounded in stages.

    Beside the parameters, memory holds two float32 `[K, K]` per layer of one stage (one if nothing is
    held out) and a few float32 copies of the kernels being rounded: for a DiT-XL/2 block 0.2 GB
    and as much again for its fc2. Where the recipe's schedule gives weights other bits at some
    timesteps, all of it is done once more with these.

    Args:
        hessians_fn: runs the network with the parameters given on the calibration inputs.
        stages: lists of layer paths in the order of the network, see `by_block`; layers that the
            recipe leaves alone are skipped.
        on_layer: called after each layer.

    Raises:
        ValueError: as `quantize_params`; also if the stages lack a layer of the recipe, or a
            Hessian is not finite.
    """
    stages = [list(stage) for stage in stages]

    def once(recipe: Recipe, name_fn: NameFn) -> Any:
        def report(layer: RoundedLayer) -> None:
            if on_layer is not None and (called := name_fn(layer.path)) is not None:
                on_layer(dataclasses.replace(layer, path=called))

        return quantize_stages(params, recipe, hessians_fn, round_fn, stages, stats, report)

    return quantized_over_time(params, recipe, once)


def quantize_stages(
    params: Any,
    recipe: Recipe,
    hessians_fn: HessiansFn,
    round_fn: RoundFn,
    stages: Sequence[Sequence[str]],
    stats: Stats | None,
    on_layer: Callable[[RoundedLayer], None],
) -> Any:
    """Returns what `quantize_in_order` does, without the recipe's schedule."""
    specs = recipe.resolve(params)
    started = rewrite_kernels(params, only_tables, recipe=recipe, stats=stats)
    flat = dict(flatten_dict(started, sep="/"))
    wanted = {path for path, s in specs.items() if s.weight and f"{path}/kernel" in flat}
    chosen = [[path for path in stage if path in wanted] for stage in stages]
    if missing := sorted(wanted - {path for stage in chosen for path in stage}):
        raise ValueError(f"the network never runs {missing[0]}, which the recipe quantizes.")
    for stage in filter(None, chosen):
        hessians, holdout = hessians_fn(unflatten_dict(flat, sep="/"), stage)
        kernels = {path: flat[f"{path}/kernel"] for path in stage}
        kernels = {path: jnp.asarray(k).reshape(matrix_shape(k)) for path, k in kernels.items()}
        weight_specs = {path: specs[path].weight for path in stage}
        for path in stage:
            check_finite(path, kernels[path], GREATEST_WEIGHT)
            for found in (hessians, holdout or {}):
                check_hessian(path, found.get(path))
        for path, q in rounded_by_shape(kernels, hessians, weight_specs, round_fn):
            inputs = hessians[path] if holdout is None else holdout[path]
            layer = checked(path, kernels[path], q, inputs, weight_specs[path], holdout is not None)
            flat[f"{path}/kernel"] = layer.q
            on_layer(layer)
    return unflatten_dict(flat, sep="/")


def only_tables(path: str, name: str, leaf: Any, spec: WeightSpec) -> Any:
    """Returns a label table rounded to nearest, which has no inputs to be fitted to; else the leaf."""
    if not name.endswith(TABLE):
        return leaf
    check_finite(path, leaf, GREATEST_WEIGHT)
    return quantize(as_matrix(name, jnp.asarray(leaf)), spec)


def check_hessian(path: str, hessian: Any) -> None:
    """Raises `ValueError` if a layer's Hessian, where it has one, is not finite."""
    if hessian is not None:
        check_finite(f"the Hessian of the inputs of {path}", hessian)


def checked(
    path: str, kernel: Any, q: QTensor, inputs: Any, spec: Any, held_out: bool
) -> RoundedLayer:
    """Returns the layer with `q`, or rounded to nearest where that is better on held-out inputs."""
    nearest_q = quantize(kernel, spec)
    nearest = float(output_error(kernel, nearest_q, inputs))
    rounded = float(output_error(kernel, q, inputs))
    fell_back = held_out and not rounded <= nearest
    return RoundedLayer(path, kernel, nearest_q if fell_back else q, nearest, rounded, fell_back)


def rounded_by_shape(
    kernels: dict[str, Any], hessians: dict[str, Any], specs: dict[str, Any], round_fn: RoundFn
) -> Iterable[tuple[str, QTensor]]:
    """Yields `(path, QTensor)`; kernels of one shape and spec go through one vmapped call."""
    left = list(kernels)
    while left:
        first = left[0]
        shape, spec = kernels[first].shape, specs[first]
        alike = [path for path in left if kernels[path].shape == shape and specs[path] == spec]
        alike = alike[: max(1, MAX_STACKED // max(kernels[first].size, 1))]
        left = [path for path in left if path not in alike]
        if len(alike) == 1:
            yield first, round_fn(kernels[first], hessians[first], spec)
            continue
        stacked = jax.vmap(lambda w, h, spec=spec: round_fn(w, h, spec))(
            jnp.stack([kernels[path] for path in alike]),
            jnp.stack([hessians[path] for path in alike]),
        )
        for i, path in enumerate(alike):
            yield path, jax.tree.map(lambda leaf, i=i: leaf[i], stacked)


def by_block(paths: Sequence[str], family: Family) -> list[list[str]]:
    """Returns the stages of a network's layers: what comes before the blocks, the part that the
    family rounds first (adaLN), the blocks.

    adaLN sees the condition only, so that all of it makes one stage ahead of the blocks, and the
    blocks' inputs are those of quantized modulations. A block's own layers are one stage: within
    it, inputs are those of its unquantized kernels.
    """
    early = [path for path in paths if family.part_of(path) == family.rounded_first]
    others = [path for path in paths if path not in early]
    groups = by_block_qdit_release(others, family)
    first = next((i for i, group in enumerate(groups) if family.block_of(group[0])), 0)
    return [stage for stage in (*groups[:first], early, *groups[first:]) if stage]


def by_block_qdit_release(paths: Sequence[str], family: Family) -> list[list[str]]:
    """Returns the stages of the Q-DiT release: every block with its adaLN."""

    def room(path: str) -> str:
        return family.block_of(path) or path.split("/")[0]

    return [list(group) for _, group in groupby(paths, key=room)]


def by_layer(paths: Sequence[str], family: Family) -> list[list[str]]:
    """Returns one stage per layer, adaLN first as in `by_block`: the most exact and the slowest."""
    return [[path] for stage in by_block(paths, family) for path in stage]
