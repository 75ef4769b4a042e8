"""The networks that a bench times: compiled steps of them, in turn with the baseline.

Dimensions: B samples.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from qdit_jax.calibration import trajectory
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.errors import UserError
from qdit_jax.sampling import (
    Guidance,
    calls_per_step,
    checkpoint_sampler,
    denoiser,
    initial_noise,
    on_one_device,
    running_params,
    sampler_timesteps,
)
from qdit_jax.speed.conditions import conditions_of
from qdit_jax.speed.contenders import Contender, Way
from qdit_jax.speed.devices import present_device
from qdit_jax.speed.peak import peak_share
from qdit_jax.speed.predicted import Counted
from qdit_jax.speed.rows import Row
from qdit_jax.speed.timing import Call, TimeFn, ratio, taken
from qdit_jax.types import Condition, Params

NUM_STEPS, NUM_SAMPLES = 4, 4  # of the trajectory on which errors are measured
AT_ONCE = 2  # programs that are compiled on a CPU


class Inputs(NamedTuple):
    """The arguments of one step, B samples."""

    x: Float[Array, "B *shape"]
    timestep: Float[Array, " B"]
    condition: Condition


class Compiled(NamedTuple):
    """A step of one network, compiled for one batch size."""

    denoise_fn: Callable[..., Array]
    inputs: Inputs
    call: Callable[..., Array]
    seconds: float
    temporary_bytes: int | None

    def run(self) -> Array:
        """Returns the output of a step."""
        return self.call(self.denoise_fn, *self.inputs)


def model_of(contender: Contender, way: Way) -> nn.Module:
    """Returns a network that computes in this way."""
    model = contender.checkpoint.model
    if way.numerics is None:
        return model
    return model.clone(numerics=way.numerics, implementation=way.implementation)


class Race:
    """The baseline and what it is timed against: compiled steps, and rows of the result."""

    def __init__(
        self,
        base: Contender,
        base_way: Way,
        guidance: Guidance | None,
        num_rounds: int,
        seed: int,
        time_fn: TimeFn,
        conditions: Condition = None,
    ) -> None:
        self.base, self.base_way = base, base_way
        self.guidance, self.num_rounds, self.seed = guidance, num_rounds, seed
        self.time_fn, self.conditions = time_fn, conditions
        self.device = present_device()
        self.counted = cache(lambda: Counted(base.checkpoint, base.rows))
        self.baseline = cache(lambda batch: self.compiled(base, batch, base_way))
        self.held: dict[tuple[Contender, Way], Params] = {}
        self.seen: Inputs | None = None
        self.ready: dict[tuple[Contender, int, Way], Compiled] = {}

    def params(self, contender: Contender, way: Way) -> Params:
        """Returns a network's parameters on the first device; only the baseline's and these stay."""
        key = contender, way
        if key not in self.held:
            kept = self.base, self.base_way
            self.held = {one: p for one, p in self.held.items() if one == kept}
            params = contender.make_fn()
            with on_one_device():
                params = running_params(model_of(contender, way), params)
            self.held[key] = jax.device_put(params, jax.local_devices()[0])
        return self.held[key]

    def compiled(self, contender: Contender, batch: int, way: Way) -> Compiled:
        """Returns a step of a network, compiled."""
        model = model_of(contender, way)
        denoise_fn = denoiser(model, self.params(contender, way), self.guidance)
        inputs = inputs_of(contender.checkpoint, batch, self.seed, self.conditions)
        began = time.perf_counter()
        with on_one_device():
            call = jax.jit(step).lower(denoise_fn, *inputs).compile()
        seconds = time.perf_counter() - began
        memory = call.memory_analysis()
        held = None if memory is None else int(memory.temp_size_in_bytes)
        return Compiled(denoise_fn, inputs, call, seconds, held)

    def compile_ahead(self, contender: Contender, batches: Sequence[int], way: Way) -> None:
        """Compiles a network's steps on a CPU, two at once, for `row`; elsewhere `row` does, one by one.

        A GPU's compiler times products on the device, which a second one would disturb.
        """
        self.ready = {}
        if jax.default_backend() != "cpu":
            return
        self.params(self.base, self.base_way)
        self.params(contender, way)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self.baseline, batches))
            if (contender, way) != (self.base, self.base_way):
                steps = pool.map(lambda batch: self.compiled(contender, batch, way), batches)
                jobs = [(contender, batch, way) for batch in batches]
                self.ready = dict(zip(jobs, steps, strict=True))

    def path(self, denoise_fn: Callable[..., Array]) -> Inputs:
        """Returns the inputs of a few steps of the baseline's sampler: x `[S, B, ...]`, timestep `[S]`."""
        if self.seen is None:
            checkpoint, index = self.base.checkpoint, np.arange(NUM_SAMPLES, dtype=np.int32)
            sampler = checkpoint_sampler(checkpoint, NUM_STEPS)
            condition = conditions_of(checkpoint, NUM_SAMPLES, self.seed, self.conditions)
            key = jax.random.key(self.seed)
            given = (denoise_fn, sampler, checkpoint.model, key, index, condition)
            x, timestep = trajectory(*given)
            self.seen = Inputs(x, jnp.asarray(timestep), condition)
        return self.seen

    def row(self, contender: Contender, batch: int, way: Way) -> dict[str, Any]:
        """Returns a row in JSON's types, from the times of both, taken in turn."""
        base = self.baseline(batch)
        is_base = contender is self.base and way == self.base_way
        ours = self.ready.pop((contender, batch, way), None)
        if ours is None:
            ours = base if is_base else self.compiled(contender, batch, way)
        calls = [Call(self.base.title, base.run), Call(contender.title, ours.run)]
        seconds = self.time_fn(calls, self.num_rounds)
        error: dict[str, float | None] = {"relative_error": None, "db": None}
        if self.base_way.numerics is None and not is_base:
            error = errors(base, ours, self.path(base.denoise_fn))
        inputs = batch * calls_per_step(contender.checkpoint.model, self.guidance)
        ms, share = taken(1000 * seconds[1]), None
        if self.device is not None:
            share = peak_share(self.counted(), contender, way, inputs, self.device, ms.median)
        row = Row(
            contender.title,
            batch,
            way.numerics,
            contender.implementations(way, inputs),
            ms,
            ratio(seconds[1], seconds[0]),
            sum(leaf.nbytes for leaf in jax.tree.leaves(self.params(contender, way))),
            ours.temporary_bytes,
            ours.seconds,
            error["relative_error"],
            error["db"],
            share,
        )
        return dataclasses.asdict(row)


