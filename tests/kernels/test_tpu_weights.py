"""The Pallas kernel for TPUs of 16-bit inputs and packed weights, interpreted on CPU, against `xla`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from level_products import LEVELS, W, compiled, tokens
from weight_products import allowed, kernel

from qdit_jax.kernels import IMPLEMENTATIONS, Product, implementation_of, quantized_matmul
from qdit_jax.kernels.tpu_blocks import VMEM_LIMIT, chosen_blocks, vmem_bytes, weights_sizes
from qdit_jax.kernels.tpu_weights import TPU_WEIGHTS
from qdit_jax.quant import ActSpec, dequantize, formats, quantize

# Weights, and (M, K, N).
CASES = [
    (W(4, 32), (40, 64, 130)),
    (W(4, 128, symmetric=True), (9, 384, 8)),
    (W(4, 64, scale_dtype="float16"), (8, 256, 20)),  # transposed in the kernel
    (W(4, 96), (8, 160, 128)),
    (W(2, 0), (7, 77, 1)),
    (W(3, 32, symmetric=True), (33, 64, 20)),
    (W(5, 96), (8, 128, 20)),
    (W(6, 32), (8, 100, 20)),
    (W(8, 0, symmetric=True), (8, 60, 9)),
    (W(8, 64), (8, 128, 9)),
    (W(4, 32, **LEVELS), (12, 96, 20)),
    (W(3, 64, symmetric=True, **LEVELS), (8, 128, 9)),
]


interpreted = compiled(lambda x, q: TPU_WEIGHTS.run(x, q, None, "simulated", interpret=True))


@pytest.mark.parametrize(("weight", "sizes"), CASES, ids=str)
def test_the_kernel_is_the_product_of_the_rounded_weights(weight, sizes):
    q = quantize(kernel(*sizes[1:]), weight)
    x = jnp.asarray(tokens(*sizes[:2]), jnp.bfloat16)
    found = interpreted(x, q)
    assert (found.shape, found.dtype) == ((sizes[0], sizes[2]), jnp.bfloat16)
    assert max(allowed(found, x, q)) <= 1


def test_each_weight_is_rounded_as_xla_rounds_it():
    q = quantize(kernel(96, 24), W(4, 32))
    found = interpreted(jnp.eye(96, dtype=jnp.bfloat16), q)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(dequantize(q, jnp.bfloat16)))


def test_a_token_that_is_not_finite_touches_no_other():
    q = quantize(kernel(64, 24), W(4, 32))
    x = tokens(12, 64)
    clean = interpreted(jnp.asarray(x, jnp.bfloat16), q)
    x[6, 3], x[7, 60] = np.nan, np.inf
    found = np.asarray(interpreted(jnp.asarray(x, jnp.bfloat16), q), np.float32)
    assert not np.isfinite(found[[6, 7]]).any(axis=1).all()
    np.testing.assert_array_equal(
        np.delete(found, [6, 7], 0), np.delete(np.asarray(clean, np.float32), [6, 7], 0)
    )


def test_its_derivative_is_that_of_xla():
    q = quantize(kernel(64, 24), W(4, 32))
    x = jnp.asarray(tokens(8, 64), jnp.bfloat16)

    def slope(product):
        return jax.grad(lambda x: product(x).astype(jnp.float32).sum())(x)

    ours = slope(lambda x: TPU_WEIGHTS.run(x, q, None, "simulated", interpret=True))
    theirs = slope(lambda x: quantized_matmul(x, q, None, "simulated", "xla"))
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


REFUSED = [
    ({"act": ActSpec(8, 0, symmetric=True)}, "inputs that are not quantized"),
    ({"dtype": "float32"}, "bfloat16, not in float32"),
    ({"weight": W(fmt=formats.nvfp4)}, "integer weights, not nvfp4"),
    ({"weight": W(4, 48)}, "groups that are multiples of 32, not of 48"),
    ({"weight": W(4, 32, channel_group=2)}, "channel_group is 2."),
    ({"platform": "cuda"}, "it runs on TPUs only."),
]


def product(**changes):
    settings = {"weight": W(4, 128), "act": None, "numerics": "simulated", "platform": "tpu"}
    return Product(x_shape=(4096, 1152), **{**settings, "dtype": "bfloat16", **changes})


@pytest.mark.parametrize(("changes", "text"), REFUSED)
def test_what_it_refuses(changes, text, monkeypatch):
    monkeypatch.setattr("qdit_jax.kernels.tpu_reasons.machine_reason", lambda: None)
    row = IMPLEMENTATIONS["tpu_weights"]
    assert row.unsupported_reason(product()) is None
    assert text in row.unsupported_reason(product(**changes))


def test_the_table_takes_it_on_a_tpu_alone(monkeypatch):
    monkeypatch.setattr("qdit_jax.kernels.tpu_reasons.machine_reason", lambda: None)
    given = ((4096, 1152), W(4, 128), None, "simulated")
    assert implementation_of(*given, platform="tpu", dtype="bfloat16") == "tpu_weights"
    assert implementation_of(*given, platform="tpu", dtype="float32") == "xla"
    assert implementation_of(*given, platform="cpu", dtype="bfloat16") == "xla_cpu"


@pytest.mark.parametrize("sizes", [(4096, 1152, 4608), (32, 4608, 1152), (8192, 3072, 12288)])
def test_blocks_fit_into_vector_memory(sizes):
    num_rows, num_channels, width = sizes
    q = jax.eval_shape(lambda w: quantize(w, W(4, 128)), jnp.ones((num_channels, width)))
    found = weights_sizes((num_rows, num_channels), q)
    blocks = chosen_blocks(found)
    assert blocks is not None
    assert vmem_bytes(found, blocks) <= VMEM_LIMIT
    assert vmem_bytes(dataclasses.replace(found, unpacked=1), blocks) < vmem_bytes(found, blocks)
