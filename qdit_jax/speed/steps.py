"""`bench`: the time of one step of the sampler, in full precision and quantized, side by side.

Dimensions: B samples, R rounds.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from qdit_jax.calibration import trajectory
from qdit_jax.checkpoint import Checkpoint, digest, fingerprint, load
from qdit_jax.errors import UserError, check_counts
from qdit_jax.files import AnyPath, PathLike
from qdit_jax.kernels import NUMERICS
from qdit_jax.recipes import Recipe
from qdit_jax.report import provenance
from qdit_jax.sampling import (
    PUBLISHED,
    Guidance,
    calls_per_step,
    check_diffusion_model,
    check_seed,
    checkpoint_sampler,
    denoiser,
    fitting_guidance,
    guidance_record,
    initial_noise,
    on_one_device,
    running_params,
    sampler_timesteps,
)
from qdit_jax.speed.conditions import conditions_of
from qdit_jax.speed.contenders import (
    Contender,
    Way,
    check_known,
    contenders_of,
    recipe_named,
    ways_of,
)
from qdit_jax.speed.devices import present_device
from qdit_jax.speed.peak import peak_share
from qdit_jax.speed.predicted import Counted
from qdit_jax.speed.records import Records
from qdit_jax.speed.rows import Bench, Row, marked
from qdit_jax.speed.timing import Call, TimeFn, interleaved, ratio, taken
from qdit_jax.types import Condition, Params, Progress, ProgressFn, untold

NUM_ROUNDS = 21
SECONDS = 2.0  # for which a network is timed in a row, at the most, if that is 6 rounds
NUM_STEPS, NUM_SAMPLES = 4, 4  # of the trajectory on which errors are measured
# What kernels compute: int8 per channel, two levels of scales, groups, and weights alone.
RECIPES = ("w8a8-fast", "w4a8-fast", "w4a8", "w4a16")
BATCHES = (1, 8, 32)
CPU_BATCHES = (
    1,
    8,
)  # CPUs are busy with 8 samples: 32 take four times as long, at about the same ratios


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


def bench(
    checkpoint: Checkpoint | PathLike,
    recipes: Iterable[str | Recipe] | None = None,
    *,
    batches: Sequence[int] | None = None,
    against: Checkpoint | PathLike | None = None,
    group_size: int | None = None,
    numerics: Sequence[str] = NUMERICS,
    implementations: Sequence[str] = (),
    guidance: Guidance | None = PUBLISHED,
    expand: bool = False,
    num_rounds: int = NUM_ROUNDS,
    seconds: float = SECONDS,
    seed: int = 0,
    conditions: Condition = None,
    state: AnyPath | None = None,
    time_fn: TimeFn | None = None,
    total_fn: Callable[[int], object] = lambda total: None,
    progress_fn: ProgressFn = untold,
) -> Bench:
    """Returns the time of a step of the sampler in full precision and quantized, by batch size.

    A step is one call of the network as the sampler makes it: guided, on the samples and their null
    samples together. It is compiled with the parameters as arguments. Every network takes turns with
    the baseline, round by round, so that what slows the machine slows both. The timed
    inputs are those of the sampler's first step, noise; the errors are of four steps of the sampler.

    Args:
        checkpoint: in full precision; or quantized, which is timed as it is.
        recipes: names such as `w4a8` or `w4a8-g32`, paths of recipe files, or recipes; the weights
            are rounded to nearest. By default those of `RECIPES` that can be computed in one of the numerics
            and by the implementations.
        batches: samples per step; by default 1, 8 and 32, on CPUs 1 and 8.
        against: of a quantized checkpoint, the full-precision one that is the baseline; without it
            the baseline is the checkpoint itself, the first way in which it is computed.
        group_size: of recipes that do not name one; by default the preset's own.
        numerics, implementations: which are timed, of those that apply; no implementation is all, on CPUs
            the one that the table of kernels takes.
        guidance: the network's own by default; 1 or None calls it once, without the null condition.
        expand: of a quantized checkpoint, also time it with its weights unpacked when it was loaded.
        num_rounds: how often each is timed at most.
        seconds: for which each network of a row is timed at most: where a step is slow there are fewer
            rounds, but 6 or more, of which an interval can be told. A row's `ratio.count` says how many.
        seed: of the noise.
        conditions: labels or prompts that samples take in turn; by default every class, or random prompts.
        state: a folder that keeps what was measured; the same call goes on from there.
        time_fn: takes the times, by default `interleaved` with `seconds`.
        total_fn, progress_fn: called with the number of rows, and with how many are done.

    Raises:
        UserError: if a setting does not fit the checkpoint, or `state` holds other measurements.
        ValueError: if a recipe cannot be read or matches nothing.
    """
    batches = default_batches() if batches is None else batches
    for batch in batches:
        check_counts(batches=batch)
    check_rounds(num_rounds, seconds)
    check_known(numerics, implementations)
    ours, full = opened(checkpoint), None if against is None else opened(against)
    is_default = recipes is None
    if recipes is None:
        recipes = () if ours.recipe is not None else RECIPES
    wanted = [r if isinstance(r, Recipe) else recipe_named(r, group_size) for r in recipes]
    entrants = contenders_of(ours, wanted, full, expand=expand)
    guidance = fitting_guidance(ours.model, guidance)
    settings = settings_of(entrants, guidance, num_rounds, seconds, check_seed(seed), conditions)
    optional = entrants[len(entrants) - len(wanted) :] if is_default else []
    jobs = list(jobs_of(entrants, batches, numerics, implementations, guidance, optional))
    records = Records(state, settings)
    time_fn = time_fn or partial(interleaved, seconds=seconds)
    race = Race(entrants[0], jobs[0][2], guidance, num_rounds, seed, time_fn, conditions)
    total_fn(len(jobs))
    rows = []
    for job in jobs:
        found = records.entry(entry_name(*job), partial(race.row, *job))
        rows.append(Row.from_json(found))
        progress_fn(Progress(1))
    rows.sort(key=lambda row: batches.index(row.batch))
    return Bench(marked(rows), entrants[0].title, settings, provenance())


def default_batches() -> tuple[int, ...]:
    """Returns the samples per step that are timed by default where JAX computes."""
    return CPU_BATCHES if jax.default_backend() == "cpu" else BATCHES


def check_rounds(num_rounds: int, seconds: float) -> None:
    """Raises `UserError` for rounds that give no median, or for seconds that are none."""
    check_counts(2, num_rounds=num_rounds)
    if not seconds > 0:
        raise UserError(f"seconds={seconds} is not supported; use a number above 0.")


def opened(source: Checkpoint | PathLike) -> Checkpoint:
    """Returns a checkpoint of a network that denoises, read if it is a path."""
    checkpoint = source if isinstance(source, Checkpoint) else load(source)
    check_diffusion_model(checkpoint.model)
    return dataclasses.replace(checkpoint, vae=None)


def settings_of(
    entrants: Sequence[Contender],
    guidance: object,
    num_rounds: int,
    seconds: float,
    seed: int,
    conditions: Condition = None,
) -> dict[str, Any]:
    """Returns all that determines the measurements, beside what the entries' names say."""
    facts = provenance()
    networks = {id(c.checkpoint): (c.checkpoint.model, c.checkpoint.params) for c in entrants}
    return fingerprint(
        network=digest(list(networks.values())),
        guidance=guidance_record(float(guidance) if isinstance(guidance, int) else guidance),
        num_rounds=num_rounds,
        seconds=float(seconds) if math.isfinite(seconds) else None,
        seed=seed,
        machine=platform.node(),
        **({} if conditions is None else {"conditions": conditions}),
        **{name: facts[name] for name in ("device", "jax", "qdit_jax")},
    )


def jobs_of(
    entrants: Sequence[Contender],
    batches: Sequence[int],
    numerics: Sequence[str],
    implementations: Sequence[str],
    guidance: object,
    optional: Sequence[Contender] = (),
) -> Iterator[tuple[Contender, int, Way]]:
    """Yields what is to be timed: one network after another, in every way that applies.

    Raises:
        UserError: if nothing applies to one; of those that are `optional`, to all.
    """
    refused = 0
    for contender in entrants:
        for batch in batches:
            inputs = batch * calls_per_step(contender.checkpoint.model, guidance)
            try:
                ways = ways_of(contender, numerics, implementations, inputs)
            except UserError as error:
                refused += 1
                if contender not in optional or refused == len(optional) * len(batches):
                    raise
                logging.getLogger("qdit_jax").info("left out at batch %d: %s", batch, error)
                continue
            for way in ways:
                yield contender, batch, way


def entry_name(contender: Contender, batch: int, way: Way) -> str:
    """Returns the name of a row's entry."""
    return f"step {batch}, {contender.title}, {way.numerics}, {way.implementation}"


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