def step(
    denoise_fn: Callable[..., Array], x: Array, timestep: Array, condition: Condition
) -> Array:
    """Returns what the sampler gets of the network."""
    return denoise_fn(x, timestep, condition)


def inputs_of(
    checkpoint: Checkpoint, batch: int, seed: int, conditions: Condition = None
) -> Inputs:
    """Returns the arguments of the sampler's first step: noise, and conditions (`conditions_of`)."""
    index = jnp.arange(batch, dtype=jnp.int32)
    x, _ = initial_noise(jax.random.key(seed), index, checkpoint.model.sample_shape())
    first = sampler_timesteps(checkpoint_sampler(checkpoint, NUM_STEPS))[0]
    timestep = jnp.full((batch,), first, jnp.float32)
    given = Inputs(x, timestep, conditions_of(checkpoint, batch, seed, conditions))
    return jax.device_put(given, jax.local_devices()[0])


def errors(base: Compiled, ours: Compiled, path: Inputs) -> dict[str, float | None]:
    """Returns the relative error and decibels of outputs along a path, all steps together.

    The path's samples fill the batch, again and again; a learned variance does not count.

    Raises:
        UserError: if an output is not finite.
    """
    batch, num_channels = ours.inputs.x.shape[0], ours.inputs.x.shape[-1]
    index = np.arange(batch) % NUM_SAMPLES
    condition = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], path.condition)
    signal = noise = 0.0
    for x, timestep in zip(path.x, path.timestep, strict=True):
        given = x[index], jnp.full((batch,), timestep, jnp.float32), condition
        a, b = (
            np.asarray(one.call(one.denoise_fn, *given)[..., :num_channels], np.float64)
            for one in (base, ours)
        )
        signal += float(np.square(a).sum())
        noise += float(np.square(a - b).sum())
    if not np.isfinite(signal + noise):
        raise UserError(
            "an output of the network is not finite; check the checkpoint, or give the recipe finer "
            "groups."
        )
    share = float(np.sqrt(noise / signal))
    return {"relative_error": share, "db": None if share == 0 else -20 * float(np.log10(share))}
