"""Which sampling steps get few bits: one step lowered at a time, a knapsack, then measurements.

The error of final samples is close to the sum of what each lowered step alone does (TMPDiff,
arXiv:2603.14062), so S paired rollouts per lower precision predict all schedules. It is not the same,
so the best predicted one is measured beside its neighbors and simple ones, and the best measured is
returned.

Dimensions: S steps, L levels (bits of activations, or of weights and activations).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from qdit_jax.allocation.journal import Journal
from qdit_jax.allocation.records import Store
from qdit_jax.allocation.rollout_settings import Rollouts
from qdit_jax.allocation.schedule_error import ROLLOUTS, ScheduleError, schedule_error
from qdit_jax.allocation.step_candidates import EXCHANGED, Schedule, candidates, neighbors
from qdit_jax.allocation.step_levels import AnyLevel, as_level, bits_of_levels
from qdit_jax.checkpoint import Checkpoint, fingerprint
from qdit_jax.errors import check_counts
from qdit_jax.recipes import OverTime
from qdit_jax.types import Key, Progress, ProgressFn, untold


@dataclasses.dataclass(frozen=True)
class MeasuredSchedule:
    """A schedule that was a candidate.

    Attributes:
        act_bits: one per step.
        name: what it is, such as `"more bits last"`.
        predicted: the sum of its steps' errors.
        measured: its error.
        mean_bits: of activations, per step.
        mean_bitops: bits of weights times bits of activations, per step.
        weight_bits: one per step; None where no level changes weights.
    """

    act_bits: tuple[int | None, ...]
    name: str
    predicted: float
    measured: float
    mean_bits: float
    mean_bitops: float
    weight_bits: tuple[int | None, ...] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ChosenSteps:
    """A schedule of bits, and what it was chosen from.

    Errors are mean squared differences of final latents from those at the most bits throughout,
    over the mean square of the latter.

    Attributes:
        over_time: the schedule, for `schedule_act_bits` or a `Recipe`.
        levels: the bits that could be chosen, `L` of them: of activations, or pairs.
        errors: `[S, L]`, of each step alone at each level.
        predicted: sum of the chosen entries of `errors`.
        measured: the schedule's error, on the same samples.
        mean_bits, mean_bitops: of the schedule, as of a `MeasuredSchedule`.
        candidates: all that were measured, the chosen one among them, the best first.
    """

    over_time: OverTime
    levels: tuple[AnyLevel, ...]
    errors: Float[np.ndarray, "S L"]
    predicted: float
    measured: float
    mean_bits: float
    mean_bitops: float
    candidates: tuple[MeasuredSchedule, ...] = ()

    @property
    def has_pairs(self) -> bool:
        """Returns whether bits of weights were chosen too."""
        return any(isinstance(level, tuple) for level in self.levels)

    @property
    def by_step(self) -> tuple[AnyLevel, ...]:
        """Returns the level of every step."""
        acts, weights = self.over_time.act_bits, self.over_time.weight_bits
        if not self.has_pairs:
            return acts
        return tuple(zip(weights or (None,) * len(acts), acts, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Returns everything as JSON-able values."""
        return {
            "over_time": self.over_time.to_json(),
            "levels": list(self.levels),
            "errors": self.errors.tolist(),
            "predicted": self.predicted,
            "measured": self.measured,
            "mean_bits": self.mean_bits,
            "mean_bitops": self.mean_bitops,
            "candidates": [dataclasses.asdict(one) for one in self.candidates],
        }


