"""`bench`: the time of one step of the sampler, in full precision and quantized, side by side.

Dimensions: B samples, R rounds.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax

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
    fitting_guidance,
    guidance_record,
)
from qdit_jax.speed.contenders import (
    Contender,
    Way,
    check_known,
    contenders_of,
    recipe_named,
    ways_of,
)
from qdit_jax.speed.race import Race
from qdit_jax.speed.records import Records
from qdit_jax.speed.rows import Bench, Row, marked
from qdit_jax.speed.timing import TimeFn, interleaved
from qdit_jax.types import Condition, Progress, ProgressFn, untold

NUM_ROUNDS = 21
SECONDS = 2.0  # for which a network is timed in a row, at the most, if that is 6 rounds
# What kernels compute: int8 per channel, two levels of scales, groups, and weights alone.
RECIPES = ("w8a8-fast", "w4a8-fast", "w4a8", "w4a16")
BATCHES = (1, 8, 32)
# CPUs are busy with 8 samples: 32 take four times as long, at about the same ratios.
CPU_BATCHES = (1, 8)


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
    for row in rows_of(jobs, race, records):
        rows.append(row)
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


def rows_of(
    jobs: Iterable[tuple[Contender, int, Way]], race: Race, records: Records
) -> Iterator[Row]:
    """Yields the rows of jobs, all batch sizes of a network and way together, those of `records` as they are."""
    together: dict[tuple[Contender, Way], list[int]] = {}
    for contender, batch, way in jobs:
        together.setdefault((contender, way), []).append(batch)
    for (contender, way), batches in together.items():
        names = {batch: entry_name(contender, batch, way) for batch in batches}
        left = [batch for batch, name in names.items() if name not in records.entries]
        if left:
            race.compile_ahead(contender, left, way)
        for batch in batches:
            measure_fn = partial(race.row, contender, batch, way)
            yield Row.from_json(records.entry(names[batch], measure_fn))


def entry_name(contender: Contender, batch: int, way: Way) -> str:
    """Returns the name of a row's entry."""
    return f"step {batch}, {contender.title}, {way.numerics}, {way.implementation}"
