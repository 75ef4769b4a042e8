"""Evolutionary search as Q-DiT published it (arXiv:2406.17343, section 3.2).

The first population is random; the best `num_kept` of all seen are parents; the next generation is
half crossover and half mutation; only children within the budget are measured; and so on.
A generation's draws depend on the seed, its number and what was measured before, so a
run that was stopped resumes to the same result.

Dimensions: C assignments, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from qdit_jax.allocation.budget import Budget
from qdit_jax.allocation.descent import additive_solution, own_errors
from qdit_jax.allocation.knapsack import lagrangian_front, pareto
from qdit_jax.allocation.problem import Found, Front, Problem
from qdit_jax.allocation.records import Measured
from qdit_jax.allocation.sensitivity import Prediction
from qdit_jax.allocation.space import Space
from qdit_jax.errors import check_counts
from qdit_jax.types import Progress

ATTEMPTS = 10  # attempts per wanted child, before the rest is drawn at random


@dataclasses.dataclass(frozen=True)
class EvolutionSettings:
    """The numbers of the evolution; the defaults are those of the release.

    Attributes:
        population: assignments measured first.
        num_generations: generations of children after that.
        num_kept: the best of all seen, the parents of a generation.
        num_crossover, num_mutation: children per generation.
        mutation_probability: for every layer of a mutated child.
    """

    population: int = 50
    num_generations: int = 10
    num_kept: int = 10
    num_crossover: int = 25
    num_mutation: int = 25
    mutation_probability: float = 0.1

    def __post_init__(self) -> None:
        check_counts(population=self.population, num_kept=self.num_kept)
        check_counts(
            0,
            num_generations=self.num_generations,
            num_crossover=self.num_crossover,
            num_mutation=self.num_mutation,
        )
        if not 0 <= self.mutation_probability <= 1:
            raise ValueError(f"mutation_probability={self.mutation_probability} must be in [0, 1].")


# (generator, space, budget, settings, measured) -> new legal assignments [C, L]
DrawFn = Callable[[np.random.Generator, Space, Budget, EvolutionSettings, Measured], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Evolve:
    """Generations of assignments, each measured on all samples.

    Attributes:
        draw_fn: draws a generation; the published rule if None.
        begins_predicted: whether the first population begins with the predicted front.
    """

    settings: EvolutionSettings = EvolutionSettings()
    draw_fn: DrawFn | None = None
    begins_predicted: bool = False
    name: str = "qdit-paper"
    budget: str = "bitops=1.0x-g128"
    space: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    guided: bool = True

    def run(self, problem: Problem) -> Found:
        """Returns the best assignment of all generations."""
        evaluator, settings = problem.needs_evaluator(), self.settings
        num_batches = evaluator.objective.num_batches
        children = settings.num_crossover + settings.num_mutation
        total = settings.population + settings.num_generations * children
        problem.progress_fn(Progress(total=total * num_batches))
        saved = None if problem.store is None else problem.store.load()
        measured = evolve(
            problem.space,
            problem.budget,
            evaluator,
            seed=problem.seed,
            settings=settings,
            first=() if saved else self.first(problem),
            measured=None if saved is None else Measured(**saved),
            save_fn=partial(after_generation, problem),
            draw_fn=self.draw_fn,
        )
        kept = pareto(measured.cost, measured.fitness)
        front = Front(measured.assignments[kept], measured.cost[kept], measured.fitness[kept])
        report = {
            "num_items": len(measured.fitness) * num_batches,
            "num_predictions": int(self.begins_predicted),
        }
        return Found(measured.best, front, measured, report)

    def first(self, problem: Problem) -> list[np.ndarray]:
        """Returns the assignments that the first population begins with."""
        uniform = [a for a in problem.given if problem.budget.allows(a)]
        if not self.begins_predicted:
            return uniform
        problem.progress_fn(Progress(text="measuring sensitivities"))
        count = self.settings.population // 2
        return (
            predicted_front(problem.predict_fn(None), problem.space, problem.budget, count)
            + uniform
        )


def after_generation(problem: Problem, measured: Measured) -> None:
    """Saves what was measured and reports it."""
    if problem.store is not None:
        problem.store.save(measured.arrays())
    text = f"generation {measured.num_rounds - 1}: {len(measured.fitness)} measured"
    best = float(measured.fitness.min())
    problem.progress_fn(Progress(text=f"{text}, best {best:.6g}", best=best))


def predicted_front(
    prediction: Prediction, space: Space, budget: Budget, count: int
) -> list[np.ndarray]:
    """Returns at most `count` legal assignments of the predicted front, the knapsack's first."""
    front = lagrangian_front(own_errors(prediction, space), list(budget.table))[0]
    legal = front[budget.allows(front)]
    spread = np.unique(np.linspace(0, len(legal) - 1, max(count - 1, 1)).round().astype(int))
    return [additive_solution(prediction, space, budget).assignment, *legal[spread]][:count]


