"""Products of `gpu_fp8`, interpreted on CPU, as JSON: a process of its own, see `interpreted_gpu.py`."""

from __future__ import annotations

import json
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from level_products import relative_errors, tokens
from weight_products import kernel

from qdit_jax.kernels import gpu_check, gpu_fp8, quantized_matmul
from qdit_jax.kernels.gpu_reasons import GPU_FP8
from qdit_jax.kernels.gpu_tiles import Tiles
from qdit_jax.quant import ActQuant, ActSpec, WeightSpec, dequantize, formats, quantize

SMALL = Tiles(rows=64, columns=64, steps=2)
E4M3, E5M2 = formats.fp8_e4m3, formats.fp8_e5m2
# Formats of inputs and weights, the dtype of the weights' scales, (M, K, N), the inputs' dtype, blocks.
CASES = {
    "e4m3": (E4M3, E4M3, "float32", (9, 256, 20), "float32", SMALL),
    "scales in 16 bits": (E4M3, E4M3, "float16", (70, 128, 130), "float32", SMALL),
    "16 bits": (E4M3, E4M3, "float32", (70, 384, 130), "bfloat16", Tiles(96, 64, 4)),
    "e5m2": (E5M2, E5M2, "float32", (9, 256, 1), "float32", Tiles(64, 128, 4)),
    "e5m2 inputs": (E5M2, E4M3, "float32", (9, 128, 20), "float32", Tiles(128, 64, 4)),
    "e5m2 weights": (E4M3, E5M2, "bfloat16", (9, 128, 20), "float32", SMALL),
}


def token(fmt=E4M3):
    """Returns the quantizer of inputs."""
    return ActQuant(ActSpec(fmt=fmt, group_size=0))


def weights(num_channels, width, fmt=E4M3, scale_dtype="float32"):
    """Returns a kernel with outlier channels, in one scale per output channel."""
    spec = WeightSpec(fmt=fmt, group_size=0, scale_dtype=scale_dtype)
    return quantize(jnp.asarray(kernel(num_channels, width)), spec)


def interpreted(x, q, act=None, tiles=SMALL, dtype=None):
    """Returns the product as the kernel computes it."""
    from jax.experimental.pallas import mosaic_gpu

    settings = {"tiles": tiles, "interpret": mosaic_gpu.InterpretGPUParams()}
    return GPU_FP8.run(x, q, act or token(), "integer", dtype, **settings)


def errors(of_inputs, of_weights, scale_dtype, sizes, dtype, tiles):
    """Returns the greatest errors against float64, and against XLA, in units of the sum of magnitudes."""
    q, act = weights(*sizes[1:], of_weights, scale_dtype), token(of_inputs)
    x = jnp.asarray(tokens(*sizes[:2]), dtype)
    found = interpreted(x, q, act, tiles)
    assert (found.shape, found.dtype) == ((sizes[0], sizes[2]), dtype)
    by_xla = quantized_matmul(x, q, act, "integer", "xla")
    wide = act(x.astype(jnp.float32))
    return [float(error) for error in relative_errors(found, by_xla, wide, dequantize(q))]


def not_finite():
    """Returns the rows that hold NaN or infinity, and whether all others are as without them."""
    x, q = tokens(12, 128), weights(128, 24)
    clean = np.asarray(interpreted(jnp.asarray(x, jnp.float32), q))
    x[6, 3], x[7, 60], x[8, 0], x[0, 5] = np.nan, np.inf, -np.inf, np.nan
    found = np.asarray(interpreted(jnp.asarray(x, jnp.float32), q))
    broken = np.flatnonzero(np.isnan(found).all(axis=1)).tolist()
    others = np.delete(found, broken, 0), np.delete(clean, broken, 0)
    return {"rows": broken, "others_equal": bool(np.array_equal(*others))}


def by_xlas_quantizer():
    """Returns whether a product is the same where tokens do not fit into registers."""
    x, q = tokens(9, 128), weights(128, 24)
    x[6, 3] = np.nan
    x = jnp.asarray(x, jnp.float32)
    own = interpreted(x, q)
    with mock.patch.object(gpu_fp8.gpu_rows, "fits", return_value=False):
        jax.clear_caches()
        found = interpreted(x, q)
    return bool(np.array_equal(own, found, equal_nan=True))


def in_16_bits():
    """Returns whether sums are written in 16 bits as XLA rounds them."""
    x, q = jnp.asarray(tokens(8, 128), jnp.float32), weights(128, 8)
    found = interpreted(x, q, dtype="bfloat16")
    by_xla = quantized_matmul(x, q, token(), "integer", "xla", out_dtype="bfloat16")
    assert found.dtype == jnp.bfloat16
    wide = np.asarray(interpreted(x, q).astype(jnp.bfloat16), np.float32)
    near = np.allclose(found.astype(jnp.float32), by_xla.astype(jnp.float32), rtol=2**-7)
    return bool(np.array_equal(found.astype(jnp.float32), wide) and near)


def under_vmap_and_scan():
    """Returns whether products under `vmap` inside of `scan` are those of XLA, to rounding."""
    x = jnp.asarray(np.stack([tokens(8, 128), tokens(8, 128, 1)]), jnp.float32)
    w = np.random.default_rng(0).normal(size=(2, 128, 8)).astype(np.float32)
    spec = WeightSpec(fmt=E4M3, group_size=0)
    q = jax.vmap(lambda w: quantize(w, spec))(jnp.asarray(w))

    @jax.jit
    def products(q):
        step = lambda _, q: (_, jax.vmap(lambda x: interpreted(x, q))(x))  # noqa: E731
        return jax.lax.scan(step, 0, q)[1]

    found, worst = products(q), 0.0
    for index in range(2):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], q)
        by_xla = quantized_matmul(x, one, token(), "integer", "xla")
        wide, values = token()(x), dequantize(one)
        worst = max(worst, *map(float, relative_errors(found[index], by_xla, wide, values)))
    return worst


def derivative():
    """Returns whether the derivative is that of XLA."""
    x, q = jnp.asarray(tokens(6, 128), jnp.float32), weights(128, 8)
    ours = jax.grad(lambda x: interpreted(x, q).sum())(x)
    by_xla = jax.grad(lambda x: quantized_matmul(x, q, token(), "integer", "xla").sum())(x)
    return bool(np.array_equal(ours, by_xla))


def begins():
    """Returns how many products tensor cores compute, and whether the sums of each begin with 0.

    That is what keeps the error of 14 bits from growing with the channels; the interpreter has all 24.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    multiply, are_zero = gpu_callbacks.wgmma, []

    def seen(**given):
        names = ("token", "mesh_location", "thread", "acc_allocation_key_as_array")
        own = {name: given[name] for name in names}
        _, sums = gpu_callbacks.wgmma_accumulator_deref(**own, wait_n=None)
        are_zero.append(not np.any(sums))
        return multiply(**given)

    with mock.patch.object(gpu_callbacks, "wgmma", seen):
        jax.clear_caches()
        jax.block_until_ready(
            interpreted(jnp.asarray(tokens(70, 384), jnp.float32), weights(384, 20))
        )
    return [len(are_zero), all(are_zero)]


def main():
    found = {name: errors(*case) for name, case in CASES.items()}
    found |= {
        "not finite": not_finite(),
        "quantizer": by_xlas_quantizer(),
        "in 16 bits": in_16_bits(),
        "vmap": under_vmap_and_scan(),
        "derivative": derivative(),
        "begins": begins(),
        "check": gpu_check.wrong_with(
            lambda x, q, dtype: interpreted(x, q, dtype=dtype), gpu_check.FP8
        ),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
