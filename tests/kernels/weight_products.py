"""Products of 16-bit inputs with packed weights, whatever the machine: operands, and errors in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from qdit_jax.kernels import quantized_matmul
from qdit_jax.quant import dequantize


def kernel(num_channels, width):
    """Returns weights with outlier channels, a constant column and groups all zero or one-sided."""
    w = np.random.default_rng(width).normal(size=(num_channels, width)).astype(np.float32)
    w[::13] *= 30
    w[:, 0] = 0.7
    w[:32, -1] = 0
    w[32:64, -1] = np.abs(w[32:64, -1]) + 5
    return w


def allowed(found, x, q):
    """Returns the greatest errors of a bfloat16 product against float64, and against XLA's half as much.

    In units of what is allowed: half a unit of the rounded result, and what float32 sums differ by.
    """
    by_xla = np.asarray(quantized_matmul(x, q, None, "simulated", "xla"), np.float64)
    wide, weights = (np.asarray(a, np.float64) for a in (x, dequantize(q, jnp.bfloat16)))
    unit = np.abs(wide) @ np.abs(weights) + np.finfo(np.float32).tiny
    exact, found = wide @ weights, np.asarray(found, np.float64)
    half = np.abs(exact) * 2**-8 + unit * 2**-20
    errors = np.abs(found - exact) / half, np.abs(found - by_xla) / (2 * half)
    return [float(error.max()) for error in errors]
