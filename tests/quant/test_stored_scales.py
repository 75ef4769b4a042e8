"""No kernel is lost for being small or large: stored scales have float32's range in 16 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.checkpoint import encode_params
from qdit_jax.checkpoint.codec import decode_params
from qdit_jax.kernels import quantized_matmul
from qdit_jax.ptq.by_columns import quantize_by_columns
from qdit_jax.quant import (
    ActSpec,
    AdaRoundSettings,
    WeightSpec,
    adaround,
    dequantize,
    fake_quantize_kernel_traced,
    formats,
    gptq,
    packed_nbytes,
    qdit_release_gptq,
    quantize,
    ranges,
    scale_value,
    scale_values,
)
from qdit_jax.quant.stored_scales import stored_scale

K, N = 64, 8
STDS = (1e-34, 1e-30, 1e-10, 1e-6, 1e-5, 1e-4, 5e-4, 1e-3, 1e5, 1e30, 1e36)


def kernel(std: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=(K, N)) * std).astype(np.float32)


def decibels(w: np.ndarray, restored) -> float:
    w = np.asarray(w, np.float64)
    error = np.asarray(restored, np.float64) - w
    return float(10 * np.log10(np.square(w).sum() / np.square(error).sum()))


def stored(values, dtype: str) -> np.ndarray:
    return np.asarray(scale_value(stored_scale(jnp.asarray(values, jnp.float32), dtype)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_stored_scale_is_the_next_of_its_grid_over_the_whole_range(dtype):
    rng = np.random.default_rng(1)
    edges = [2.0**-126, 2.0**-29, 2.0**-14, 65504, 65505, 65536, 3.3895314e38]
    values = np.concatenate(
        [2 ** rng.uniform(-126, 127.9, 4000), 2 ** rng.uniform(-31, -13, 4000), edges]
    ).astype(np.float32)
    values = np.sort(np.concatenate([values, np.nextafter(values, np.float32(1))]))
    found = stored(values, dtype)
    assert (found >= values).all()
    assert (found / values <= 1 + 2**-6).all()
    assert (np.diff(found) >= 0).all()
    np.testing.assert_array_equal(stored(found, dtype), found)


def test_scales_that_float16_holds_are_its_numbers_rounded_up():
    values = (2 ** np.random.default_rng(2).uniform(-14, 15.9, 4000)).astype(np.float32)
    plain = np.asarray(stored_scale(jnp.asarray(values), "float16"))
    assert plain.dtype == np.float16
    np.testing.assert_array_equal(plain.astype(np.float32), stored(values, "float16"))
    nearest = values.astype(np.float16)
    above = np.nextafter(nearest, np.float16(np.inf))
    wanted = np.where(nearest.astype(np.float32) < values, above, nearest)
    np.testing.assert_array_equal(plain, wanted)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_not_finite_is_stored_as_such(dtype):
    found = stored([np.nan, np.inf, 1.0], dtype)
    np.testing.assert_array_equal(found, np.float32([np.nan, np.inf, 1.0]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"symmetric": True}, {"range_fn": ranges.mse(5)}, {"range_fn": ranges.percentile(0.98)}],
    ids=["minmax", "symmetric", "mse", "percentile"],
)
def test_a_kernel_of_any_size_is_as_good_as_with_float32_scales(dtype, settings):
    spec = WeightSpec(8, 32, scale_dtype=dtype, **settings)
    exact = decibels(kernel(), dequantize(quantize(kernel(), WeightSpec(8, 32, **settings))))
    for std in STDS:
        q = quantize(kernel(std), spec)
        assert q.nbytes == packed_nbytes(K, N, spec)
        assert decibels(kernel(std), dequantize(q)) > exact - 0.5, std


def test_small_and_large_groups_live_in_one_kernel():
    w = kernel()
    w[:32, 0], w[32:, 0], w[:32, 1], w[:, 2] = (
        w[:32, 0] * 1e-20,
        w[32:, 0] * 1e20,
        0,
        w[:, 2] * 1e-9,
    )
    restored = np.asarray(dequantize(quantize(w, WeightSpec(8, 32, scale_dtype="float16"))))
    for part in (np.s_[:32, 0], np.s_[32:, 0], np.s_[:, 2], np.s_[:, 3]):
        assert decibels(w[part], restored[part]) > 40
    assert (restored[:32, 1] == 0).all()


@pytest.mark.parametrize("name", formats.FORMATS)
def test_formats_keep_small_and_large_kernels(name):
    spec = WeightSpec(fmt=formats.FORMATS[name], group_size=32, scale_dtype="float16")
    exact = decibels(kernel(), dequantize(quantize(kernel(), spec)))
    for std in (1e-30, 1e-10, 1e-5, 1e5, 1e30):
        assert decibels(kernel(std), dequantize(quantize(kernel(std), spec))) > exact - 1.0, std


@pytest.mark.parametrize("std", [1e-6, 1e-10, 1e6])
def test_every_path_reads_the_same_scales(std, monkeypatch):
    w, spec = kernel(std), WeightSpec(4, 32, scale_dtype="float16")
    q = quantize(w, spec)
    restored = np.asarray(dequantize(q))
    traced = fake_quantize_kernel_traced(w, spec, 1, (16, 32))
    np.testing.assert_array_equal(traced, restored)
    monkeypatch.setattr("qdit_jax.ptq.by_columns.BLOCK", K * 3)
    for a, b in zip(jax.tree.leaves(quantize_by_columns(w, spec)), jax.tree.leaves(q), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
    arrays, manifest = encode_params({"kernel": q})
    again = decode_params(jax.tree.map(np.asarray, arrays), manifest)["kernel"]
    np.testing.assert_array_equal(dequantize(again), restored)
    stack = jax.vmap(lambda w: quantize(w, spec))(np.stack([w, kernel()]))
    np.testing.assert_array_equal(dequantize(stack)[0], restored)
    x = np.random.default_rng(1).normal(size=(3, K)).astype(np.float32)
    act = ActSpec(8, 32)
    simulated = quantized_matmul(x, q, act)
    integer = quantized_matmul(x, q, act, numerics="integer")
    np.testing.assert_allclose(integer, simulated, rtol=1e-4, atol=1e-5 * np.abs(simulated).max())


@pytest.mark.parametrize("std", [1e-7, 1e7])
def test_learned_roundings_have_the_grid_of_the_stored_scales(std):
    w = kernel(std)
    x = np.random.default_rng(2).normal(size=(256, K)).astype(np.float32)
    hessian, spec = x.T @ x, WeightSpec(4, 32, scale_dtype="float16")
    nearest = quantize(w, spec)
    for q in (
        gptq(w, hessian, spec),
        adaround(w, hessian, spec, settings=AdaRoundSettings(num_steps=20)),
    ):
        np.testing.assert_array_equal(scale_values(q), scale_values(nearest))
        assert decibels(x @ w, x @ np.asarray(dequantize(q))) > 18
    released = WeightSpec(4, 32, range_fn=ranges.qdit_release_gptq, scale_dtype="float16")
    q = qdit_release_gptq(w, hessian, released)
    assert q.nbytes == packed_nbytes(K, N, released)
    assert decibels(x @ w, x @ np.asarray(dequantize(q))) > 18


@pytest.mark.parametrize("std", [1e-25, 1e25])
def test_the_search_for_a_range_works_at_any_size(std):
    for settings in ({"norm": 2.0}, {"norm": 2.4}):
        spec = WeightSpec(3, 32, True, ranges.mse(20, 0.6, **settings))
        wanted = decibels(kernel(), dequantize(quantize(kernel(), spec)))
        found = decibels(kernel(std), dequantize(quantize(kernel(std), spec)))
        assert abs(found - wanted) < 0.2
