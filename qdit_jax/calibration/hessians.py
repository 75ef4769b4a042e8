"""Hessians of the inputs of a network's layers, which GPTQ and AdaRound round by.

Dimensions: B batch, K input channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qdit_jax.models import seen_inputs
from qdit_jax.quant import accumulate_hessian


def input_hessians(
    apply: Callable[[], Any],
    hessians: dict[str, Any],
    weight: Float[Array, " B"],
) -> dict[str, Float[Array, "K K"]]:
    """Returns `hessians` with the float32 sums `weight x xᵀ` of one call's inputs added.

    Only the layers that `hessians` names are recorded; under jit, computations that they do not need
    are removed. `weight` is one number per sample: 0 leaves a sample of the batch out.
    """
    found = dict(hessians)

    def add(path: str, x: Float[Array, "B *T K"]) -> None:
        if path not in found:
            return
        rows = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
        rows = rows * jnp.sqrt(weight)[:, None, None]
        found[path] = accumulate_hessian(found[path], rows)

    with seen_inputs(add, quantized=True):
        apply()
    return found


def empty_hessians(params_flat: dict[str, Any], paths: Sequence[str]) -> dict[str, jax.Array]:
    """Returns zeros `[K, K]` for every path."""
    sizes = {path: math.prod(params_flat[f"{path}/kernel"].shape[:-1]) for path in paths}
    return {path: jnp.zeros((size, size), jnp.float32) for path, size in sizes.items()}
