"""How many inputs each layer of a network sees in one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from qdit_jax.calibration.hessians import seen_inputs


def rows_per_sample(
    apply: Callable[..., Any], layer_type: type[nn.Module], *args: Any
) -> dict[str, int]:
    """Returns the rows of each layer's input by path, in the order in which the layers run.

    Nothing is computed; `args` are abstract arguments of a call with one sample.
    """
    rows: dict[str, int] = {}

    def count(path: str, x: Any) -> None:
        rows[path] = rows.get(path, 0) + math.prod(x.shape[:-1])

    with seen_inputs(count, layer_type, rounded=False):
        jax.eval_shape(apply, *args)
    return rows
