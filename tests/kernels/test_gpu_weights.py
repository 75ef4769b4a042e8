"""The Pallas kernel for NVIDIA GPUs of 16-bit inputs and packed weights, interpreted, against float64 and XLA."""

import jax.numpy as jnp
import numpy as np
import pytest
from gpu_weight_products import CASES
from interpreted_gpu import needs_interpreter, printed
from level_products import LEVELS, W
from weight_products import kernel

from qdit_jax.kernels.gpu_floats import MAGIC, floats_of_pairs
from qdit_jax.kernels.weight_maps import maps_of
from qdit_jax.quant import code_rows, dequantize, packing, quantize


@pytest.fixture(scope="module")
def found():
    return printed("gpu_weight_products.py")


@needs_interpreter
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_product_of_the_rounded_weights(found, name):
    assert max(found[name]) <= 1


@needs_interpreter
def test_each_weight_is_rounded_as_xla_rounds_it(found):
    assert found["rounded"] == [True, True, True]


@needs_interpreter
def test_a_token_that_is_not_finite_touches_no_other(found):
    assert found["not finite"] == {"rows": [6, 7], "others_equal": True}


@needs_interpreter
def test_sums_may_be_written_in_32_bits(found):
    assert found["in 32 bits"] < 2**-20


@needs_interpreter
def test_the_derivative_is_that_of_xla(found):
    assert found["derivative"]


@needs_interpreter
def test_the_check_of_a_device_passes_in_the_interpreter(found):
    assert found["check"] is None


@pytest.mark.parametrize(
    "weight",
    [W(4, 32), W(8, 64), W(3, 32, symmetric=True), W(4, 32, **LEVELS), W(5, 0, symmetric=True)],
    ids=str,
)
def test_maps_give_the_weights_to_the_bit(weight):
    q = quantize(kernel(128, 20), weight)
    factor, zero, scale = (a if a is None else np.asarray(a, np.float32) for a in maps_of(q))
    codes = np.asarray(code_rows(q), np.float32).T
    repeats = -(-len(codes) // len(scale))
    wide = [None if a is None else np.repeat(a, repeats, axis=0) for a in (factor, zero, scale)]
    found = (codes * (1 if factor is None else wide[0]) - wide[1]) * wide[2]
    np.testing.assert_array_equal(found, dequantize(q, jnp.float32))


@pytest.mark.parametrize("bits", [4, 8])
def test_pairs_of_bytes_are_floats_without_a_conversion(bits):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (3, 128)).astype(np.uint8)
    packed = np.asarray(packing.pack(codes, bits))
    for half in range(2):
        own = packed if bits == 4 else packed[:, 64 * half : 64 * half + 64]
        pairs = jnp.asarray(own.astype(np.int32)[:, ::2] | own.astype(np.int32)[:, 1::2] << 8)
        low, high = floats_of_pairs(pairs, bits, half)
        found = np.stack([low, high], axis=-1).reshape(3, 64) - MAGIC
        np.testing.assert_array_equal(found, codes[:, 64 * half : 64 * half + 64])
