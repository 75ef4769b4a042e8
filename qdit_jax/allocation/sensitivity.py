"""The effect of every choice of every layer on the final latents, from a few reverse passes.

With `u = J^T v` at a layer's output, J the derivative of the final latents with respect to it
through all remaining steps of the sampler, `sum_s u_s . dy_s` is the change of `v . final` when
the layer's output changes by `dy`. A choice's `dy` needs one product of the layer alone, so all
layers and choices are scored at once (Gauss-Newton: J at one point, errors squared).

Dimensions: S steps, B samples per batch, M samples of all batches, P probes, L layers, C most
choices of a layer, R rows of a layer's input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int

from qdit_jax.allocation.assigned import (
    act_branch,
    assigned_params,
    check_coordinates,
    chosen,
    kernel_branch,
)
from qdit_jax.allocation.coordinates import Coordinates
from qdit_jax.allocation.space import SearchLayer, Space
from qdit_jax.models import tapped
from qdit_jax.ptq import matrix_shape
from qdit_jax.types import AnyArray, Condition, Key, Numbers, Params


class Carried(NamedTuple):
    """What one step hands to the next: latents `x [B, ...]`, and what the sampler remembers.

    `state` is a pytree of floating-point arrays, None if that is nothing.
    """

    x: Array
    state: Any


# (params, carried, condition, key [B], step) -> carried after that step; a pytree, see objectives.
StepFn: TypeAlias = Callable[[Params, Carried, Condition, Key, Array], Carried]


class Effects(NamedTuple):
    """The effects of all choices on one batch of trajectories, float32.

    Attributes:
        change: `[B, P, L, C]`, `v . (J dy)` for every probe.
        along: `[B, L, C]`, `r . (J dy)`; r is the error of the base, zero for full precision.
        base_error: `[B]`, `|r|^2`.
        signal: `[B]`, `|final|^2` at full precision.
        step_weight: `[S]`, mean of `|J_s^T v|^2 / |v|^2`: how far an error made just after step s
            is magnified on its way to the end. An error of the latents that the next step is given,
            not of what a sampler remembers beside them.
    """

    change: AnyArray
    along: AnyArray
    base_error: AnyArray
    signal: AnyArray
    step_weight: AnyArray


class StepExperts(NamedTuple):
    """The experts of a network, each as a function of one step, and which of them takes each step.

    Attributes:
        step_fns: as `StepFn`, each by one expert alone, whose layers keep their paths.
        numbers: `[S]`, into `step_fns`.
    """

    step_fns: tuple[StepFn, ...]
    numbers: Int[AnyArray, " S"]


@partial(jax.jit, static_argnames=("space", "num_steps", "num_probes"))
def effects(
    step_fn: StepFn,
    params: Params,
    base: Int[Array, " L"] | None,
    start: Carried,
    condition: Condition,
    key: Key,
    probe_key: Key,
    coordinates: Mapping[str, Coordinates] | None = None,
    experts: StepExperts | None = None,
    *,
    space: Space,
    num_steps: int,
    num_probes: int,
) -> Effects:
    """Returns the effects of every choice on trajectories from `start`.

    Args:
        start: the noise `[B, ...]`, and the sampler's first state.
        base: the assignment `[L]` to differentiate at and count changes from; None is full
            precision.
        coordinates: of the layers whose choices have transforms or branches, by path.
        experts: of a network that has several; each step is then differentiated by its own.
    """
    coordinates = coordinates or {}
    check_coordinates(space, coordinates)
    used = params if base is None else assigned_params(params, space, base, coordinates)
    exact = step_inputs(step_fn, params, start, condition, key, num_steps)[0].x
    end, seen = step_inputs(step_fn, used, start, condition, key, num_steps)
    final = end.x
    error = final - exact
    probes = jax.random.normal(probe_key, (num_probes, *final.shape), jnp.float32)  # [P, B, ...]
    if base is not None:
        # The base's error is one more cotangent, for the mixed term of |r + J dy|^2 (`along`).
        probes = jnp.concatenate([probes, error[None]])  # [P + 1, B, ...]

    pull_fns = [
        partial(pulled_back, one, params, used, condition, key, coordinates, space, num_probes)
        for one in ((step_fn,) if experts is None else experts.step_fns)
    ]

    def backward(
        carry: tuple[Carried, Array], scanned: tuple[Carried, Array]
    ) -> tuple[tuple[Carried, Array], Array]:
        after, total = carry  # [P (+ 1), B, ...] of what this step returns, [P (+ 1), B, L, C]
        given, step = scanned
        if experts is None:
            before, change, weight = pull_fns[0](after, given, step)
        else:  # the expert that runs at this step, no other
            number = experts.numbers[step]
            before, change, weight = jax.lax.switch(number, pull_fns, after, given, step)
        return (before, total + change), weight

    count = (len(probes), len(final), len(space.layers), int(space.num_choices.max()))
    unread = jax.tree.map(lambda leaf: jnp.zeros((len(probes), *leaf.shape), leaf.dtype), end.state)
    last = (Carried(probes, unread), jnp.zeros(count, jnp.float32))
    steps = (seen, jnp.arange(num_steps, dtype=jnp.int32))
    (_, total), ratio = jax.lax.scan(backward, last, steps, reverse=True)
    total = jnp.moveaxis(total, 0, 1)  # [B, P (+ 1), L, C]
    along = jnp.zeros_like(total[:, 0]) if base is None else total[:, -1]
    # ratio[s] is the growth over step s; an error made just after s passes the later steps only.
    later = jnp.append(jnp.cumprod(ratio[::-1])[::-1][1:], 1.0)  # [S]
    axes = tuple(range(1, final.ndim))  # all but the sample's
    return Effects(
        total[:, :num_probes],
        along,
        jnp.square(error).sum(axes),
        jnp.square(exact).sum(axes),
        later,
    )


def pulled_back(
    step_fn: StepFn,
    params: Params,
    used: Params,
    condition: Condition,
    key: Key,
    coordinates: Mapping[str, Coordinates],
    space: Space,
    num_probes: int,
    after: Carried,
    given: Carried,
    step: Int[Array, ""],
) -> tuple[Carried, Float[Array, "P B L C"], Float[Array, ""]]:
    """Returns the cotangents of what a step was given, its choices' changes, and its growth.

    Layers that the step does not run change nothing. P counts all cotangents `after [P, B, ...]`.
    """
    run = partial(tapped_step, step_fn, used, condition, key, step)
    # Zeros added to the outputs of layers; their cotangents are the adjoints u.
    taps = jax.eval_shape(partial(run, taps=None), given)[1][1]
    taps = {path: jnp.zeros(y.shape, y.dtype) for path, y in taps.items()}
    _, pull, (inputs, outputs) = jax.vjp(
        lambda given, taps: run(given, taps=taps), given, taps, has_aux=True
    )
    before, adjoint = jax.vmap(pull)(after)  # [P, B, ...], by path [P, R, ..., N]
    count = (len(after.x), len(given.x))  # P, B
    changes = []
    for layer in space.layers:
        change = jnp.zeros((*count, len(layer.choices)), jnp.float32)
        if layer.path in inputs:
            seen = (inputs[layer.path], outputs[layer.path], adjoint[layer.path])
            change = layer_change(layer, params, coordinates.get(layer.path), *seen)
            # A sample's rows (R / B of them, with guidance two) lie side by side.
            change = change.reshape(*count, -1, len(layer.choices)).sum(axis=2)
        changes.append(change)
    # The growth of |J^T v|^2 over this step, of random probes alone.
    weight = jnp.square(before.x[:num_probes]).mean() / jnp.square(after.x[:num_probes]).mean()
    return before, padded(changes, int(space.num_choices.max())), weight


def step_inputs(
    step_fn: StepFn,
    params: Params,
    start: Carried,
    condition: Condition,
    key: Key,
    num_steps: int,
) -> tuple[Carried, Carried]:
    """Returns what the last step returns, and what every step is given, stacked: `[S, B, ...]`."""

    def body(carried: Carried, step: Array) -> tuple[Carried, Carried]:
        return step_fn(params, carried, condition, key, step), carried

    return jax.lax.scan(body, start, jnp.arange(num_steps, dtype=jnp.int32))


def tapped_step(
    step_fn: StepFn,
    params: Params,
    condition: Condition,
    key: Key,
    step: Int[Array, ""],
    carried: Carried,
    *,
    taps: dict[str, Array] | None,
) -> tuple[Carried, tuple[dict[str, Array], dict[str, Array]]]:
    """Returns a step's result with `taps` added to the layers' outputs, and their inputs and outputs."""
    inputs: dict[str, Array] = {}
    outputs: dict[str, Array] = {}

    def tap(path: str, layer: nn.Module, x: Array, call: Callable[[], Array]) -> Array:
        inputs[path], outputs[path] = x, call()
        return outputs[path] if taps is None else outputs[path] + taps[path]

    with tapped(tap):
        result = step_fn(params, carried, condition, key, step)
    return result, (inputs, outputs)


def layer_change(
    layer: SearchLayer,
    params: Params,
    coordinates: Coordinates | None,
    x: Float[Array, "R *tokens K"],
    y: Float[Array, "R *tokens N"],
    adjoint: Float[Array, "P R *tokens N"],
) -> Float[Array, "P R choices"]:
    """Returns `u . dy` of every choice of one layer, `[P, R, choices]`.

    R is the number of rows of the layer's input: B, or a multiple of it where guidance runs every
    sample more than once.
    """
    flat = flatten_dict(params, sep="/")
    kernel = flat[f"{layer.path}/kernel"]
    kernel = kernel.reshape(matrix_shape(kernel))
    bias = flat.get(f"{layer.path}/bias")
    weights = tuple(spec.weight for spec in layer.choices)
    acts = tuple(spec.act for spec in layer.choices)

    def one(choice: Int[Array, ""]) -> Float[Array, "P R ..."]:
        seen, matrix, added = x, kernel, 0.0 if bias is None else bias
        if coordinates is not None:
            found = coordinates.at(choice, kernel, bias)
            seen, matrix = found.input_map(x), found.kernel
            added = 0.0 if found.bias is None else found.bias
            added = added if found.low_rank is None else added + found.low_rank(seen)
        quantized = chosen(act_branch, acts, choice, seen) @ chosen(
            kernel_branch, weights, choice, matrix
        )
        gap = (quantized + added - y).astype(jnp.float32)
        return jnp.einsum("p...n,...n->p...", adjoint, gap)  # [P, R, tokens]

    numbers = jnp.arange(len(layer.choices), dtype=jnp.int32)
    by_row = jax.lax.map(one, numbers)  # [choices, P, R, tokens], one choice at a time
    return jnp.moveaxis(by_row.sum(axis=tuple(range(3, by_row.ndim))), 0, -1)  # [P, R, choices]


def padded(changes: Sequence[Float[Array, "P B _"]], most: int) -> Float[Array, "P B L C"]:
    """Returns changes `[P, B, choices]` of all layers with zeros for choices that a layer lacks."""
    wide = [jnp.pad(one, ((0, 0), (0, 0), (0, most - one.shape[-1]))) for one in changes]
    return jnp.stack(wide, axis=2)


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """A quadratic model of the relative error of final latents, as `PairedError` measures it:

    `error(c) = constant + sum_l linear[l, c_l] + sum_{l, m} gram[l, c_l, m, c_m]`

    Attributes:
        constant: the error of the base.
        linear: `[L, C]`.
        gram: `[L, C, L, C]`.
    """

    constant: float
    linear: np.ndarray
    gram: np.ndarray

    @property
    def table(self) -> np.ndarray:
        """Returns each choice's own share, `[L, C]`: what an additive model sums up."""
        count, choices = self.linear.shape
        # gram[l, c, l, c]: the error that a choice makes alone.
        own = self.gram.reshape(count * choices, -1).diagonal().reshape(count, choices)
        return self.linear + own

    def additive(self, assignments: Int[np.ndarray, "*N L"]) -> Float[np.ndarray, " N"]:
        """Returns the sum of single-layer errors of assignments `[N, L]`."""
        assignments = np.atleast_2d(assignments)
        return self.constant + self.table[np.arange(len(self.linear)), assignments].sum(axis=-1)

    def joint(self, assignments: Int[np.ndarray, "*N L"]) -> Float[np.ndarray, " N"]:
        """Returns the error with the terms between layers, of assignments `[N, L]`."""
        layers = np.arange(len(self.linear))
        found = []
        for chosen_ in np.atleast_2d(assignments):
            rows = self.gram[layers, chosen_][:, layers, chosen_]  # [L, L]
            found.append(self.constant + self.linear[layers, chosen_].sum() + rows.sum())
        return np.array(found)


