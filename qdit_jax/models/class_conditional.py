"""What networks of class labels answer about their condition."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qdit_jax.types import Condition, Params


class ClassConditional:
    """The part of `models.Network` that is the same for all networks of class labels.

    Attributes:
        num_classes: without the null class.
        null_class: whether the table of labels ends with a row for "no label".
    """

    num_classes: int
    null_class: bool

    @property
    def has_null(self) -> bool:
        """Returns whether the label table has a row for no label."""
        return self.null_class

    def example_condition(self, batch: int) -> jax.ShapeDtypeStruct | None:
        """Returns abstract labels."""
        return jax.ShapeDtypeStruct((batch,), jnp.int32)

    def all_conditions(self) -> np.ndarray | None:
        """Returns the label of every class."""
        return np.arange(self.num_classes, dtype=np.int32)

    def null_condition(self, condition: Condition, params: Params) -> Array | None:
        """Returns the null class for every label; None if the network was trained without one."""
        if not self.null_class:
            return None
        return jnp.full_like(jnp.asarray(condition), self.num_classes)

    def check_condition(self, condition: Condition) -> None:
        """Raises `ValueError` if there is no label, or one is out of range."""
        labels: Any = np.asarray(condition)
        last = self.num_classes - 1 + self.null_class
        if labels.ndim != 1 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"labels={labels!r} is not a list of class numbers; give one per sample."
            )
        if bad := sorted({int(i) for i in labels if not 0 <= i <= last}):
            null = f" ({last} is the null class)" if self.null_class else ""
            raise ValueError(f"label {bad[0]} is out of range; this model knows 0 to {last}{null}.")
