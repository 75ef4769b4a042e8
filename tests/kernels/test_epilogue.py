"""Bias and GELU after a product: by XLA as separate operations, by kernels as they write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from epilogues import KINDS, ON_GPUS, facts
from interpreted_gpu import needs_interpreter, printed
from level_products import TOKEN, W, tokens

from qdit_jax.kernels import GELU, quantized_matmul
from qdit_jax.models.linear import Linear
from qdit_jax.models.taps import seen_inputs, tapped
from qdit_jax.quant import ActQuant, ActSpec, quantize


@pytest.fixture(scope="module")
def on_gpus():
    return printed("epilogues.py")


def check(found):
    assert found["bias"] < 1e-6
    assert found["activated"] < 1e-6
    assert found["16 bits"]
    assert found["slopes"]


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_for_tpus_add_and_activate(kind):
    check(facts("tpu", kind))


@needs_interpreter
@pytest.mark.parametrize("kind", ON_GPUS)
def test_kernels_for_gpus_add_and_activate(on_gpus, kind):
    check(on_gpus[kind])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_by_xla_it_is_what_separate_operations_are(dtype):
    x, rng = jnp.asarray(tokens(9, 64), dtype), np.random.default_rng(0)
    q = quantize(jnp.asarray(rng.normal(size=(64, 20)), jnp.float32), W(4, 32))
    bias = jnp.asarray(rng.normal(size=20), jnp.float32)

    @jax.jit
    def apart(x):
        return jax.nn.gelu(quantized_matmul(x, q, TOKEN) + bias.astype(dtype), approximate=True)

    found = jax.jit(lambda x: quantized_matmul(x, q, TOKEN, bias=bias, activation=GELU))(x)
    assert found.dtype == x.dtype
    expected, tolerance = apart(x), {"float32": 1e-6, "bfloat16": 2**-7}[dtype]
    np.testing.assert_allclose(*(np.asarray(a, np.float64) for a in (found, expected)), tolerance)


def test_an_unknown_activation_is_refused_by_name():
    q = quantize(jnp.ones((32, 8)), W(4, 32))
    with pytest.raises(ValueError, match="activation='relu' is not known; use gelu_tanh"):
        quantized_matmul(jnp.ones((2, 32)), q, activation="relu")


def layer(*, is_quantized):
    """Returns a layer, its params and an input."""
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)
    params = {"kernel": kernel, "bias": jnp.asarray(rng.normal(size=8), jnp.float32)}
    if is_quantized:
        params |= {"kernel": quantize(kernel, W(4, 32)), "act_quant": ActQuant(ActSpec(8, 32))}
    return Linear(8), {"params": params}, jnp.asarray(rng.normal(size=(3, 32)), jnp.float32)


@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_layer_and_what_follows_it_are_one_call(is_quantized):
    module, variables, x = layer(is_quantized=is_quantized)
    expected = jax.nn.gelu(module.apply(variables, x), approximate=True)
    found = module.apply(variables, x, GELU, method="fused")
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_who_taps_a_layer_sees_and_changes_its_own_output():
    module, variables, x = layer(is_quantized=True)
    own, inputs = module.apply(variables, x), {}
    with seen_inputs(inputs.__setitem__):
        module.apply(variables, x, GELU, method="fused")
    np.testing.assert_array_equal(inputs[""], x)
    seen = []

    def twice(path, layer, x, call):
        seen.append(call())
        return 2 * seen[-1]

    with tapped(twice):
        found = module.apply(variables, x, GELU, method="fused")
    np.testing.assert_allclose(seen[0], own, atol=1e-6)
    np.testing.assert_allclose(found, jax.nn.gelu(2 * own, approximate=True), atol=1e-5)
