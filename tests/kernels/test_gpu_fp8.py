"""The Pallas kernel for NVIDIA GPUs of FP8 on both sides, interpreted, against float64 and XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_sums import errors, narrow_sums
from gpu_fp8_products import CASES
from interpreted_gpu import needs_interpreter, printed

from qdit_jax.kernels import gpu_check, gpu_fp8
from qdit_jax.quant import WeightSpec, dequantize, formats, quantize


@pytest.fixture(scope="module")
def found():
    return printed("gpu_fp8_products.py")


@needs_interpreter
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_product_of_the_rounded_operands(found, name):
    ulp = {"float32": 2**-23, "bfloat16": 2**-8}[CASES[name][4]]
    assert max(found[name]) < 4 * ulp


@needs_interpreter
def test_a_token_that_is_not_finite_is_nan_and_touches_no_other(found):
    assert found["not finite"] == {"rows": [0, 6, 7, 8], "others_equal": True}


@needs_interpreter
def test_wide_tokens_are_quantized_by_xla_to_the_same(found):
    assert found["quantizer"]


@needs_interpreter
def test_sums_are_written_in_16_bits_at_once(found):
    assert found["in 16 bits"]


@needs_interpreter
def test_works_under_vmap_inside_of_scan(found):
    assert found["vmap"] < 2**-20


@needs_interpreter
def test_the_derivative_is_that_of_xla(found):
    assert found["derivative"]


@needs_interpreter
def test_every_run_of_128_channels_has_sums_of_its_own(found):
    """70 rows are two blocks, of two warpgroups each, and 384 channels three runs."""
    assert found["begins"] == [2 * 2 * 3, True]


@needs_interpreter
def test_the_check_of_a_device_passes_in_the_interpreter(found):
    assert found["check"] is None


@pytest.mark.parametrize("fmt", [formats.fp8_e4m3, formats.fp8_e5m2], ids=lambda fmt: fmt.name)
def test_stored_bytes_are_the_elements(fmt):
    w = np.random.default_rng(0).normal(size=(128, 20)).astype(np.float32)
    q = quantize(w, WeightSpec(fmt=fmt, group_size=0))
    found = np.asarray(gpu_fp8.weight_elements(q, 128), np.float32)
    assert found.shape == (128, 128)
    np.testing.assert_array_equal(found[:20].T * np.asarray(q.scale), dequantize(q))
    np.testing.assert_array_equal(found[20:], 0)


def test_the_check_of_a_device_has_sums_that_14_bits_hold():
    rng, (rows, channels, width) = np.random.default_rng(0), gpu_check.SIZES
    check = gpu_check.FP8
    x = check.inputs_fn(rng, check.act, rows, channels).astype(np.float64)
    _, values = check.kernel_fn(rng, 8, channels, width)
    for start in range(0, channels, 128):
        run = slice(start, start + 128)
        np.testing.assert_array_equal(
            narrow_sums(x[:, run], values[:, run]), x[:, run] @ values[:, run].T
        )


@pytest.mark.parametrize("outliers", [False, True])
def test_sums_of_14_bits_add_little_to_the_error_of_fp8(outliers):
    found = errors(1152, outliers)
    assert found["float32"] < 1e-6 < found["runs"] < found["throughout"] / 2
    assert found["runs"] < found["FP8"] / 50
    assert 0.02 < found["FP8"] < 0.05


def test_stored_elements_may_be_traced():
    q = jax.eval_shape(
        lambda w: quantize(w, WeightSpec(fmt=formats.fp8_e4m3, group_size=0)), jnp.ones((128, 20))
    )
    found = jax.eval_shape(lambda q: gpu_fp8.weight_elements(q, 20), q)
    assert (found.shape, found.dtype) == ((20, 128), jnp.float8_e4m3fn)
