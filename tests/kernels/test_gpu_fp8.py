"""The Pallas kernel for NVIDIA GPUs of FP8 on both sides, interpreted, against float64 and XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


def sums_of_14_bits(x, w):
    """Returns sums as Hopper's tensor cores are said to make them: addends lose what is 14 bits below the greatest.

    32 products at a time, added to the sums before.
    """
    sums = np.zeros((len(x), len(w)))
    for start in range(0, x.shape[1], 32):
        part = slice(start, start + 32)
        addends = x[:, None, part] * w[None, :, part]
        addends = np.concatenate([addends, sums[..., None]], axis=-1)
        _, exponent = np.frexp(np.abs(addends).max(axis=-1, keepdims=True))
        unit = 2.0 ** (exponent - 14)
        sums = (np.trunc(addends / unit) * unit).sum(axis=-1)
    return sums


def test_the_check_of_a_device_has_sums_that_14_bits_hold():
    rng, (rows, channels, width) = np.random.default_rng(0), gpu_check.SIZES
    check = gpu_check.FP8
    x = check.inputs_fn(rng, check.act, rows, channels).astype(np.float64)
    _, values = check.kernel_fn(rng, 8, channels, width)
    for start in range(0, channels, 128):
        run = slice(start, start + 128)
        np.testing.assert_array_equal(
            sums_of_14_bits(x[:, run], values[:, run]), x[:, run] @ values[:, run].T
        )


def test_sums_of_14_bits_add_little_to_the_error_of_fp8():
    """Where a run of 128 channels has its own; as many as docs/kernels.md says."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(32, 1152)), rng.normal(size=(32, 1152))
    x[:, ::97] *= 50

    def elements(values):
        scale = np.abs(values).max(axis=1, keepdims=True) / 448
        rounded = jnp.asarray(values / scale, jnp.float32).astype(jnp.float8_e4m3fn)
        return np.asarray(rounded, np.float64), scale

    (codes, scale), (weights, channel_scale) = elements(x), elements(w)
    exact = codes @ weights.T
    runs = [slice(start, start + 128) for start in range(0, 1152, 128)]
    promoted = sum(sums_of_14_bits(codes[:, run], weights[:, run]) for run in runs)

    def error(found, expected):
        return np.sqrt(np.square(found - expected).mean() / np.square(expected).mean())

    of_sums, of_all = error(promoted, exact), error(sums_of_14_bits(codes, weights), exact)
    of_elements = error(exact * scale * channel_scale.T, x @ w.T)
    assert of_sums < of_all / 2
    assert of_sums < of_elements / 50
    assert 0.02 < of_elements < 0.05


def test_stored_elements_may_be_traced():
    q = jax.eval_shape(
        lambda w: quantize(w, WeightSpec(fmt=formats.fp8_e4m3, group_size=0)), jnp.ones((128, 20))
    )
    found = jax.eval_shape(lambda q: gpu_fp8.weight_elements(q, 20), q)
    assert (found.shape, found.dtype) == ((20, 128), jnp.float8_e4m3fn)
