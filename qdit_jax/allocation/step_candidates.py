"""Schedules that are worth measuring beside the one that a sum of errors predicts to be the best.

Dimensions: S steps, L levels; a schedule is the numbers of its levels, `[S]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from qdit_jax.allocation.knapsack import solve

Schedule = tuple[int, ...]
EXCHANGED = "two steps exchanged"  # of a neighbor
SLACK = 1e-9  # of a budget, for sums of floats


def candidates(
    errors: Float[np.ndarray, "S L"],
    costs: Sequence[float],
    mean_cost: float,
    num_neighbors: int,
) -> dict[Schedule, str]:
    """Returns the schedules to measure within a budget, each with what it is.

    The exact solution of the summed errors first; then its neighbors, two steps exchanged, those of
    the least sums; then the simple ones: one level throughout, and the more bits in the last,
    the first, the outer or the inner steps.

    Args:
        costs: of every level.
        mean_cost: at most so much on average over the steps.

    Raises:
        ValueError: if even the least cost is above `mean_cost`.
    """
    num_steps = len(errors)
    limit = mean_cost * num_steps
    table = [np.array(costs)] * num_steps
    best = solve(list(errors), table, float(limit), slack=SLACK).assignment
    found = {tuple(best.tolist()): "least predicted"}
    for schedule in neighbors(best, errors, num_neighbors):
        found.setdefault(schedule, EXCHANGED)
    for schedule, name in simple(num_steps, costs, limit):
        found.setdefault(schedule, name)
    return found


def neighbors(
    best: Int[np.ndarray, " S"], errors: Float[np.ndarray, "S L"], count: int
) -> list[Schedule]:
    """Returns the schedules with the levels of two steps exchanged, those of the least sums first."""
    found = []
    for i, j in itertools.combinations(range(len(best)), 2):
        if best[i] == best[j]:
            continue
        swapped = best.copy()
        swapped[[i, j]] = best[[j, i]]
        total = errors[np.arange(len(best)), swapped].sum()
        found.append((float(total), tuple(swapped.tolist())))
    return [schedule for _, schedule in sorted(found)[:count]]


def simple(num_steps: int, costs: Sequence[float], limit: float) -> Iterator[tuple[Schedule, str]]:
    """Yields the schedules that need no measurement to think of, for every pair of levels.

    The dearer of two levels has as many steps as the budget allows.
    """
    for level, cost in enumerate(costs):
        if cost * num_steps <= limit + SLACK:
            yield (level,) * num_steps, "one level"
    for low, high in itertools.permutations(range(len(costs)), 2):
        if costs[low] >= costs[high]:
            continue
        count = int((limit + SLACK - costs[low] * num_steps) // (costs[high] - costs[low]))
        count = min(count, num_steps)
        if count < 1:
            continue
        before = (count + 1) // 2  # of the outer steps
        start = (num_steps - count) // 2  # of the inner steps
        places = {
            "more bits last": range(num_steps - count, num_steps),
            "more bits first": range(count),
            "more bits at both ends": [
                *range(before),
                *range(num_steps - count + before, num_steps),
            ],
            "more bits in the middle": range(start, start + count),
        }
        for name, place in places.items():
            chosen = np.full(num_steps, low)
            chosen[list(place)] = high
            yield tuple(chosen.tolist()), name