def evolve(
    space: Space,
    budget: Budget,
    fitness_fn: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int,
    settings: EvolutionSettings | None = None,
    first: Sequence[Any] = (),
    measured: Measured | None = None,
    save_fn: Callable[[Measured], Any] = lambda measured: None,
    draw_fn: DrawFn | None = None,
) -> Measured:
    """Returns all assignments measured, `.best` among them.

    Args:
        fitness_fn: `[C, L] -> [C]`, lower is better.
        first: assignments of the first population, such as uniform ones; the rest is random.
        measured: what an earlier run had saved, to resume from.
        save_fn: called after every generation.
        draw_fn: draws a generation: `children` (the published rule, if None),
            `random_draw.random_children`, or `nsga.offspring`.

    Raises:
        ValueError: if an assignment of `first` does not fit space and budget.
    """
    settings = EvolutionSettings() if settings is None else settings
    draw_fn = children if draw_fn is None else draw_fn
    measured = Measured.none(space) if measured is None else measured
    for generation in range(measured.num_rounds, settings.num_generations + 1):
        rng = np.random.default_rng([seed, generation])
        if generation == 0:
            drawn = first_population(rng, space, budget, settings.population, first)
        else:
            drawn = draw_fn(rng, space, budget, settings, measured)
        if not len(drawn):
            break  # Every legal assignment has been measured.
        measured = measured.extended(drawn, fitness_fn(drawn), budget.cost(drawn))
        save_fn(measured)
    return measured


def first_population(
    rng: np.random.Generator, space: Space, budget: Budget, count: int, first: Sequence[Any]
) -> np.ndarray:
    given = [space.check(assignment) for assignment in first][:count]
    for assignment in given:
        if not budget.allows(assignment):
            raise ValueError(
                f"the assignment {assignment.tolist()} costs {budget.cost(assignment):.6g}, more "
                f"than budget={budget.text!r} allows ({budget.limit:.6g})."
            )
    unique = list({a.tobytes(): a for a in given}.values())
    return filled(rng, space, budget, unique, count, set())


def children(
    rng: np.random.Generator,
    space: Space,
    budget: Budget,
    settings: EvolutionSettings,
    measured: Measured,
) -> np.ndarray:
    """Returns the next generation: new, legal, mutations first, then crossovers, then random."""
    parents = measured.assignments[measured.order[: settings.num_kept]]

    def mutated() -> np.ndarray:
        parent = parents[rng.integers(len(parents))]
        changes = rng.random(len(parent)) < settings.mutation_probability
        return np.where(changes, rng.integers(0, space.num_choices), parent)

    def crossed() -> np.ndarray:
        pair = parents[rng.integers(len(parents), size=2)]
        return np.where(rng.random(len(pair[0])) < 0.5, *pair)

    found: list[np.ndarray] = []
    known = set(measured.known)
    wanted = ((mutated, settings.num_mutation), (crossed, settings.num_crossover))
    for draw, count in wanted:
        target = len(found) + count
        for _ in range(ATTEMPTS * count):
            if len(found) == target:
                break
            child = draw().astype(np.int32)
            if child.tobytes() not in known and budget.allows(child):
                known.add(child.tobytes())
                found.append(child)
    total = settings.num_mutation + settings.num_crossover
    return filled(rng, space, budget, found, total, measured.known)


def filled(
    rng: np.random.Generator,
    space: Space,
    budget: Budget,
    given: list[np.ndarray],
    count: int,
    known: set[bytes],
) -> np.ndarray:
    """Returns `given` and new random legal assignments, `count` in all if there are so many."""
    found = list(given)
    known = known | {a.tobytes() for a in found}
    for _ in range(ATTEMPTS * max(count - len(found), 0)):
        if len(found) >= count:
            break
        drawn = random_legal(rng, space, budget)
        if drawn.tobytes() not in known:
            known.add(drawn.tobytes())
            found.append(drawn)
    return np.array(found, np.int32).reshape(-1, len(space.layers))


def random_legal(rng: np.random.Generator, space: Space, budget: Budget) -> np.ndarray:
    """Returns a random assignment within the budget.

    Differs from Q-DiT, which draws until one is legal: at equal bit operations a uniform draw over
    112 layers practically never is, so random layers move to their next cheaper choice until it
    fits.
    """
    return repaired(rng, rng.integers(0, space.num_choices), budget)


def repaired(rng: np.random.Generator, drawn: np.ndarray, budget: Budget) -> np.ndarray:
    """Returns `drawn` with random layers moved to their next cheaper choice until it is legal."""
    drawn = drawn.astype(np.int32)
    while not budget.allows(drawn):
        cheaper = [next_cheaper(row, i) for row, i in zip(budget.table, drawn, strict=True)]
        layer = rng.choice(np.flatnonzero([choice is not None for choice in cheaper]))
        drawn[layer] = cheaper[layer]
    return drawn


def next_cheaper(costs: np.ndarray, choice: np.integer | int) -> int | None:
    """Returns the dearest of the choices that are cheaper than `choice`, or None."""
    below = np.where(costs < costs[choice], costs, -np.inf)
    best = int(np.argmax(below))
    return best if np.isfinite(below[best]) else None
