"""The table of search strategies: a new one is one file and one row here."""

from __future__ import annotations

import dataclasses
from typing import Any

from qdit_jax.allocation.problem import Strategy
from qdit_jax.allocation.strategies.allocate import Allocate
from qdit_jax.allocation.strategies.cheapest import Cheapest
from qdit_jax.allocation.strategies.evolution import Evolve
from qdit_jax.allocation.strategies.nsga import offspring
from qdit_jax.allocation.strategies.random_draw import random_children
from qdit_jax.allocation.strategies.release import QDIT_RELEASE

STRATEGIES: dict[str, Any] = {
    row.name: row
    for row in (
        Allocate(),
        Evolve(name="nsga2", draw_fn=offspring, begins_predicted=True),
        Evolve(),
        QDIT_RELEASE,
        Cheapest(),
        Evolve(name="random", draw_fn=random_children),
    )
}


def strategy_named(name: str | Strategy, settings: object = None) -> Strategy:
    """Returns the strategy of that name, with other `settings` if given.

    A strategy given instead of a name is returned as it is.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if the settings are not of the strategy's kind.
    """
    if not isinstance(name, str):
        return name
    if name not in STRATEGIES:
        raise ValueError(f"strategy={name!r} is not known; use one of {', '.join(STRATEGIES)}.")
    strategy = STRATEGIES[name]
    if settings is None:
        return strategy
    if type(settings) is not type(strategy.settings):
        raise TypeError(
            f"settings={settings!r} are not {type(strategy.settings).__name__}, as strategy "
            f"{name!r} needs."
        )
    return dataclasses.replace(strategy, settings=settings)
