"""Activation quantizers: the release's numbers, tails, static tables, shifts, traced sizes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.quant import (
    ActQuant,
    ActSpec,
    WeightSpec,
    dequantize,
    fake_quantize,
    fake_quantize_kernel_traced,
    fake_quantize_traced,
    group_extremes,
    quantize,
    ranges,
    static_act_quant,
)
from qdit_jax.quant.act import dynamic_grid

STATIC = ActSpec(mode="static", group_size=32)


def tokens(channels=100, key=0):
    """Returns `[2, 5, channels]` with outlier channels, a zero token and a one-sided token."""
    rng = np.random.default_rng(key)
    x = rng.normal(size=(2, 5, channels)).astype(np.float32)
    x[..., [3, 40]] *= np.array([10.0, 50.0], np.float32)
    x[0, 0] = 0
    x[0, 1] = np.abs(x[0, 1]) + 0.5
    return x


def oracle(x, spec):
    """Returns `x` fake-quantized by min-max in float64 NumPy."""
    size = spec.group_size or x.shape[-1]
    parts = []
    for start in range(0, x.shape[-1], size):
        part = x[..., start : start + size].astype(np.float64)
        if spec.symmetric:
            high = np.abs(part).max(-1, keepdims=True)
            low, top, least = -high, 2 ** (spec.bits - 1) - 1, -(2 ** (spec.bits - 1))
            scale, zero_point = high / top, 0
        else:
            low = np.minimum(part.min(-1, keepdims=True), 0)
            high = np.maximum(part.max(-1, keepdims=True), 0)
            top, least = 2**spec.bits - 1, 0
            scale = (high - low) / top
            zero_point = np.round(-low / np.where(scale > 0, scale, 1))
        scale = np.where(scale > 0, scale, 1)
        codes = np.clip(np.round(part / scale) + zero_point, least, top)
        parts.append((codes - zero_point) * scale)
    return np.concatenate(parts, axis=-1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 32), (4, 0), (3, 48), (2, 1000)])
def test_dynamic_is_numpy_s_with_a_ragged_tail(bits, group_size, symmetric):
    spec, x = ActSpec(bits, group_size, symmetric), tokens()
    difference = np.abs(np.asarray(fake_quantize(x, spec)) - oracle(x, spec))
    assert np.mean(difference > 1e-5 * (1 + np.abs(x))) < 2e-3  # ties may fall the other way


def test_no_token_depends_on_another():
    spec, x = ActSpec(4, 32), tokens()
    np.testing.assert_array_equal(fake_quantize(x, spec)[1, 3], fake_quantize(x[1, 3], spec))


def test_dtype_is_kept_and_many_calls_compile_once():
    spec, x = ActSpec(4, 25), jnp.asarray(tokens(), jnp.bfloat16)
    before = fake_quantize._cache_size()
    for factor in (1, 2, 3):
        assert fake_quantize(x * factor, spec).dtype == jnp.bfloat16
    assert fake_quantize._cache_size() == before + 1


def test_dynamic_equals_the_release_s(golden):
    reference = np.load(golden("act_quant.npz"))
    x = jnp.asarray(reference["X"])
    for case in json.loads(str(reference["cases"])):
        kind, bits, group, clip = case.split("_")
        if int(bits[1:]) == 6 or int(group[1:]) >= 128:  # the rest adds nothing new
            continue
        rule = ranges.qdit_release(clip=float(clip[1:]))
        spec = ActSpec(int(bits[1:]), int(group[1:]), kind == "sym", rule)
        np.testing.assert_array_equal(fake_quantize(x, spec), reference[f"deq__{case}"])
        scale, zero_point = jax.jit(lambda x, spec=spec: dynamic_grid(x, spec))(x)
        np.testing.assert_array_equal(scale, reference[f"scale__{case}"])
        if kind == "asym":
            np.testing.assert_array_equal(zero_point, reference[f"zero__{case}"])


def test_static_scales_equal_the_release_s(golden):
    reference = np.load(golden("static_act_scales.npz"))
    decay = np.float32(0.9)
    for layer, batches in (("l1", reference["X"]), ("l2", reference["l2_input"])):
        for case in json.loads(str(reference["cases"])):
            bits, group_size = (int(part[1:]) for part in case.split("_"))
            low, high = group_extremes(batches[0], group_size)
            for batch in batches[1:]:
                new_low, new_high = group_extremes(batch, group_size)
                low = decay * low + np.float32(0.1) * new_low
                high = decay * high + np.float32(0.1) * new_high
            spec = ActSpec(bits, group_size, range_fn=ranges.qdit_release, mode="static")
            quant = static_act_quant(low, high, spec)
            scale, zero_point = reference[f"{layer}__{case}"]
            np.testing.assert_array_equal(quant.scale, scale.ravel())
            np.testing.assert_array_equal(quant.zero_point, zero_point.ravel())


@pytest.mark.parametrize("group_size", [0, 32])
def test_static_with_a_tensor_s_own_range_is_close_to_it(group_size):
    spec, x = ActSpec(8, group_size, mode="static"), tokens()
    quant = static_act_quant(*group_extremes(x, group_size), spec)
    step = np.repeat(np.asarray(quant.scale), group_size or 100)[:100]
    assert (np.abs(quant(x) - x) <= 0.5001 * step).all()


def test_a_table_gives_each_step_or_sample_its_row():
    low, high = np.full((3, 4), -1.0), np.arange(1, 4)[:, None] * np.ones((3, 4))
    table = static_act_quant(low, high, STATIC)
    assert table.is_table
    x = jnp.asarray(tokens())
    rows = [static_act_quant(low[i], high[i], STATIC)(x) for i in range(3)]
    for i in range(3):
        np.testing.assert_array_equal(jax.jit(lambda i: table.at(i)(x))(i), rows[i])
    per_sample = table.at(jnp.array([2, 0]))(x)
    np.testing.assert_array_equal(per_sample, jnp.stack([rows[2][0], rows[0][1]]))
    np.testing.assert_array_equal(table.at(jnp.array([2, 0]))(x[:, 0]), per_sample[:, 0])


def test_a_shift_makes_gelu_unsigned_and_finer():
    x = jax.nn.gelu(jnp.asarray(tokens()[..., :32]))
    plain = ActSpec(4, 32, symmetric=True)
    shifted = ActSpec(4, 32, symmetric=True, unsigned=True, shift=0.1701)
    error = [float(jnp.mean((fake_quantize(x, spec) - x) ** 2)) for spec in (plain, shifted)]
    assert error[1] < 0.5 * error[0]


def test_errors_say_what_is_missing():
    x = jnp.asarray(tokens())
    with pytest.raises(ValueError, match="needs calibrated scales"):
        fake_quantize(x, STATIC)
    with pytest.raises(ValueError, match="has no scales; calibrate it first"):
        ActQuant(STATIC)(x)
    with pytest.raises(ValueError, match=r"table of 2 rows; pick one with .* or `at\(index\)`"):
        static_act_quant(-np.ones((2, 4)), np.ones((2, 4)), STATIC)(x)
    with pytest.raises(ValueError, match="scale has 3 groups, but 100 channels make 4 groups"):
        static_act_quant(-np.ones(3), np.ones(3), STATIC)(x)
    with pytest.raises(ValueError, match="takes no calibrated range"):
        static_act_quant(-np.ones(3), np.ones(3), ActSpec())
    with pytest.raises(ValueError, match="'mse' needs samples"):
        static_act_quant(-np.ones(4), np.ones(4), ActSpec(mode="static", range_fn=ranges.mse()))


@pytest.mark.parametrize(
    ("rule", "symmetric"), [(ranges.minmax, False), (ranges.qdit_release(clip=0.9), True)]
)
def test_a_traced_group_size_is_the_static_one_to_the_bit(rule, symmetric):
    sizes = (32, 64, 128, 0, 96)
    x, w = jnp.asarray(tokens(130)), jnp.asarray(tokens(130)[0].T)
    act, weight = ActSpec(8, 32, symmetric, rule), WeightSpec(4, 32, symmetric, rule)
    act_fn = jax.jit(lambda x, choice: fake_quantize_traced(x, act, choice, sizes))
    weight_fn = jax.jit(lambda w, choice: fake_quantize_kernel_traced(w, weight, choice, sizes))
    for choice, size in enumerate(sizes[:4]):
        static = ActSpec(8, size, symmetric, rule)
        np.testing.assert_array_equal(act_fn(x, choice), fake_quantize(x, static))
        static = WeightSpec(4, size, symmetric, rule)
        np.testing.assert_array_equal(weight_fn(w, choice), dequantize(quantize(w, static)))
    assert act_fn._cache_size() == weight_fn._cache_size() == 1


def test_a_rule_without_a_traced_form_is_refused():
    with pytest.raises(ValueError, match="'mse' has no form with a traced group size"):
        fake_quantize_traced(jnp.ones((2, 64)), ActSpec(range_fn=ranges.mse()), 0, (32,))
    with pytest.raises(ValueError, match="use mode='dynamic'"):
        fake_quantize_traced(jnp.ones((2, 64)), STATIC, 0, (32,))
