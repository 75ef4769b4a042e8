"""NaN and infinity: refused by name on the host, and never an ordinary number inside jit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.kernels import quantized_matmul
from qdit_jax.quant import (
    ActQuant,
    ActSpec,
    AdaRoundSettings,
    WeightSpec,
    adaround,
    dequantize,
    fake_quantize,
    fake_quantize_kernel_traced,
    fake_quantize_traced,
    formats,
    gptq,
    group_extremes,
    output_error,
    qdit_release_gptq,
    quantize,
    ranges,
    static_act_quant,
)

K, N = 50, 6
BAD = (np.nan, np.inf, -np.inf)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, K)).astype(np.float32)
W = RNG.normal(size=(K, N)).astype(np.float32)
STATIC = ActSpec(8, 32, mode="static")
SHIFTED = {"symmetric": True, "unsigned": True, "shift": 0.2}
ACTS = {
    "asymmetric": ActSpec(8, 32),
    "symmetric": ActSpec(4, 0, symmetric=True),
    "shifted": ActSpec(4, 32, **SHIFTED),
    "mse": ActSpec(8, 32, range_fn=ranges.mse(3)),
    "percentile": ActSpec(8, 0, range_fn=ranges.percentile(0.9)),
    "qdit_release": ActSpec(8, 32, range_fn=ranges.qdit_release),
    "static": static_act_quant(*group_extremes(X, 32), STATIC),
    "static shifted": static_act_quant(
        *group_extremes(X, 0), ActSpec(8, 0, mode="static", **SHIFTED)
    ),
    **{
        name: ActSpec(fmt=fmt, group_size=32)
        for name, fmt in formats.FORMATS.items()
        if not fmt.has_codebook
    },
}
WEIGHTS = {
    "w4": WeightSpec(4, 32, scale_dtype="float16"),
    "w4 channel groups": WeightSpec(4, 32, channel_group=2, scale_dtype="bfloat16"),
    "mse": WeightSpec(4, 32, True, ranges.mse(3)),
    "percentile": WeightSpec(4, 0, range_fn=ranges.percentile(0.9)),
    "two levels": WeightSpec(4, 32, scale_levels=2),
    "two levels symmetric": WeightSpec(4, 32, True, scale_levels=2, channel_group=2),
    **{name: WeightSpec(fmt=fmt, group_size=32) for name, fmt in formats.FORMATS.items()},
}


def spoiled(array, place, value):
    array = np.array(array)
    array[place] = value
    return array


@pytest.mark.parametrize("name", ACTS)
def test_an_activation_that_is_not_finite_never_becomes_a_number(name):
    act = ACTS[name]
    kernels = {"w4": quantize(W, WEIGHTS["w4"]), "nf4": quantize(W, WEIGHTS["nf4"])}

    @jax.jit
    def outputs(x):
        fake = act(x) if isinstance(act, ActQuant) else fake_quantize(x, act)
        products = {
            f"{kind} {numerics}": quantized_matmul(x, q, act, numerics=numerics)
            for kind, q in kernels.items()
            for numerics in ("simulated", "integer")
        }
        return fake, products

    for value in BAD:
        fake, products = outputs(spoiled(X, (0, 1, 37), value))
        assert not np.isfinite(fake[0, 1, 37])
        others = np.ones((2, 3), bool)
        others[0, 1] = False
        assert np.isfinite(fake[others]).all()
        for kind, y in products.items():
            assert not np.isfinite(y[0, 1]).any(), (kind, value)
            assert np.isfinite(y[others]).all(), (kind, value)


@pytest.mark.parametrize("value", BAD)
def test_traced_group_sizes_keep_it_too(value):
    found = fake_quantize_traced(spoiled(X, (0, 1, 37), value), ActSpec(8, 32), 1, (16, 32))
    assert not np.isfinite(found[0, 1, 37])
    w = fake_quantize_kernel_traced(spoiled(W, (40, 2), value), WEIGHTS["w4"], 1, (16, 32))
    assert np.isnan(w[32:, 2]).all()
    assert np.isfinite(w[:32]).all()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_that_is_not_finite_is_refused_or_spoils_its_group(name):
    spec = WEIGHTS[name]
    traced = jax.jit(lambda w: dequantize(quantize(w, spec)))
    for value in BAD:
        w = spoiled(W, (40, 2), value)
        with pytest.raises(ValueError, match=r"w holds 1 of 300 values .* at \(40, 2\)"):
            quantize(w, spec)
        restored = traced(w)
        assert not np.isfinite(restored[40, 2])
        if spec.fmt is None or not spec.fmt.has_tensor_scale:
            assert np.isfinite(restored[:, 4]).all()


def test_weights_whose_differences_overflow_are_refused():
    with pytest.raises(ValueError, match=r"exceed 8\.5e\+37"):
        quantize(spoiled(W, (1, 1), 2e38), WeightSpec())
    with pytest.raises(ValueError, match="w holds 300 of 300"):
        quantize(jnp.full((K, N), jnp.nan, jnp.bfloat16), WeightSpec())


@pytest.mark.parametrize("name", ["w4", "w4 channel groups", "two levels", *formats.FORMATS])
def test_a_stored_scale_of_nan_stays_nan_in_both_numerics(name):
    q = quantize(W, WEIGHTS[name])
    field = "channel_scale" if q.has_levels else "scale"
    scale = np.array(getattr(q, field))
    nan = {"e8m0": 255, "e4m3": 127}.get(q.fmt.block_scale if q.fmt else "", np.nan)
    scale[..., 1] = nan
    q = dataclasses.replace(q, **{field: jnp.asarray(scale)})
    columns = np.zeros(N, bool)
    columns[q.channel_group : 2 * q.channel_group] = True
    for act in (ACTS["asymmetric"], ACTS["static"], ACTS["nvfp4"]):
        for numerics in ("simulated", "integer"):
            y = np.asarray(quantized_matmul(X, q, act, numerics=numerics))
            assert np.isnan(y[..., columns]).all()
            assert np.isfinite(y[..., ~columns]).all()


def hessian() -> np.ndarray:
    x = np.random.default_rng(3).normal(size=(400, K)).astype(np.float32)
    x[:, 1:] += 0.9 * x[:, :-1]
    return x.T @ x


ROUNDINGS = {
    "gptq": gptq,
    "qdit_release": qdit_release_gptq,
    "adaround": lambda w, h, s: adaround(w, h, s, settings=AdaRoundSettings(num_steps=30)),
}


@pytest.mark.parametrize("name", ROUNDINGS)
def test_roundings_refuse_hessians_and_weights_that_are_not_finite(name):
    round_fn, spec = ROUNDINGS[name], WeightSpec(4, 32)
    for value in BAD:
        with pytest.raises(ValueError, match="hessian holds 1 of"):
            round_fn(W, spoiled(hessian(), (3, 3), value), spec)
        with pytest.raises(ValueError, match="w holds 1 of"):
            round_fn(spoiled(W, (3, 3), value), hessian(), spec)
    traced = jax.jit(lambda h: dequantize(round_fn(W, h, spec)))
    assert np.isnan(traced(spoiled(hessian(), (3, 3), np.nan))).all()


@pytest.mark.parametrize("name", ROUNDINGS)
def test_an_indefinite_hessian_is_damped_and_never_worse_than_nearest(name):
    true, spec = hessian(), WeightSpec(4, 32)
    nearest = float(output_error(W, quantize(W, spec), true))
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(K, K)))[0]
    wild = (rotation * np.linspace(-1, 1, K)) @ rotation.T * 400
    for bad in (true - 300 * np.eye(K), wild, -true, true - 2 * np.diag(np.diag(true))):
        q = ROUNDINGS[name](W, bad.astype(np.float32), spec)
        assert float(output_error(W, q, true)) < 1.5 * nearest
    better = float(output_error(W, ROUNDINGS[name](W, true, spec), true))
    assert better < nearest


def test_holdout_hessians_are_checked():
    with pytest.raises(ValueError, match="holdout holds 1 of"):
        gptq(W, hessian(), WeightSpec(4, 32), holdout=spoiled(hessian(), (0, 0), np.nan))


def test_calibrated_ranges_are_checked():
    for low, high, message in (
        ([np.nan], [1.0], "low holds 1 of 1"),
        ([0.0], [np.inf], "high holds 1 of 1"),
        ([2.0], [1.0], "low exceeds high"),
    ):
        with pytest.raises(ValueError, match=message):
            static_act_quant(np.array(low), np.array(high), ActSpec(8, 0, mode="static"))