def choose_steps(
    checkpoint: Checkpoint,
    key: Key,
    *,
    mean_bits: float | int | None = None,
    act_bits: Sequence[int | None] | None = None,
    levels: Sequence[str | AnyLevel] | None = None,
    mean_bitops: float | int | None = None,
    rollouts: Rollouts = ROLLOUTS,
    num_neighbors: int = 4,
    num_rounds: int = 3,
    progress_fn: ProgressFn = untold,
) -> ChosenSteps:
    """Returns the schedule of bits with the least measured error within a budget.

    Measures each step alone at each lower precision, S (L - 1) rollouts, solves the knapsack of their
    sums exactly, and measures its solution, neighbors of it and simple schedules: one level
    throughout, and the more bits last, first, at both ends or in the middle, for every two levels.
    Then it measures neighbors of the best measured, for as long as that is improved.

    All others are at the most bits meanwhile: of `levels`, at the most of either side. Where that is no
    level itself, as w8a16 is none of w4a16 and w8a8, every level is measured, in S L rollouts.

    Args:
        checkpoint: quantized. With `act_bits`, its weights stay as they are; with `levels`, it holds a
            kernel for each of their bits of weights, as quantizing it by a schedule that has them
            at some step makes it.
        key: of the samples' noise.
        mean_bits: at most so many bits of activations on average over the steps. With levels of
            `low` and `high` bits, a share `s` of low steps is `high - s * (high - low)`.
        act_bits: the levels; None are the checkpoint's own bits, 16 is no quantizer. By default
            `(None, 16)`.
        levels: bits of weights and activations in place of `act_bits`: pairs, or names such as
            `"w4a8"`, see `level_named`.
        mean_bitops: with `levels`, at most so many bit operations per multiply-add on average over
            the steps: bits of weights times bits of activations, 16 where a side is not quantized.
        rollouts: sampler and samples, one batch by default, and the folder that keeps what was
            measured, from which the same call resumes.
        num_neighbors: of a schedule, two steps exchanged, to measure; those of the least sums.
        num_rounds: how often at most neighbors of the best measured schedule are measured.
        progress_fn: told of every rollout `done`, read from `rollouts.state` or run, and of their `total`, each
            time that it is known better.

    Raises:
        ValueError: if there are fewer than two levels, no activation is quantized or one cannot
            have these bits, a kernel is not held at a level's bits, the checkpoint's weights change over
            time and `act_bits` are chosen, the budget is below the least, or samples are not finite.
        UserError: if `rollouts.state` holds another search; the first setting that differs is named.
    """
    check_counts(0, num_neighbors=num_neighbors, num_rounds=num_rounds)
    budget, limit = budget_of(levels, mean_bits=mean_bits, mean_bitops=mean_bitops)
    error_fn = schedule_error(checkpoint, key, act_bits=act_bits, levels=levels, rollouts=rollouts)
    if not np.isfinite(limit) or limit < (least := min(error_fn.costs)):
        what = "bits" if levels is None else "bit operations"
        raise ValueError(f"{budget}={limit} is below the fewest {what}, {least:g}.")
    settings = fingerprint(
        params=error_fn.params,
        model=checkpoint.model,
        sampler=error_fn.rollout.sampler,
        guidance=error_fn.rollout.guidance,
        data=error_fn.data,
        num_neighbors=num_neighbors,
        num_rounds=num_rounds,
        **{"act_bits" if levels is None else "levels": list(error_fn.levels), budget: limit},
    )
    with contextlib.ExitStack() as stack:
        folder = rollouts.state
        store = None if folder is None else stack.enter_context(Store(folder, settings))
        measure = Measure(error_fn, Journal(store), progress_fn)
        errors = step_errors(measure)
        first = candidates(errors, error_fn.costs, float(limit), num_neighbors)
        measured = measured_schedules(measure, errors, first, num_neighbors, num_rounds)
    return chosen_steps(error_fn, errors, measured)


def budget_of(
    levels: Sequence[str | AnyLevel] | None, **given: float | int | None
) -> tuple[str, float | int]:
    """Returns the budget that goes with what is chosen: its name and value.

    Raises:
        ValueError: if it is absent, or another one is given.
    """
    wanted, other = "mean_bits", "mean_bitops"
    chosen, against = "act_bits", "levels"
    if levels is not None:
        wanted, other, chosen, against = other, wanted, against, chosen
    if given[other] is not None:
        raise ValueError(
            f"{other}={given[other]} is the budget of {against}; give {wanted} for {chosen}."
        )
    if (limit := given[wanted]) is None:
        raise ValueError(f"{wanted}=None leaves the budget of {chosen} open; give a number.")
    return wanted, limit


