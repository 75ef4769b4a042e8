"""The Pallas kernel for products in groups on NVIDIA GPUs, interpreted on CPU, against float64 and XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_products import CASES, kernel
from interpreted_gpu import needs_interpreter, printed
from level_products import W, tokens

from qdit_jax.kernels.gpu_groups import operands_of, quantized_by_xla
from qdit_jax.kernels.units import of_units, unit_of, unit_sums
from qdit_jax.quant import ActQuant, ActSpec, code_rows, dequantize


@pytest.fixture(scope="module")
def found():
    return printed("grouped_products.py")


@needs_interpreter
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_product_of_the_rounded_operands(found, name):
    ulp = {"float32": 2**-23, "bfloat16": 2**-8}[CASES[name][2]]
    assert found[name]["kernel"] < 4 * ulp
    assert found[name]["kernel"] < found[name]["xla"] + 3 * ulp


@needs_interpreter
def test_a_token_that_is_not_finite_is_nan_and_touches_no_other(found):
    assert found["not finite"] == {"rows": [0, 6, 7, 8], "others_equal": True}


@needs_interpreter
def test_sums_are_written_in_16_bits_at_once(found):
    assert found["in 16 bits"]


@needs_interpreter
def test_the_derivative_is_that_of_xla(found):
    assert found["derivative"]


@needs_interpreter
def test_works_under_vmap_inside_of_scan(found):
    assert found["in scan and vmap"] < 1e-6


@needs_interpreter
def test_the_check_of_a_device_passes_in_the_interpreter(found):
    assert found["check"] is None


@pytest.mark.parametrize(
    ("channels", "x_group", "w_group", "unit"),
    [
        (1152, 128, 128, 128),
        (1152, 0, 0, 128),
        (1152, 32, 128, 32),
        (1152, 192, 0, 64),
        (1152, 288, 288, 32),
        (384, 256, 96, 32),
    ],
)
def test_a_unit_has_one_scale_of_both_operands(channels, x_group, w_group, unit):
    assert unit_of(channels, x_group, w_group) == unit
    for size in (x_group or channels, w_group or channels):
        group = np.arange(channels) // size
        assert (group.reshape(-1, unit) == group[::unit, None]).all()


def test_every_unit_has_the_values_of_its_group():
    values = jnp.arange(6).reshape(3, 2)
    found = of_units(values, 1152, 512, 128)  # 1152 = 2.25 groups
    rows = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2])
    np.testing.assert_array_equal(found, values[rows])
    assert of_units(values, 384, 128, 128) is values
    np.testing.assert_array_equal(of_units(values[:1], 200, 0, 128), values[np.array([0, 0])])


@pytest.mark.parametrize("weight", [W(4, 64), W(8, 64), W(4, 64, symmetric=True)], ids=str)
@pytest.mark.parametrize("act", [ActSpec(8, 128), ActSpec(8, 0, symmetric=True)], ids=str)
def test_operands_give_the_product_in_whole_numbers(weight, act):
    """What the kernel does with its operands, step by step in float64."""
    x, q = jnp.asarray(tokens(9, 256)[3:], jnp.float32), kernel(weight, 256, 20)
    unit = unit_of(256, act.group_size, weight.group_size)
    ours = jax.tree.map(np.asarray, operands_of(quantized_by_xla(x, act), q, act, unit))
    assert len(ours.pairs) == (not act.symmetric) + (not weight.symmetric and weight.bits == 8)
    codes = np.asarray(code_rows(q), np.int64)
    total = 0.0
    for index in range(256 // unit):
        part = slice(index * unit, (index + 1) * unit)
        zero = 2 ** (weight.bits - 1) if ours.zero is None else ours.zero[index].astype(int)
        left = ours.tokens[:, part].astype(np.int64)
        right = codes[:, part] - np.reshape(zero, (-1, 1))
        assert np.abs(right).max() <= 128
        sums = left @ right.T
        for token, channel in ours.pairs:
            sums = sums - token[index][:, None].astype(np.int64) * channel[index]
        scales = ours.token_scale[index][:, None].astype(np.float64) * ours.channel_scale[index]
        total = total + sums * scales
    expected = np.asarray(ActQuant(act)(x), np.float64) @ np.asarray(dequantize(q), np.float64)
    np.testing.assert_allclose(total, expected, atol=1e-5 * np.abs(expected).max())


def test_sums_of_units():
    elements = jnp.arange(24).reshape(2, 12)
    expected = elements.reshape(2, 3, 4).sum(-1).T
    np.testing.assert_array_equal(unit_sums(elements, 4), expected)
