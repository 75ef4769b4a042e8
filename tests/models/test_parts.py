"""Rotary positions and norms with parameters, against their formulas in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.models.norms import LayerNorm, RMSNorm
from qdit_jax.models.rotary import grid_positions, rotary_angles, rotated


def test_pairs_are_turned_as_complex_numbers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 3, 10))
    positions = grid_positions(2, 3) * [1, 50]
    out = rotated(jnp.asarray(x, jnp.float32), rotary_angles(positions, (4, 6)))

    angles = np.concatenate(
        [
            positions[:, :1] * 1e4 ** (-np.arange(2) / 2),
            positions[:, 1:] * 1e4 ** (-np.arange(3) / 3),
        ],
        axis=1,
    )
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[None, :, None]
    np.testing.assert_allclose(out[..., 0::2], turned.real, atol=2e-6)
    np.testing.assert_allclose(out[..., 1::2], turned.imag, atol=2e-6)


def test_known_and_traced_positions_agree():
    positions = grid_positions(5, 7)
    traced = jax.jit(lambda p: rotary_angles(p, (4, 4)))(jnp.asarray(positions))
    np.testing.assert_allclose(
        np.exp(1j * np.asarray(traced)),
        np.exp(1j * np.asarray(rotary_angles(positions, (4, 4)))),
        atol=2e-6,
    )


@pytest.mark.parametrize("widths", [(3, 5), (4,), (2, 2, 2)])
def test_axes_that_do_not_fit_are_named(widths):
    with pytest.raises(ValueError, match=r"rope_axes=\("):
        rotary_angles(grid_positions(2, 2), widths)


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_norms_are_their_formulas(eps):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 8)) * np.array([1e-3, 1, 50])[:, None] + 0.1
    scale, bias = rng.normal(size=8), rng.normal(size=8)
    params = {"scale": jnp.asarray(scale, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    narrow = jnp.asarray(x, jnp.float32)

    rms = RMSNorm(eps).apply({"params": {"scale": params["scale"]}}, narrow)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale
    np.testing.assert_allclose(rms, expected, rtol=2e-5, atol=1e-6)

    layer = LayerNorm(eps).apply({"params": params}, narrow)
    centered = x - x.mean(-1, keepdims=True)
    expected = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps) * scale + bias
    np.testing.assert_allclose(layer, expected, rtol=2e-4, atol=2e-5)


def test_norms_of_bfloat16_are_computed_wide():
    out = RMSNorm().init_with_output(jax.random.key(0), jnp.ones((1, 4), jnp.bfloat16))[0]
    assert out.dtype == jnp.float32
