"""Random search: as many assignments as an evolution measures, none of them with a parent."""

from __future__ import annotations

import numpy as np

from qdit_jax.allocation.budget import Budget
from qdit_jax.allocation.records import Measured
from qdit_jax.allocation.space import Space
from qdit_jax.allocation.strategies.evolution import EvolutionSettings, filled


def random_children(
    rng: np.random.Generator,
    space: Space,
    budget: Budget,
    settings: EvolutionSettings,
    measured: Measured,
) -> np.ndarray:
    """Returns as many new assignments as a generation has, all drawn at random."""
    count = settings.num_crossover + settings.num_mutation
    return filled(rng, space, budget, [], count, measured.known)
