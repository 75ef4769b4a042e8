"""What comes before and after a product: a norm, a gated sum, parts; by kernels for GPUs and by XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_products import CASES
from interpreted_gpu import needs_interpreter, printed
from level_products import LEVELS, TOKEN, W

from qdit_jax.kernels import Gated, Modulated, fused_matmul, quantized_matmul
from qdit_jax.models.linear import Linear
from qdit_jax.models.taps import seen_inputs
from qdit_jax.quant import ActQuant, InputMap, quantize


@pytest.fixture(scope="module")
def on_gpus():
    return printed("fused_products.py")


@needs_interpreter
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_adds_and_parts_its_result(on_gpus, case):
    _, rows, width, parts, _ = CASES[case]
    found = on_gpus[case]
    assert found["dtype"] == "float32"
    assert found["shapes"] == [[*rows, width // parts]] * parts
    assert found["error"] < 1e-6
    assert found["slopes"]


@needs_interpreter
def test_the_check_of_a_device_passes_in_the_interpreter(on_gpus):
    assert on_gpus["wrong"] == [None] * 4


@needs_interpreter
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_block_is_what_it_is_by_xla(on_gpus, dtype, tolerance):
    found = on_gpus[f"block in {dtype}"]
    assert found["error"] < tolerance
    # (input, whether its result is added to something, parts): proj, fc2, fc1 and qkv.
    assert found["calls"][1:] == [
        ["Mapped", True, 1],
        ["Modulated", False, 1],
        ["Modulated", False, 3],
    ]
    assert found["calls"][0][1:] == [True, 1]


def operands(seed=0):
    """Returns a kernel, a modulated input and what is added to, of two samples of three tokens."""
    rng = np.random.default_rng(seed)
    q = quantize(jnp.asarray(rng.normal(size=(64, 24)), jnp.float32), W(4, 32, **LEVELS))
    x, before = (jnp.asarray(rng.normal(size=(2, 3, size)), jnp.float32) for size in (64, 24))
    modulations = (jnp.asarray(rng.normal(size=(2, 6 * size)), jnp.float32) for size in (64, 24))
    return q, Modulated(x, next(modulations), 3, 4), Gated(before, next(modulations), 5)


def test_by_xla_it_is_what_separate_operations_are():
    q, x, gated = operands()
    parts = jax.jit(
        lambda x, gated: fused_matmul(x, q, TOKEN, "integer", "xla", gated=gated, parts=2)
    )(x, gated)
    mean, deviation = x.x.mean(-1, keepdims=True), x.x.std(-1, keepdims=True)
    shift, scale = (x.modulation[:, None, 64 * i : 64 * i + 64] for i in (3, 4))
    normed = (x.x - mean) / jnp.sqrt(deviation**2 + 1e-6) * (1 + scale) + shift
    y = quantized_matmul(normed, q, TOKEN, "integer", "xla")
    expected = gated.x + gated.modulation[:, None, 120:] * y
    # A token may be rounded the other way.
    np.testing.assert_allclose(
        jnp.concatenate(parts, -1), expected, atol=0.02 * np.abs(y).max() * 3
    )


@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_layer_takes_them_all(is_quantized, is_mapped):
    q, x, gated = operands()
    rng = np.random.default_rng(1)
    params = {"kernel": q, "act_quant": ActQuant(TOKEN)} if is_quantized else {}
    params = {"kernel": jnp.asarray(rng.normal(size=(64, 24)), jnp.float32), **params}
    params["bias"] = jnp.asarray(rng.normal(size=24), jnp.float32)
    if is_mapped:
        scale, shift = (jnp.asarray(rng.uniform(0.5, 2, 64), jnp.float32) for _ in range(2))
        params["input_map"] = InputMap(scale, shift)
    layer, variables = Linear(24), {"params": params}
    own = layer.apply(variables, x.array())
    found = layer.apply(variables, x, None, gated, method="fused")
    np.testing.assert_allclose(found, gated.plus(own), atol=1e-5)
    parts = layer.apply(variables, x, 3, method="fused_parts")
    np.testing.assert_allclose(jnp.concatenate(parts, -1), own, atol=1e-5)
    assert [part.shape for part in parts] == [(2, 3, 8)] * 3


def test_who_taps_a_layer_sees_its_whole_input():
    q, x, gated = operands()
    variables = {"params": {"kernel": q, "act_quant": ActQuant(TOKEN), "bias": jnp.zeros(24)}}
    inputs = {}
    with seen_inputs(inputs.__setitem__):
        Linear(24).apply(variables, x, None, gated, method="fused")
    np.testing.assert_array_equal(inputs[""], x.array())
