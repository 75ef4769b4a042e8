"""Learns the rounding of all kernels of one module together, so that its output changes least.

As BRECQ (arXiv:2102.05426) does: the loss is the squared error of the module's output, plus
AdaRound's term that drives every rounding to up or down. Step sizes of static activation
quantizers are learned with them (LSQ, arXiv:1902.08153).

Differs from BRECQ, which weighs the output's error by squared gradients of the network's loss: here
every item and every channel weighs the same.

Dimensions: I items, B items of one minibatch, C steps of one call, F values of one output, K input
channels, N output channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int

from qdit_jax.models import Call, seen_inputs
from qdit_jax.quant import (
    ActQuant,
    QTensor,
    WeightSpec,
    adaptive_rounding,
    dequantize,
    select_timestep,
    straight_through,
    with_codes,
)

# A module's entries by path within it: arrays, quantizers and further leaves.
Entries = Mapping[str, Any]
# `{"logits": {kernel: v [K, N]}, "steps": {quantizer: log of the step size's factor}}`
Learned = dict[str, dict[str, Any]]
State = tuple[Learned, optax.OptState]
# Chunks of steps that one module's learning is cut into.
NUM_CHUNKS = 10


@dataclasses.dataclass(frozen=True)
class ReconstructionSettings:
    """How long and how hard to learn a module's rounding.

    Attributes:
        num_steps: optimizer steps per module, rounded up to a multiple of `NUM_CHUNKS`.
        minibatch: items in a step.
        learning_rate: Adam's for the roundings at the start; it falls to a tenth along a cosine.
        step_size_rate: Adam's for the logarithms of step sizes; 0 leaves these as they are.
        strength: greatest weight of `polarization`, reached along a linear ramp.
        warmup, cooldown: fractions of the steps before and after that ramp.
        first_power, last_power: of `polarization` at the ramp's start and end. A high power moves
            only what is nearly decided. Differs from AdaRound, which starts at 20: in few steps
            that leaves many roundings undecided.
        seed: of the minibatches.
    """

    num_steps: int = 500
    minibatch: int = 32
    learning_rate: float = 2e-2
    step_size_rate: float = 1e-3
    strength: float = 0.5
    warmup: float = 0.2
    cooldown: float = 0.1
    first_power: float = 2.0
    last_power: float = 2.0
    seed: int = 0

    @property
    def chunk(self) -> int:
        """Steps of one call of `learn`."""
        return -(-self.num_steps // NUM_CHUNKS)


@dataclasses.dataclass(frozen=True)
class Form:
    """What modules that are alike have in common; static, so that they share what is compiled.

    Attributes:
        calls: of the module in one run of the network.
        specs: of its kernels that are rounded, by their names in `Entries`.
    """

    calls: tuple[Call, ...]
    specs: tuple[tuple[str, WeightSpec], ...]


class Samples(NamedTuple):
    """What a module takes in the quantized network, and what it returns in full precision.

    Attributes:
        inputs: the arrays among each call's arguments, `[I, R, ...]`, without I where they have no
            batch axis.
        targets: the arrays of each call's output, `[I, F]`.
        timestep: `[I]`.
    """

    inputs: list[list[Any]]
    targets: list[list[Any]]
    timestep: Any


def outputs(
    form: Form, entries: Entries, samples: Samples, index: Int[Array, " B"]
) -> list[Float[Array, "B F"]]:
    """Returns the outputs of a module for the items `index`."""
    params = select_timestep(unflatten_dict(dict(entries), sep="/"), samples.timestep[index])
    found = []
    for call, arrays in zip(form.calls, samples.inputs, strict=True):
        taken = [
            array[index].reshape(-1, *array.shape[2:]) if rows else array
            for rows, array in zip(call.rows, arrays, strict=True)
        ]
        found += [out.reshape(len(index), -1) for out in call(params, taken)]
    return found


def squared_distance(
    found: list[Float[Array, "B F"]], wanted: list[Float[Array, "B F"]]
) -> Float[Array, " B"]:
    """Returns every item's squared distance of two lists of outputs."""
    parts = [jnp.sum(jnp.square(a - b), axis=1) for a, b in zip(found, wanted, strict=True)]
    return jnp.sum(jnp.stack(parts), axis=0)


