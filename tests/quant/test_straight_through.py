"""Gradients through activation quantizers: the identity inside the range, LSQ's for the step size."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.quant import ActQuant, ActSpec, static_act_quant, straight_through

X = jnp.asarray([[-3.0, -0.85, -0.2, 0.0, 0.33, 0.8, 2.0, 5.0]])


def static(symmetric):
    spec = ActSpec(4, 0, symmetric, mode="static")
    return static_act_quant(jnp.asarray([-1.0]), jnp.asarray([1.0]), spec)


@pytest.mark.parametrize("quantizer", [ActQuant(ActSpec(4, 4)), static(True), static(False)])
def test_the_values_are_those_of_the_quantizer(quantizer):
    np.testing.assert_allclose(straight_through(quantizer)(X), quantizer(X), atol=1e-6)
    assert straight_through(X) is X


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_beyond_the_range_have_no_gradient_and_the_step_size_has_lsq_s(symmetric):
    quantizer = static(symmetric)

    def total(x, scale):
        return straight_through(dataclasses.replace(quantizer, scale=scale))(x).sum()

    of_x, of_scale = jax.grad(total, (0, 1))(X, quantizer.scale)
    inside = np.abs(X) < 1
    np.testing.assert_array_equal(of_x, inside)
    codes = quantizer(X) / quantizer.scale  # less the zero point
    expected = np.where(inside, codes - X / quantizer.scale, codes).sum()
    np.testing.assert_allclose(of_scale[0], expected, rtol=1e-5)


def test_a_dynamic_quantizer_passes_every_gradient():
    wrapped = straight_through(ActQuant(ActSpec(4, 4)))
    np.testing.assert_array_equal(jax.grad(lambda x: wrapped(x).sum())(X), jnp.ones_like(X))
