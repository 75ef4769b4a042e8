"""Products of the kernel in groups, interpreted on CPU, as JSON: a process of its own, see `interpreted_gpu.py`."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from level_products import W, relative_errors, tokens

from qdit_jax.kernels import gpu_check, quantized_matmul
from qdit_jax.kernels.gpu_reasons import GPU_GROUPS
from qdit_jax.kernels.gpu_tiles import Tiles
from qdit_jax.quant import ActQuant, ActSpec, dequantize, quantize

SMALL = Tiles(rows=64, columns=64, steps=2)
GROUP = ActSpec(8, 128)
# Weights, (M, K, N), the inputs' dtype and quantizer, blocks.
CASES = {
    "128": (W(4, 128), (9, 256, 20), "float32", GROUP, SMALL),
    "32": (W(4, 32), (9, 256, 20), "float32", ActSpec(8, 32), SMALL),
    "64, symmetric, tokens": (
        W(4, 64, symmetric=True),
        (70, 128, 130),
        "bfloat16",
        ActSpec(8, 0, symmetric=True),
        Tiles(96, 64, 4),
    ),
    "8 bits, 96": (W(8, 96), (9, 384, 20), "float32", ActSpec(8, 96), SMALL),
    "8 bits, 192, other groups": (
        W(8, 192, scale_dtype="float16"),
        (9, 384, 20),
        "float32",
        ActSpec(8, 64, symmetric=True),
        SMALL,
    ),
    "288, 4-bit inputs": (W(4, 288), (9, 1152, 20), "float32", ActSpec(4, 288), Tiles()),
    "256, a shorter last group": (W(4, 256), (9, 384, 20), "bfloat16", ActSpec(8, 256), SMALL),
    "per channel": (W(4, 0), (9, 256, 1), "float32", ActSpec(8, 0), SMALL),
}


def interpreted(x, q, act=GROUP, tiles=SMALL, dtype=None):
    """Returns the product as the kernel computes it."""
    from jax.experimental.pallas import mosaic_gpu

    parameters = mosaic_gpu.InterpretGPUParams()
    return GPU_GROUPS.run(x, q, ActQuant(act), "integer", dtype, tiles=tiles, interpret=parameters)


def kernel(weight, num_channels, width):
    """Returns a kernel with outlier channels, one-sided, constant and zero groups."""
    rng = np.random.default_rng(weight.bits)
    w = rng.normal(size=(num_channels, width)) * rng.choice([1, 10, 50], (num_channels, 1))
    w[:, 0] = np.abs(w[:, 0]) + 1
    w[: num_channels // 2, width // 2] = 0
    w[:, width - 1] = -0.3
    return quantize(jnp.asarray(w, jnp.float32), weight)


def errors(weight, sizes, dtype, act, tiles):
    """Returns the greatest errors of kernel and XLA against float64, in units of the sum of magnitudes."""
    x, q = jnp.asarray(tokens(*sizes[:2]), dtype), kernel(weight, *sizes[1:])
    found, by_xla = jax.jit(
        lambda x, q: (
            interpreted(x, q, act, tiles),
            quantized_matmul(x, q, act, "integer", "xla"),
        )
    )(x, q)
    assert (found.shape, found.dtype) == (by_xla.shape, by_xla.dtype)
    exact = ActQuant(act)(x.astype(jnp.float32)), dequantize(q)
    return {
        name: float(relative_errors(y, by_xla, *exact)[0])
        for name, y in (("kernel", found), ("xla", by_xla))
    }


def not_finite():
    """Returns the rows that are NaN, and whether all others are as without them."""
    x, q = tokens(12, 128), kernel(W(4, 32), 128, 24)
    clean = np.asarray(interpreted(jnp.asarray(x, jnp.float32), q))
    x[6, 3], x[7, 60], x[8, 0], x[0, 5] = np.nan, np.inf, -np.inf, np.nan
    found = np.asarray(interpreted(jnp.asarray(x, jnp.float32), q))
    broken = np.isnan(found).all(axis=1)
    return {
        "rows": np.flatnonzero(broken).tolist(),
        "others_equal": bool(np.array_equal(found[~broken], clean[~broken])),
    }


def in_16_bits():
    """Returns whether sums written in 16 bits are those of XLA."""
    x, q = jnp.asarray(tokens(8, 128), jnp.float32), kernel(W(4, 64), 128, 8)
    found = interpreted(x, q, dtype="bfloat16")
    by_xla = quantized_matmul(x, q, GROUP, "integer", "xla", out_dtype="bfloat16")
    assert found.dtype == by_xla.dtype == jnp.bfloat16
    return bool(np.array_equal(found, by_xla))


def derivative():
    """Returns whether the derivative is that of XLA."""
    x, q = jnp.asarray(tokens(6, 128), jnp.float32), kernel(W(4, 32), 128, 8)
    ours = jax.grad(lambda x: interpreted(x, q).sum())(x)
    by_xla = jax.grad(lambda x: quantized_matmul(x, q, GROUP, "integer", "xla").sum())(x)
    return bool(np.array_equal(ours, by_xla))


def in_scan_and_vmap():
    """Returns the greatest difference to XLA under `vmap` inside of `scan`, in units of the greatest value."""
    x = jnp.asarray(np.stack([tokens(8, 128), tokens(8, 128, 1)]), jnp.float32)[:, 4:]
    w = np.random.default_rng(0).normal(size=(2, 128, 8)).astype(np.float32)
    q = jax.vmap(lambda w: quantize(w, W(4, 32)))(jnp.asarray(w))

    @jax.jit
    def products(q):
        step = lambda _, q: (_, jax.vmap(lambda x: interpreted(x, q))(x))  # noqa: E731
        return jax.lax.scan(step, 0, q)[1]

    found, worst = products(q), 0.0
    for index in range(2):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], q)
        by_xla = quantized_matmul(x, one, GROUP, "integer", "xla")
        worst = max(worst, float(jnp.abs(found[index] - by_xla).max() / jnp.abs(by_xla).max()))
    return worst


def main():
    found = {name: errors(*case) for name, case in CASES.items()}
    check = gpu_check.wrong_with(
        lambda x, q, dtype: interpreted(x, q, gpu_check.GROUPS.act, dtype=dtype), gpu_check.GROUPS
    )
    found |= {
        "not finite": not_finite(),
        "in 16 bits": in_16_bits(),
        "derivative": derivative(),
        "in scan and vmap": in_scan_and_vmap(),
        "check": check,
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
