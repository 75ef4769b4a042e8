"""Quotients rounded once: what the CPU gives, and the way there from an approximate one."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.quant.division import corrected, in_one_form, quotient, quotients_to_narrow


def operands(seed=0, count=200_000):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=count) * 10.0 ** rng.uniform(-12, 12, count)
    divisor = rng.uniform(0.5, 2, count) * 10.0 ** rng.uniform(-12, 12, count)
    x, divisor = x.astype(np.float32), divisor.astype(np.float32)
    x[: count // 4] = (rng.integers(-999, 999, count // 4) + np.float32(0.5)) * divisor[
        : count // 4
    ]
    x[0] = 0
    return x, divisor


@pytest.mark.parametrize("units", [-3, -2, -1, 0, 1, 2, 3])
def test_an_approximate_quotient_is_corrected(units):
    x, divisor = operands()
    exact = x / divisor
    near = (exact.view(np.int32) + np.int32(units)).view(np.float32)
    near[0] = 0
    found = np.asarray(jax.jit(corrected)(*map(jnp.asarray, (near, x, divisor))))
    np.testing.assert_array_equal(found, exact)


def test_a_quotient_is_that_of_ieee_754():
    x, divisor = operands(1)
    np.testing.assert_array_equal(np.asarray(jax.jit(quotient)(x, divisor)), x / divisor)
    row = np.full(4, 0.4, np.float32)
    assert (
        quotient(jnp.float32([3, -3, 1, 0]), row[0]).tolist()
        == (np.float32([3, -3, 1, 0]) / row).tolist()
    )


def test_what_is_not_finite_stays_so():
    near = np.float32([np.inf, -np.inf, np.nan])
    found = corrected(jnp.asarray(near), jnp.float32([1, -1, 0]), jnp.zeros(3))
    np.testing.assert_array_equal(np.asarray(found), near)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("is_in_one_form", [False, True])
def test_a_quotient_to_narrow_rounds_to_fp8_as_the_quotient_does(name, is_in_one_form):
    dtype, rng = jnp.dtype(name), np.random.default_rng(2)
    values = np.arange(255, dtype=np.uint8).view(dtype).astype(np.float32)
    values = np.sort(values[np.isfinite(values)])
    ties = (values[1:] + values[:-1]) / 2
    divisor = (rng.uniform(1, 2, 300) * 2.0 ** rng.integers(-30, 30, 300)).astype(np.float32)
    x = np.concatenate([ties, values, values[-1] * rng.uniform(-1, 1, 999)]).astype(np.float32)
    x = x * divisor[:, None]
    x = np.concatenate([np.nextafter(x, np.inf), x, np.nextafter(x, -np.inf)], axis=1)

    def narrow(x, divisor):
        return quotients_to_narrow(divisor)(x).astype(dtype).astype(jnp.float32)

    with in_one_form() if is_in_one_form else contextlib.nullcontext():
        found = jax.jit(narrow)(x, divisor[:, None])
    expected = (x / divisor[:, None]).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(found), expected)