def chosen_steps(
    error_fn: ScheduleError,
    errors: Float[np.ndarray, "S L"],
    measured: Mapping[Schedule, tuple[str, float]],
) -> ChosenSteps:
    """Returns the best of the measured schedules, and all of them."""
    bits = np.array(bits_of_levels(error_fn.params, error_fn.levels))  # [L, 2]
    rows = []
    for schedule, (name, error) in measured.items():
        levels = [as_level(error_fn.levels[i]) for i in schedule]
        weight_bits, act_bits = zip(*levels, strict=True)
        over_time = OverTime(error_fn.timesteps, act_bits, weight_bits)
        chosen = bits[list(schedule)]
        row = MeasuredSchedule(
            over_time.act_bits,
            name,
            predicted=float(errors[np.arange(len(errors)), list(schedule)].sum()),
            measured=error,
            mean_bits=float(chosen[:, 1].mean()),
            mean_bitops=float(chosen.prod(axis=1).mean()),
            weight_bits=over_time.weight_bits,
        )
        rows.append(row)
    rows.sort(key=lambda row: row.measured)  # of equal ones, the predicted one comes first
    best = rows[0]
    return ChosenSteps(
        OverTime(error_fn.timesteps, best.act_bits, best.weight_bits),
        error_fn.levels,
        errors,
        best.predicted,
        best.measured,
        best.mean_bits,
        best.mean_bitops,
        tuple(rows),
    )


def measured_schedules(
    measure: Measure,
    errors: Float[np.ndarray, "S L"],
    first: Mapping[Schedule, str],
    num_neighbors: int,
    num_rounds: int,
) -> dict[Schedule, tuple[str, float]]:
    """Returns what each schedule is and its error: of `first`, then of neighbors of the best."""
    found: dict[Schedule, tuple[str, float]] = {}
    wanted, best, levels = dict(first), np.inf, measure.error_fn.levels
    for _ in range(num_rounds + 1):
        measure.expect(len(wanted))
        for schedule, name in wanted.items():
            found[schedule] = (name, measure([levels[i] for i in schedule]))
        center = min(found, key=lambda schedule: found[schedule][1])
        if not found[center][1] < best:
            break
        best = found[center][1]
        near = neighbors(np.array(center), errors, num_neighbors + len(found))
        new = [schedule for schedule in near if schedule not in found][:num_neighbors]
        wanted = dict.fromkeys(new, EXCHANGED)
    return found


class Measure:
    """A `ScheduleError` whose results are kept in a journal, and reported."""

    def __init__(
        self,
        error_fn: ScheduleError,
        journal: Journal | None = None,
        progress_fn: ProgressFn = untold,
    ) -> None:
        self.error_fn, self.journal = error_fn, Journal() if journal is None else journal
        self.progress_fn = progress_fn
        self.total = 0

    def expect(self, count: int) -> None:
        """Says that `count` more schedules will be measured."""
        self.total += count
        self.progress_fn(Progress(total=self.total))

    def __call__(self, chosen: Sequence[AnyLevel]) -> float:
        """Returns the error of a schedule."""
        found = self.journal.step("error", lambda: {"error": self.error_fn(chosen)})
        self.progress_fn(Progress(1))
        return float(found["error"])


def step_errors(measure: Measure) -> Float[np.ndarray, "S L"]:
    """Returns the error of each step alone at each level, all others at the most bits."""
    error_fn = measure.error_fn
    num_steps, most = len(error_fn.timesteps), error_fn.most
    measure.expect(num_steps * sum(level != most for level in error_fn.levels))
    errors = np.zeros((num_steps, len(error_fn.levels)))
    for step in range(num_steps):
        for number, level in enumerate(error_fn.levels):
            if level == most:
                continue
            chosen = [most] * num_steps
            chosen[step] = level
            errors[step, number] = measure(chosen)
    return errors
