"""Products of `gpu_weights`, interpreted on CPU, as JSON: a process of its own, see `interpreted_gpu.py`."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from level_products import LEVELS, W, tokens
from weight_products import allowed, kernel

from qdit_jax.kernels import gpu_check, quantized_matmul
from qdit_jax.kernels.gpu_reasons import GPU_WEIGHTS
from qdit_jax.kernels.gpu_tiles import Tiles
from qdit_jax.quant import dequantize, quantize

SMALL = Tiles(rows=64, columns=64, steps=2)
# Weights, (M, K, N), blocks.
CASES = {
    "128": (W(4, 128), (9, 256, 20), SMALL),
    "32": (W(4, 32), (9, 256, 130), SMALL),
    "64, symmetric": (W(4, 64, symmetric=True), (70, 128, 20), Tiles(96, 64, 3)),
    "96, scales in 16 bits": (W(4, 96, scale_dtype="float16"), (9, 384, 20), SMALL),
    "256, a shorter last group": (W(4, 256), (9, 384, 20), SMALL),
    "per channel": (W(4, 0), (9, 256, 1), SMALL),
    "8 bits": (W(8, 64), (9, 256, 20), SMALL),
    "8 bits per channel": (W(8, 0, symmetric=True), (9, 128, 20), Tiles(64, 128, 3)),
    "levels": (W(4, 32, **LEVELS), (9, 256, 20), SMALL),
    "symmetric levels": (W(4, 64, symmetric=True, **LEVELS), (9, 128, 20), SMALL),
}


def interpreted(x, q, tiles=SMALL, dtype=None):
    """Returns the product as the kernel computes it."""
    from jax.experimental.pallas import mosaic_gpu

    parameters = mosaic_gpu.InterpretGPUParams()
    return GPU_WEIGHTS.run(x, q, None, "simulated", dtype, tiles=tiles, interpret=parameters)


def errors(weight, sizes, tiles):
    q = quantize(kernel(*sizes[1:]), weight)
    x = jnp.asarray(tokens(*sizes[:2]), jnp.bfloat16)
    found = interpreted(x, q, tiles)
    assert (found.shape, found.dtype) == ((sizes[0], sizes[2]), jnp.bfloat16)
    return allowed(found, x, q)


def rounded_as_xla(weight):
    """Returns whether each weight is rounded as XLA rounds it."""
    q = quantize(kernel(128, 24), weight)
    found = interpreted(jnp.eye(128, dtype=jnp.bfloat16), q)
    return bool(np.array_equal(found, dequantize(q, jnp.bfloat16)))


def not_finite():
    """Returns the rows that hold NaN or infinity, and whether all others are as without them."""
    x, q = tokens(12, 128), quantize(kernel(128, 24), W(4, 32))
    clean = np.asarray(interpreted(jnp.asarray(x, jnp.bfloat16), q))
    x[6, 3], x[7, 60] = np.nan, np.inf
    found = np.asarray(interpreted(jnp.asarray(x, jnp.bfloat16), q))
    others = np.delete(found, [6, 7], 0), np.delete(clean, [6, 7], 0)
    broken = ~np.isfinite(found.astype(np.float32)).all(axis=1)
    return {
        "rows": np.flatnonzero(broken).tolist(),
        "others_equal": bool(np.array_equal(*others)),
    }


def in_32_bits():
    """Returns the greatest error of sums that are not rounded, in units of the sum of magnitudes."""
    x, q = jnp.asarray(tokens(8, 128), jnp.bfloat16), quantize(kernel(128, 8), W(4, 64))
    found = interpreted(x, q, dtype="float32")
    wide, weights = (np.asarray(a, np.float64) for a in (x, dequantize(q, jnp.bfloat16)))
    assert found.dtype == jnp.float32
    return float(np.max(np.abs(found - wide @ weights) / (np.abs(wide) @ np.abs(weights) + 1e-30)))


def derivative():
    """Returns whether the derivative is that of XLA."""
    x, q = jnp.asarray(tokens(6, 128), jnp.bfloat16), quantize(kernel(128, 8), W(4, 32))

    def slope(product):
        return jax.grad(lambda x: product(x).astype(jnp.float32).sum())(x)

    ours = slope(lambda x: interpreted(x, q))
    return bool(
        np.array_equal(ours, slope(lambda x: quantized_matmul(x, q, None, "simulated", "xla")))
    )


def main():
    found = {name: errors(*case) for name, case in CASES.items()}
    weights = [W(4, 32), W(8, 64), W(4, 32, **LEVELS)]
    found |= {
        "rounded": [rounded_as_xla(weight) for weight in weights],
        "not finite": not_finite(),
        "in 32 bits": in_32_bits(),
        "derivative": derivative(),
        "check": gpu_check.wrong_with(
            lambda x, q, dtype: interpreted(x, q, dtype=dtype), gpu_check.WEIGHTS
        ),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