def prediction(batches: Sequence[Effects]) -> Prediction:
    """Returns the quadratic model that the effects of all batches give."""
    # Samples of all batches along the first axis: [M, P, L, C], [M, L, C], [M], [M].
    joined = [
        np.concatenate([np.asarray(getattr(b, name), np.float64) for b in batches])
        for name in ("change", "along", "base_error", "signal")
    ]
    change, along, base_error, signal = joined
    scale = 1 / signal.mean()  # errors are relative to the signal, as in `PairedError`
    _, _, count, choices = change.shape
    # E[(v . J a) (v . J b)] = (J a) . (J b) for normal v: the mean over probes is the gram matrix.
    rows = change.reshape(-1, count * choices)  # [M P, L C]
    gram = (rows.T @ rows / len(rows) * scale).reshape(count, choices, count, choices)
    return Prediction(float(base_error.mean() * scale), 2 * along.mean(axis=0) * scale, gram)


def rank_correlation(a: Numbers, b: Numbers) -> float:
    """Returns Spearman's rank correlation; 0 where one side does not vary."""
    ranks = [rank_of(np.asarray(values, np.float64)) for values in (a, b)]
    spread = [r.std() for r in ranks]
    if min(spread) == 0:
        return 0.0
    centered = [r - r.mean() for r in ranks]
    return float((centered[0] * centered[1]).mean() / (spread[0] * spread[1]))


def rank_of(values: np.ndarray) -> np.ndarray:
    """Returns ranks from 0, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return (last - (counts - 1) / 2)[inverse]
