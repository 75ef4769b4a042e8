"""The least cost within an error: the knapsack with errors and costs in each other's place.

Dimensions: L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qdit_jax.allocation.budget import Budget
from qdit_jax.allocation.descent import additive_solution, descend, own_errors
from qdit_jax.allocation.knapsack import solve
from qdit_jax.allocation.sensitivity import Prediction
from qdit_jax.allocation.space import Space

NUM_BISECTIONS = 14
ROUNDING = 1e-9


def cheapest_additive(
    prediction: Prediction, space: Space, budget: Budget, limit: float
) -> np.ndarray | None:
    """Returns the cheapest assignment whose additive error is at most `limit`, or None: exact.

    Without terms between layers, bisecting on the budget over the knapsack's solutions ends here: the
    knapsack does not know which of its two sums is called the error.
    """
    errors = own_errors(prediction, space)
    room = limit - prediction.constant
    slack = ROUNDING * sum(float(np.abs(row).max()) for row in errors)
    if sum(row.min() for row in errors) > room + slack:
        return None
    return solve(list(budget.table), errors, room, slack=slack).assignment


def cheapest_joint(
    prediction: Prediction,
    space: Space,
    budget: Budget,
    limit: float,
    starts: Sequence[np.ndarray] = (),
) -> list[np.ndarray]:
    """Returns assignments near the cheapest whose joint error is at most `limit`, that one last.

    Bisects on the budget; within each, the knapsack's solution, and `starts` that are legal, descend
    on the joint prediction. Empty if not even the whole budget suffices.
    """
    low, high = budget.least, budget.most
    visited: list[np.ndarray] = []
    found = None
    for number in range(NUM_BISECTIONS):
        middle = high if number == 0 else (low + high) / 2
        tight = dataclasses.replace(budget, limit=middle)
        tried = least_joint(prediction, space, tight, [*starts, *visited[-1:]])
        visited.append(tried)
        if prediction.joint(tried)[0] <= limit * (1 + ROUNDING):
            found, high = tried, min(middle, float(budget.cost(tried)))
        elif number == 0:
            return []
        else:
            low = middle
        if high - low <= ROUNDING * max(abs(high), abs(low)):
            break
    assert found is not None
    return [*(a for a in visited if a.tobytes() != found.tobytes()), found]


def least_joint(
    prediction: Prediction, space: Space, budget: Budget, starts: Sequence[np.ndarray]
) -> np.ndarray:
    """Returns the assignment of least joint error that descents within the budget find."""
    begun = [additive_solution(prediction, space, budget).assignment]
    begun += [start for start in starts if budget.allows(start)]
    ends = [[start, *descend(prediction, space, budget, start)][-1] for start in begun]
    return ends[int(np.argmin(prediction.joint(np.array(ends))))]
