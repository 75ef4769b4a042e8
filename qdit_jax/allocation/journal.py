"""A journal of expensive steps: what was computed before is read back, in the same order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qdit_jax.allocation.records import Store


class Journal:
    """Results of steps in the order in which a deterministic program asks for them.

    A program that was stopped runs again from the start; steps that it had finished are read from
    the store, so it resumes where it was and ends with the same result.
    """

    def __init__(self, store: Store | None = None) -> None:
        self.store = store
        self.saved = (store.load() if store is not None else None) or {}
        self.count = 0

    def step(self, name: str, compute_fn: Callable[[], dict[str, Any]]) -> dict[str, np.ndarray]:
        """Returns the arrays of the next step, from the store or from `compute_fn`."""
        prefix = f"{self.count:04d}.{name}."
        self.count += 1
        found = {k.removeprefix(prefix): v for k, v in self.saved.items() if k.startswith(prefix)}
        if found:
            return found
        computed = {key: np.asarray(value) for key, value in compute_fn().items()}
        self.saved |= {prefix + key: value for key, value in computed.items()}
        if self.store is not None:
            self.store.save(self.saved)
        return computed
