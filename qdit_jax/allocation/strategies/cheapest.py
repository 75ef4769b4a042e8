"""The cheapest assignment within an error, such as the fastest within half a decibel of groups of 128.

Dimensions: N assignments, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qdit_jax.allocation.budget import Budget, whole_cost
from qdit_jax.allocation.cost import CostFn
from qdit_jax.allocation.descent import corrected, own_errors
from qdit_jax.allocation.frugal import cheapest_additive, cheapest_joint
from qdit_jax.allocation.journal import Journal
from qdit_jax.allocation.knapsack import pareto
from qdit_jax.allocation.problem import Found, Front, Problem
from qdit_jax.allocation.sensitivity import Prediction, rank_correlation
from qdit_jax.allocation.space import Space
from qdit_jax.allocation.strategies.allocate import (
    AllocationSettings,
    MeasureFn,
    PredictFn,
    Run,
    thinned,
)
from qdit_jax.allocation.within import Within
from qdit_jax.errors import check_counts
from qdit_jax.types import Progress, ProgressFn, untold

# Predictions err, so each round aims below the limit too, and a little above.
MARGINS = (1.0, 0.98, 0.95, 0.9, 0.8, 1.03)
NEAR = 4.0  # times the limit: measured errors up to this correct the predictions
FEWEST = 8  # measured assignments that correct them in any case
NUM_TOGETHER = 3  # finalists measured at once


@dataclasses.dataclass(frozen=True)
class CheapestSettings:
    """The numbers of the search for the cheapest assignment.

    Attributes:
        num_gate: random assignments on which predictions are checked.
        num_rounds: rounds of proposals, each after a correction by what was measured.
        per_round: most assignments measured in a round.
        num_batches: batches on which they are measured; finalists are measured on all.
    """

    num_gate: int = 12
    num_rounds: int = 5
    per_round: int = 6
    num_batches: int = 4

    def __post_init__(self) -> None:
        check_counts(
            num_gate=self.num_gate,
            num_rounds=self.num_rounds,
            per_round=self.per_round,
            num_batches=self.num_batches,
        )


@dataclasses.dataclass(frozen=True)
class Cheapest:
    """The strategy that minimizes a cost within an error, in place of the error within a budget.

    Attributes:
        budget: the name of the cost.
        within: the error allowed, see `Within`.
    """

    budget: str = "bitops"
    within: str = "0.5dB-of-g128"
    settings: CheapestSettings = CheapestSettings()
    name: str = "cheapest"
    space: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    guided: bool = True

    def __post_init__(self) -> None:
        Within(self.within)  # which refuses what cannot be read

    def budget_of(self, text: str, space: Space, costs: Mapping[str, CostFn]) -> Budget:
        """Returns a budget without a limit, of the cost that `text` names."""
        Within(self.within).reference(space)
        return whole_cost(text, space, costs)

    def run(self, problem: Problem) -> Found:
        """Returns the cheapest assignment within the error that was measured."""
        evaluator, settings = problem.needs_evaluator(), self.settings
        total = evaluator.objective.num_batches
        few = min(settings.num_batches, total)
        count = len(problem.given) + 1 + len(MARGINS) + settings.num_gate
        planned = few * (count + settings.num_rounds * settings.per_round)
        planned += 0 if few == total else total * 2 * NUM_TOGETHER
        problem.progress_fn(Progress(total=planned, text="measuring sensitivities"))
        return cheapest(
            problem.space,
            problem.budget,
            evaluator,
            problem.predict_fn,
            within=Within(self.within),
            num_batches=total,
            seed=problem.seed,
            settings=settings,
            first=problem.given,
            journal=Journal(problem.store),
            progress_fn=problem.progress_fn,
        )


class CheapRun(Run):
    """A search in progress for the cheapest assignment within a share of a reference's error."""

    reference: np.ndarray
    factor: float

    @property
    def limit(self) -> float:
        """The error allowed, on the batches that every assignment is measured on."""
        rows = (self.measured.assignments == self.reference).all(axis=1)
        return self.factor * float(self.measured.fitness[rows][0])

    def within(self) -> np.ndarray:
        """Returns the numbers of measured assignments within the error, cheapest first."""
        inside = np.flatnonzero(self.measured.fitness <= self.limit)
        order = np.lexsort((self.measured.fitness[inside], self.measured.cost[inside]))
        return inside[order]

    def tell(self) -> None:
        """Reports the cheapest so far."""
        found = self.within()
        text = f"{len(self.measured.fitness)} measured, none within {self.limit:.6g}"
        best = None
        if len(found):
            best = self.budget.shown(float(self.measured.cost[found[0]]))
            text = f"{len(self.measured.fitness)} measured, cheapest within the error {best:.6g}"
        self.progress_fn(Progress(text=text, best=best))


