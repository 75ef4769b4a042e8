"""NSGA-II: a whole front of cost against measured error, begun from a front that was predicted.

K. Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II" (2002). For networks
whose errors do not add up, where a prediction only says where to begin.

Differs from the paper: parents are chosen from all that was ever measured, not from the last two
generations only, which costs nothing here and loses nothing; a child over the budget is made
cheaper instead of being ranked last; an assignment is never measured twice.

Dimensions: C assignments, L layers.
"""

from __future__ import annotations

import numpy as np

from qdit_jax.allocation.budget import Budget
from qdit_jax.allocation.knapsack import pareto
from qdit_jax.allocation.records import Measured
from qdit_jax.allocation.space import Space
from qdit_jax.allocation.strategies.evolution import (
    ATTEMPTS,
    EvolutionSettings,
    filled,
    repaired,
)

CROSSOVER = 0.9  # share of children that have two parents


def offspring(
    rng: np.random.Generator,
    space: Space,
    budget: Budget,
    settings: EvolutionSettings,
    measured: Measured,
) -> np.ndarray:
    """Returns the next generation: new and legal, of parents that won a tournament of two.

    A `draw_fn` of `evolve`; there are `settings.population` parents.
    """
    order = survivors(measured.cost, measured.fitness, settings.population)
    parents = measured.assignments[order]
    known = set(measured.known)
    count = settings.num_crossover + settings.num_mutation
    found: list[np.ndarray] = []
    for _ in range(ATTEMPTS * count):
        if len(found) == count:
            break
        # Survivors stand in order of merit: the smaller of two numbers wins.
        one, two = parents[rng.integers(len(parents), size=(2, 2)).min(axis=1)]
        is_crossed = rng.random() < CROSSOVER
        child = np.where(rng.random(len(one)) < 0.5, one, two) if is_crossed else one
        changes = rng.random(len(one)) < 1 / len(one)
        child = np.where(changes, rng.integers(0, space.num_choices), child)
        child = repaired(rng, child, budget)
        if child.tobytes() not in known:
            known.add(child.tobytes())
            found.append(child)
    return filled(rng, space, budget, found, count, measured.known)


def survivors(cost: np.ndarray, error: np.ndarray, count: int) -> np.ndarray:
    """Returns the numbers of the best `count`: by rank of domination, then by crowding distance."""
    left = np.arange(len(cost))
    chosen: list[np.ndarray] = []
    while len(left) and sum(map(len, chosen)) < count:
        front = left[pareto(cost[left], error[left])]
        chosen.append(front[np.argsort(-crowding(cost[front], error[front]), kind="stable")])
        left = np.setdiff1d(left, front)
    return np.concatenate([*chosen, left[:0]])[:count]


def crowding(cost: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Returns how far apart each point's neighbors on its front are; the ends are infinitely far.

    The points are sorted by cost.
    """
    distance = np.zeros(len(cost))
    distance[[0, -1]] = np.inf
    for values in (cost, error):
        if np.ptp(values) > 0:
            distance[1:-1] += np.abs(values[2:] - values[:-2]) / np.ptp(values)
    return distance
