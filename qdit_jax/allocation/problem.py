"""What a search is given and what it returns, whatever its strategy.

Dimensions: F assignments of a front, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qdit_jax.allocation.budget import Budget
from qdit_jax.allocation.evaluate import Evaluator
from qdit_jax.allocation.records import Measured, Store
from qdit_jax.allocation.sensitivity import Prediction
from qdit_jax.allocation.space import Space
from qdit_jax.types import ProgressFn


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One search: what may be chosen, what it may cost, and how choices are judged.

    Attributes:
        evaluator: measures assignments; None where predictions alone decide.
        predict_fn: sensitivities at an assignment `[L]`, or at full precision for None.
        seed: determines everything random.
        given: uniform assignments, within the budget or not, that a search may start from.
        store: keeps what was computed, or None.
    """

    space: Space
    budget: Budget
    evaluator: Evaluator | None
    predict_fn: Callable[[np.ndarray | None], Prediction]
    seed: int
    given: Sequence[np.ndarray]
    store: Store | None
    progress_fn: ProgressFn

    def needs_evaluator(self) -> Evaluator:
        """Returns the evaluator; raises `ValueError` where predictions alone should decide."""
        if self.evaluator is None:
            raise ValueError(
                "objective='predicted' measures nothing, but this strategy needs measurements; use "
                "the default strategy, or another objective."
            )
        return self.evaluator


@dataclasses.dataclass(frozen=True, eq=False)
class Front:
    """The Pareto-optimal assignments in cost and error, `[F, L]`, cheapest first.

    `error` is predicted by the default strategy, measured by the others.
    """

    assignments: np.ndarray
    cost: np.ndarray
    error: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """What a strategy found.

    Attributes:
        assignment: the best one within the budget, `[L]`.
        measured: everything that was measured.
        report: JSON-able; `num_items` and `num_predictions` count what was computed.
    """

    assignment: np.ndarray
    front: Front
    measured: Measured
    report: dict[str, Any]


@runtime_checkable
class Strategy(Protocol):
    """A way to search: settings, and what it does with a problem.

    Attributes:
        name: what people call it.
        budget: used where the caller names none.
        space: settings of `search_space` that the caller may override.
        guided: whether rollouts are guided; the release's are not.
    """

    name: str
    budget: str
    space: Mapping[str, Any]
    guided: bool

    def run(self, problem: Problem) -> Found:
        """Returns the best assignment that the strategy finds."""
