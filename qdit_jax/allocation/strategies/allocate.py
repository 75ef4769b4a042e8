"""The default strategy: sensitivities, exact knapsack, re-estimation, paired verification.

Dimensions: N assignments, L layers, J batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qdit_jax.allocation.budget import Budget
from qdit_jax.allocation.descent import additive_solution, corrected, descend, own_errors
from qdit_jax.allocation.journal import Journal
from qdit_jax.allocation.knapsack import lagrangian_front
from qdit_jax.allocation.problem import Found, Front, Problem
from qdit_jax.allocation.records import Measured
from qdit_jax.allocation.sensitivity import Prediction, rank_correlation
from qdit_jax.allocation.space import Space
from qdit_jax.allocation.strategies.evolution import random_legal
from qdit_jax.errors import check_counts
from qdit_jax.types import Progress, ProgressFn, untold

# (assignments [N, L], batches) -> fitness [N]
MeasureFn = Callable[[np.ndarray, Sequence[int]], np.ndarray]
# The prediction linearized at an assignment [L], or at full precision.
PredictFn = Callable[[np.ndarray | None], Prediction]


@dataclasses.dataclass(frozen=True)
class AllocationSettings:
    """The numbers of the default search.

    Attributes:
        num_gate: random assignments on which predictions are checked.
        num_estimates: how often sensitivities are measured again, at the best assignment so far.
        num_rounds: rounds of regression on measured errors when predictions are not good enough.
        per_round: assignments measured after each estimate and in each round.
        threshold: the rank correlation that counts as good enough.
        num_finalists: assignments that enter the verification.
        rungs: number of batches in each round of the verification; each round keeps the best third.
    """

    num_gate: int = 30
    num_estimates: int = 2
    num_rounds: int = 4
    per_round: int = 8
    threshold: float = 0.9
    num_finalists: int = 9
    rungs: tuple[int, ...] = (1, 4, 16)

    def __post_init__(self) -> None:
        check_counts(num_gate=self.num_gate, num_finalists=self.num_finalists)
        check_counts(
            0,
            num_estimates=self.num_estimates,
            num_rounds=self.num_rounds,
            per_round=self.per_round,
        )
        for rung in self.rungs or (0,):
            check_counts(rungs=rung)

    def fitted(self, num_batches: int) -> AllocationSettings:
        """Returns the settings with rungs of at most `num_batches`, the last exactly that."""
        rungs = sorted({min(rung, num_batches) for rung in self.rungs} | {num_batches})
        return dataclasses.replace(self, rungs=tuple(rungs))

    def planned_items(self, num_given: int) -> int:
        """Returns about how many items (assignments times batches) a search measures at most."""
        first = num_given + self.num_gate + 3 * (1 + num_given)
        first += self.per_round * (self.num_estimates + self.num_rounds)
        later, left = 0, self.num_finalists
        for rung in self.rungs[1:]:
            later += left * rung
            left = max(2, -(-left // 3))
        return first * self.rungs[0] + later


@dataclasses.dataclass(frozen=True)
class Allocate:
    """The default strategy: predictions propose, measurements on paired samples decide.

    Where the problem has no evaluator, predictions alone decide.
    """

    settings: AllocationSettings = AllocationSettings()
    name: str = "default"
    budget: str = "bitops=1.0x-g128"
    space: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    guided: bool = True

    def run(self, problem: Problem) -> Found:
        """Returns the allocation of least error that was measured, or predicted."""
        journal = Journal(problem.store)
        if problem.evaluator is None:
            problem.progress_fn(Progress(total=0, text="measuring sensitivities"))
            found = predicted_only(
                problem.space,
                problem.budget,
                problem.predict_fn,
                first=problem.given,
                journal=journal,
            )
            text = "rank correlation not checked: nothing is measured by this objective"
            problem.progress_fn(Progress(text=text))
            return found
        settings = self.settings.fitted(problem.evaluator.objective.num_batches)
        total = settings.planned_items(len(problem.given))
        problem.progress_fn(Progress(total=total, text="measuring sensitivities"))
        return allocate(
            problem.space,
            problem.budget,
            problem.evaluator,
            problem.predict_fn,
            seed=problem.seed,
            settings=settings,
            first=problem.given,
            journal=journal,
            progress_fn=problem.progress_fn,
        )


class Run:
    """One default search in progress: what is known, and the journal of what was computed."""

    def __init__(
        self,
        space: Space,
        budget: Budget,
        measure_fn: MeasureFn,
        predict_fn: PredictFn,
        settings: AllocationSettings,
        journal: Journal,
        progress_fn: ProgressFn,
    ) -> None:
        self.space, self.budget, self.settings = space, budget, settings
        self.measure_fn, self.predict_fn = measure_fn, predict_fn
        self.journal, self.progress_fn = journal, progress_fn
        self.measured = Measured.none(space)
        self.num_items = 0  # pairs of an assignment and a batch, read from the journal or not
        self.num_predictions = 0

    def predict(self, base: np.ndarray | None) -> Prediction:
        """Returns the prediction at `base`, from the journal if it was computed before."""
        self.num_predictions += 1
        arrays = self.journal.step("prediction", lambda: dataclasses.asdict(self.predict_fn(base)))
        return Prediction(float(arrays["constant"]), arrays["linear"], arrays["gram"])

    def measure(self, assignments: Sequence[np.ndarray]) -> None:
        """Measures assignments not known yet on the first rung and adds them as a round."""
        known = self.measured.known
        # A dict keeps the order and drops repetitions.
        new = list({a.tobytes(): a for a in assignments if a.tobytes() not in known}.values())
        if not new:
            return
        rows = np.array(new, np.int32)
        batches = range(self.settings.rungs[0])
        fitness = self.fitness(rows, batches)
        self.measured = self.measured.extended(rows, fitness, self.budget.cost(rows))
        self.tell()

    def tell(self) -> None:
        """Reports the best so far."""
        legal = self.legal()
        if len(legal):
            best = float(self.measured.fitness[legal].min())
            text = f"{len(self.measured.fitness)} measured, best {best:.6g}"
            self.progress_fn(Progress(text=text, best=best))

    def fitness(self, rows: np.ndarray, batches: Sequence[int]) -> np.ndarray:
        """Returns measured fitness, from the journal if it was measured before."""
        self.num_items += len(rows) * len(batches)
        return self.journal.step("fitness", lambda: {"fitness": self.measure_fn(rows, batches)})[
            "fitness"
        ]

    def legal(self) -> np.ndarray:
        """Returns the numbers of measured assignments within the budget, best first."""
        order = self.measured.order
        return order[self.budget.allows(self.measured.assignments[order])]

    @property
    def best(self) -> np.ndarray:
        """Returns the best measured assignment within the budget."""
        return self.measured.assignments[self.legal()[0]]


def allocate(
    space: Space,
    budget: Budget,
    measure_fn: MeasureFn,
    predict_fn: PredictFn,
    *,
    seed: int,
    settings: AllocationSettings | None = None,
    first: Sequence[Any] = (),
    journal: Journal | None = None,
    progress_fn: ProgressFn = untold,
) -> Found:
    """Returns the allocation of least measured error that predictions and measurements find.

    Args:
        first: assignments to measure in any case, such as uniform ones, legal or not; those within
            the budget may win.
        journal: keeps what was computed; a search that was stopped resumes from it.
        progress_fn: told one line of `text` at a time, and the `best` error.
    """
    settings = AllocationSettings() if settings is None else settings
    journal = Journal() if journal is None else journal
    run = Run(space, budget, measure_fn, predict_fn, settings, journal, progress_fn)
    prediction = run.predict(None)
    front, front_cost, front_error = lagrangian_front(
        own_errors(prediction, space), list(budget.table)
    )
    solution = additive_solution(prediction, space, budget)
    given = [space.check(assignment) for assignment in first]
    report = gate(run, prediction, given, seed)
    # Descent finds local optima: the joint error has cross terms that the knapsack cannot see.
    starts = [solution.assignment, *(a for a in given if budget.allows(a))]
    proposals = [solution.assignment]
    for start in starts:
        proposals += thinned(descend(prediction, space, budget, start), 3)
    run.measure(proposals)
    # The quadratic model holds near its base, so it is linearized again at the best so far.
    for _ in range(settings.num_estimates):
        around = run.predict(run.best)
        moves = [additive_solution(around, space, budget).assignment]
        moves += thinned(descend(around, space, budget, run.best), settings.per_round - 1)
        run.measure(moves)
        prediction = around
    if not report["passed"]:
        lean_on_measurements(run, prediction, report, seed)
    winner, finalists = halving(run)
    report |= {
        "knapsack": solution.assignment.tolist(),
        "knapsack_gap": solution.gap,
        "finalists": finalists,
        "num_items": run.num_items,
        "num_predictions": run.num_predictions,
    }
    return Found(winner, Front(front, front_cost, front_error), run.measured, report)


def gate(
    run: Run, prediction: Prediction, given: Sequence[np.ndarray], seed: int
) -> dict[str, Any]:
    """Returns how well predictions rank random legal assignments, as a part of the report.

    `passed` says whether the additive prediction's rank correlation reaches the threshold.
    """
    rng = np.random.default_rng([seed, 0])
    drawn = [random_legal(rng, run.space, run.budget) for _ in range(run.settings.num_gate)]
    run.measure([*given, *drawn])
    # Only the random ones count, not `given`.
    chosen = {a.tobytes() for a in drawn}
    rows = [i for i, a in enumerate(run.measured.assignments) if a.tobytes() in chosen]
    assignments, fitness = run.measured.assignments[rows], run.measured.fitness[rows]
    found = {
        "additive": rank_correlation(prediction.additive(assignments), fitness),
        "joint": rank_correlation(prediction.joint(assignments), fitness),
    }
    passed = found["additive"] >= run.settings.threshold
    run.progress_fn(
        Progress(
            text=f"rank correlation of predicted and measured error on {len(rows)} random assignments: "
            f"additive {found['additive']:.2f}, with terms between layers {found['joint']:.2f}"
        )
    )
    if not passed:
        run.progress_fn(
            Progress(
                text=f"below {run.settings.threshold:g}: the sum of single-layer errors does not rank "
                "assignments of this model; leaning on measured joint errors instead"
            )
        )
    return {"rank_correlation": found, "passed": passed, "num_gate": len(rows)}


def lean_on_measurements(
    run: Run, prediction: Prediction, report: dict[str, Any], seed: int
) -> None:
    """Measures further rounds of assignments, proposed by a regression on all measured errors."""
    for number in range(run.settings.num_rounds):
        rng = np.random.default_rng([seed, 1 + number])
        before = run.measured
        # The better ranked of the two predictions is what the regression corrects.
        additive = report["rank_correlation"]["additive"] > report["rank_correlation"]["joint"]
        fitted = corrected(prediction, before.assignments, before.fitness, additive=additive)
        moves = thinned(
            descend(fitted, run.space, run.budget, run.best), run.settings.per_round // 2
        )
        known = before.known | {a.tobytes() for a in moves}
        for _ in range(10 * run.settings.per_round):
            if len(moves) >= run.settings.per_round:
                break
            # One of the four best, with about two layers changed.
            parent = before.assignments[run.legal()[rng.integers(min(4, len(run.legal())))]]
            changes = rng.random(len(parent)) < 2 / len(parent)
            child = np.where(changes, rng.integers(0, run.space.num_choices), parent)
            child = child.astype(np.int32)
            if child.tobytes() not in known and run.budget.allows(child):
                known.add(child.tobytes())
                moves.append(child)
        run.measure(moves)


def thinned(path: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Returns at most `count` of a path's assignments: the first, the last, spread in between."""
    if len(path) <= count:
        return list(path)
    return [path[i] for i in np.unique(np.geomspace(1, len(path), count).round().astype(int) - 1)]