def wanted_outputs(samples: Samples, index: Int[Array, " B"]) -> list[Float[Array, "B F"]]:
    return [target[index] for call in samples.targets for target in call]


@partial(jax.jit, static_argnames="form")
def errors(
    form: Form,
    entries: Entries,
    samples: Samples,
    index: Int[Array, " B"],
    weight: Float[Array, " B"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the weighted sums of the items' squared output errors and squared outputs."""
    wanted = wanted_outputs(samples, index)
    error = squared_distance(outputs(form, entries, samples, index), wanted)
    power = squared_distance(wanted, [jnp.zeros_like(target) for target in wanted])
    return jnp.sum(weight * error), jnp.sum(weight * power)


def own_costs(
    form: Form,
    entries: Entries,
    nearest: dict[str, QTensor],
    samples: Samples,
    index: Int[Array, " B"],
) -> dict[str, Float[Array, "K N"]]:
    """Returns the squared output error that each rounding by a whole step would make by itself.

    It is `E[x**2] * scale**2` of the layer's inputs x, in units of the module's output: times the
    ratio of what rounding the layer's kernel to nearest does to the module's output and to the
    layer's own.
    """
    moments = input_moments(form, entries, samples, index)
    costs = {}
    for name, _ in form.specs:
        w, q = matrix(entries[name]), nearest[name]
        rounded = dequantize(q)
        other = {**entries, name: rounded.reshape(entries[name].shape)}
        moved = distance(form, entries, other, samples, index)
        moment = moments[name][:, None]
        own = jnp.maximum(jnp.sum(moment * jnp.square(rounded - w)), jnp.finfo(jnp.float32).tiny)
        costs[name] = moment * jnp.square(adaptive_rounding.wide_grid(q)[0]) * (moved / own)
    return costs


@partial(jax.jit, static_argnames="form")
def input_moments(
    form: Form, entries: Entries, samples: Samples, index: Int[Array, " B"]
) -> dict[str, Float[Array, " K"]]:
    """Returns the sums of squares of each layer's input over an item's rows, by kernel."""
    moments: dict[str, Any] = {}

    def seen(path: str, x: Array) -> None:
        name = f"{path}/kernel" if path else "kernel"
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        moments[name] = moments.get(name, 0) + jnp.sum(jnp.square(rows), axis=0) / len(index)

    with seen_inputs(seen, quantized=True):
        outputs(form, entries, samples, index)
    return {name: moments[name] for name, _ in form.specs}


@partial(jax.jit, static_argnames="form")
def distance(
    form: Form, entries: Entries, other: Entries, samples: Samples, index: Int[Array, " B"]
) -> Float[Array, ""]:
    """Returns the mean squared distance of a module's outputs with two sets of entries."""
    plain = outputs(form, entries, samples, index)
    return jnp.mean(squared_distance(outputs(form, other, samples, index), plain))


def matrix(kernel: Array) -> Float[Array, "K N"]:
    """Returns a kernel in float32 with all input axes as one."""
    return jnp.asarray(kernel, jnp.float32).reshape(-1, kernel.shape[-1])


@partial(jax.jit, static_argnames=("form", "settings"))
def started(
    form: Form, entries: Entries, nearest: dict[str, QTensor], settings: ReconstructionSettings
) -> State:
    """Returns the state before the first step: kernels and step sizes are as they are."""
    logits = {
        name: adaptive_rounding.initial_logits(
            matrix(entries[name]), *adaptive_rounding.wide_grid(nearest[name])
        )
        for name, _ in form.specs
    }
    steps = {
        name: jnp.zeros_like(entry.scale)
        for name, entry in entries.items()
        if settings.step_size_rate and isinstance(entry, ActQuant) and entry.scale is not None
    }
    learned = {"logits": logits, "steps": steps}
    return learned, optimizer(settings).init(learned)


def optimizer(settings: ReconstructionSettings) -> optax.GradientTransformation:
    num_steps = settings.chunk * NUM_CHUNKS
    return optax.adam(optax.cosine_decay_schedule(settings.learning_rate, num_steps, alpha=0.1))


def with_steps(entries: Entries, learned: Learned, settings: ReconstructionSettings) -> Entries:
    """Returns the entries with the learned step sizes."""
    # Adam's steps are of the same size for all that it learns.
    ratio = settings.step_size_rate / settings.learning_rate
    factors = {name: jnp.exp(ratio * log) for name, log in learned["steps"].items()}
    changed = {
        name: dataclasses.replace(entries[name], scale=entries[name].scale * factor)
        for name, factor in factors.items()
    }
    return {**entries, **changed}


@partial(jax.jit, static_argnames=("form", "settings"), donate_argnums=0)
def learn(
    state: State,
    first: Int[Array, ""],
    batches: Int[Array, "C B"],
    entries: Entries,
    nearest: dict[str, QTensor],
    costs: dict[str, Float[Array, "K N"]],
    unit: Float[Array, ""],
    samples: Samples,
    *,
    form: Form,
    settings: ReconstructionSettings,
) -> State:
    """Returns the state after C steps, of which `first` is the first.

    `unit` is the mean squared error of an item's output, which the loss is divided by.
    """
    weights = {name: matrix(entries[name]) for name, _ in form.specs}
    grids = {name: adaptive_rounding.wide_grid(nearest[name]) for name, _ in form.specs}

    def loss(learned: Learned, index: Int[Array, " B"], progress: Array) -> Float[Array, ""]:
        kernels = {}
        for name, spec in form.specs:
            scale, offset = grids[name]
            v = learned["logits"][name]
            codes = adaptive_rounding.soft_codes(weights[name], v, scale, offset, spec.bits)
            kernels[name] = (codes - offset) * scale
        now = with_steps(entries, learned, settings)
        passing = {name: straight_through(entry) for name, entry in now.items()}
        found = outputs(form, {**passing, **kernels}, samples, index)
        error = jnp.mean(squared_distance(found, wanted_outputs(samples, index)))
        way = adaptive_rounding.ramp(progress, settings.warmup, settings.cooldown)
        power = settings.first_power + way * (settings.last_power - settings.first_power)
        pull = settings.strength * way
        rest = [
            adaptive_rounding.polarization(v, costs[name], power)
            for name, v in learned["logits"].items()
        ]
        return (error + pull * sum(rest)) / unit

    def step(state: State, given: tuple[Array, Array]) -> tuple[State, None]:
        learned, opt_state = state
        index, number = given
        progress = number / (settings.chunk * NUM_CHUNKS)
        gradient = jax.grad(loss)(learned, index, progress)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32
            updates, opt_state = optimizer(settings).update(gradient, opt_state)
        return (optax.apply_updates(learned, updates), opt_state), None  # type: ignore[return-value]

    numbers = first + jnp.arange(len(batches), dtype=jnp.int32)
    return jax.lax.scan(step, state, (batches, numbers))[0]


@partial(jax.jit, static_argnames=("form", "settings"))
def rounded(
    form: Form,
    entries: Entries,
    nearest: dict[str, QTensor],
    learned: Learned,
    settings: ReconstructionSettings,
) -> Entries:
    """Returns the entries that learning has changed: kernels as `QTensor`s, and quantizers."""
    found: dict[str, Any] = {}
    for name, spec in form.specs:
        q, v = nearest[name], adaptive_rounding.decided(learned["logits"][name])
        scale, offset = adaptive_rounding.wide_grid(q)
        codes = adaptive_rounding.soft_codes(matrix(entries[name]), v, scale, offset, spec.bits)
        found[name] = with_codes(q, codes.astype(jnp.uint8))
    changed = with_steps(entries, learned, settings)
    return {**found, **{name: changed[name] for name in learned["steps"]}}