def cheapest(
    space: Space,
    budget: Budget,
    measure_fn: MeasureFn,
    predict_fn: PredictFn,
    *,
    within: Within,
    num_batches: int,
    seed: int,
    settings: CheapestSettings | None = None,
    first: Sequence[Any] = (),
    journal: Journal | None = None,
    progress_fn: ProgressFn = untold,
) -> Found:
    """Returns the cheapest assignment found whose measured error is within a reference's.

    Predictions, corrected by all that was measured, propose the cheapest assignments just within the
    error; what is measured decides. The result is verified on all batches, as is the reference.

    Args:
        budget: the costs; its limit is not used.
        num_batches: of the objective.
        first: assignments to measure in any case.
        journal: keeps what was computed; a search that was stopped resumes from it.
        progress_fn: told one line of `text` at a time; `best` is a cost.

    Raises:
        ValueError: if no measured assignment is within the error, or the reference has none.
    """
    settings = CheapestSettings() if settings is None else settings
    few = min(settings.num_batches, num_batches)
    rungs = AllocationSettings(rungs=tuple(sorted({few, num_batches})))
    journal = Journal() if journal is None else journal
    run = CheapRun(space, budget, measure_fn, predict_fn, rungs, journal, progress_fn)
    run.reference, run.factor = within.reference(space), within.factor
    prediction = run.predict(None)
    ranks = begin(run, prediction, settings, seed, first)
    additive = ranks["additive"] >= ranks["joint"]
    for _ in range(settings.num_rounds):
        known = run.measured.known
        proposed = proposals(run, prediction, additive, settings.per_round)
        if all(assignment.tobytes() in known for assignment in proposed):
            break
        run.measure(proposed)
    winner, finalists = verified(run, within, num_batches)
    order = pareto(run.measured.cost, run.measured.fitness)
    front = Front(
        run.measured.assignments[order], run.measured.cost[order], run.measured.fitness[order]
    )
    report = {
        "within": within.text,
        "error_limit": run.limit,
        "reference": run.reference.tolist(),
        "reference_cost": float(budget.cost(run.reference)),
        "rank_correlation": ranks,
        "passed": max(ranks.values()) >= rungs.threshold,
        "finalists": finalists,
        "error_db": finalists[-1]["error_db"],
        "num_items": run.num_items,
        "num_predictions": run.num_predictions,
    }
    return Found(winner, front, run.measured, report)


def begin(
    run: CheapRun,
    prediction: Prediction,
    settings: CheapestSettings,
    seed: int,
    first: Sequence[Any],
) -> dict[str, float]:
    """Measures the reference, given, extreme and random assignments; returns how predictions rank them.

    Raises:
        ValueError: if the reference's error is not above 0.
    """
    rng = np.random.default_rng([seed, 0])
    drawn = rng.integers(0, run.space.num_choices, (settings.num_gate, len(run.space.layers)))
    best = np.array([row.argmin() for row in own_errors(prediction, run.space)], np.int32)
    given = [run.space.check(assignment) for assignment in first]
    # In the prediction's own units: how it relates to measured errors is not known yet.
    around = float(prediction.additive(run.reference)[0]) * run.factor
    found = [cheapest_additive(prediction, run.space, run.budget, m * around) for m in MARGINS]
    aimed = [assignment for assignment in found if assignment is not None]
    run.measure([run.reference, best, *given, *aimed, *drawn.astype(np.int32)])
    if run.limit <= 0:
        raise ValueError(
            f"the uniform assignment's error is {run.limit / run.factor:.6g}; within needs one above "
            "0: use another objective, or coarser groups."
        )
    rows, fitness = run.measured.assignments, run.measured.fitness
    return {
        "additive": rank_correlation(prediction.additive(rows), fitness),
        "joint": rank_correlation(prediction.joint(rows), fitness),
    }


def proposals(
    run: CheapRun, prediction: Prediction, additive: bool, count: int
) -> list[np.ndarray]:
    """Returns assignments that corrected predictions take for the cheapest within the error."""
    fitness = run.measured.fitness
    near = np.flatnonzero(fitness <= NEAR * run.limit)
    if len(near) < FEWEST:
        near = np.argsort(np.abs(fitness - run.limit), kind="stable")[:FEWEST]
    rows = run.measured.assignments[near]
    fitted = corrected(prediction, rows, fitness[near], additive=additive)
    if additive:
        found = [cheapest_additive(fitted, run.space, run.budget, m * run.limit) for m in MARGINS]
        new = [assignment for assignment in found if assignment is not None]
    else:
        inside = run.within()
        starts = [run.measured.assignments[inside[0]]] if len(inside) else []
        new = cheapest_joint(fitted, run.space, run.budget, run.limit, starts)[::-1]
    known = run.measured.known
    fresh = list({a.tobytes(): a for a in new if a.tobytes() not in known}.values())
    return thinned(fresh, count)


def verified(
    run: CheapRun, within: Within, num_batches: int
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Returns the cheapest measured assignment that is within the error on all batches.

    And what was found of each finalist, cheapest first, the winner's entry last.

    Raises:
        ValueError: if none is.
    """
    batches = range(num_batches)
    is_known = num_batches == run.settings.rungs[0]
    reference = run.limit / run.factor
    if not is_known:
        reference = float(run.fitness(run.reference[None], batches)[0])
    numbers = run.within()
    finalists: list[dict[str, Any]] = []
    for start in range(0, len(numbers), NUM_TOGETHER):
        chosen = numbers[start : start + NUM_TOGETHER]
        rows, fitness = run.measured.assignments[chosen], run.measured.fitness[chosen]
        if not is_known:
            fitness = run.fitness(rows, batches)
        for row, value in zip(rows, fitness, strict=True):
            entry = {
                "assignment": row.tolist(),
                "cost": float(run.budget.cost(row)),
                "fitness": float(value),
                "error_db": decibels(float(value) / reference),
            }
            finalists.append(entry)
            if value <= run.factor * reference:
                run.progress_fn(
                    Progress(
                        text=f"verified on {num_batches} batches: {entry['error_db']:+.2f} dB of the uniform "
                        "assignment"
                    )
                )
                return row, finalists
    least = float(run.measured.fitness.min()) * run.factor / run.limit
    raise ValueError(
        f"within={within.text!r} is out of reach: the least error measured is "
        f"{decibels(least):+.2f} dB of the uniform assignment's; allow more, or offer finer choices."
    )


def decibels(ratio: float) -> float:
    """Returns a ratio of powers in decibels."""
    return 10 * math.log10(max(ratio, 1e-30))