def halving(run: Run) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Returns the winner among the best measured, and what each rung of verification found."""
    numbers = run.legal()[: run.settings.num_finalists]
    left = run.measured.assignments[numbers]
    rounds = []
    for rung, count in enumerate(run.settings.rungs[1:]):
        fitness = run.fitness(left, range(count))
        order = np.argsort(fitness, kind="stable")
        rounds.append(
            {
                "batches": count,
                "assignments": left[order].tolist(),
                "fitness": fitness[order].tolist(),
            }
        )
        text = f"{len(left)} finalists on {count} batches: best {fitness.min():.6g}"
        run.progress_fn(Progress(text=text))
        is_last = rung == len(run.settings.rungs) - 2
        # Successive halving, by three: fewer finalists on more batches.
        left = left[order[: 1 if is_last else max(2, -(-len(left) // 3))]]
    return left[0], rounds


def predicted_only(
    space: Space,
    budget: Budget,
    predict_fn: PredictFn,
    *,
    first: Sequence[Any] = (),
    journal: Journal | None = None,
) -> Found:
    """Returns the allocation of least predicted error; nothing is measured."""
    journal = Journal() if journal is None else journal
    arrays = journal.step("prediction", lambda: dataclasses.asdict(predict_fn(None)))
    prediction = Prediction(float(arrays["constant"]), arrays["linear"], arrays["gram"])
    front, cost, error = lagrangian_front(own_errors(prediction, space), list(budget.table))
    solution = additive_solution(prediction, space, budget)
    starts = [solution.assignment, *(a for a in map(space.check, first) if budget.allows(a))]
    # The end of a descent, or its start where no move helps.
    ends = [[start, *descend(prediction, space, budget, start)][-1] for start in starts]
    best = ends[int(np.argmin(prediction.joint(np.array(ends))))]
    report = {
        "knapsack": solution.assignment.tolist(),
        "knapsack_gap": solution.gap,
        "predicted_error": float(prediction.joint(best)[0]),
        "num_items": 0,
        "num_predictions": 1,
    }
    return Found(best, Front(front, cost, error), Measured.none(space), report)
