"""GPTQ and AdaRound: the release's codes, and lower output error than rounding to nearest."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.quant import (
    AdaRoundSettings,
    WeightSpec,
    accumulate_hessian,
    adaround,
    dequantize,
    formats,
    gptq,
    integer_codes,
    output_error,
    qdit_release_gptq,
    quantize,
    ranges,
)
from qdit_jax.quant.gptq_rounding import inverse_factor

K, N = 96, 16


def layer(key=0, tokens=600, channels=K):
    """Returns a kernel and inputs that are correlated and have outlier channels."""
    rng = np.random.default_rng(key)
    w = rng.normal(size=(channels, N)).astype(np.float32)
    mix = rng.normal(size=(channels, channels)) / np.sqrt(channels) + np.eye(channels)
    x = rng.normal(size=(tokens, channels)) @ mix
    x[:, [3, 50]] *= 20
    return w, x.astype(np.float32)


def hessian_of(x):
    return accumulate_hessian(jnp.zeros((x.shape[-1],) * 2), x)


def parse(case):
    parts = case.removeprefix("dead_").split("_")
    settings = {part[:2] if part[:2] == "pd" else part[0]: part for part in parts[1:]}
    rule = ranges.qdit_release_gptq(clip=float(settings["c"][1:]) if "c" in settings else 1.0)
    group_size = max(int(settings["g"][1:]), 0)
    spec = WeightSpec(int(settings["b"][1:]), group_size, parts[0] == "sym", rule)
    return spec, float(settings["pd"][2:]) if "pd" in settings else 0.01


def check_release_case(reference, case):
    spec, damping = parse(case)
    prefix = "dead_" if case.startswith("dead_") else ""
    w, x = reference[f"{prefix}W"].T, reference[f"{prefix}X"].reshape(-1, 384)
    q = qdit_release_gptq(w, 2 / 8 * hessian_of(x), spec, damping=damping)
    flips = np.mean(reference[f"code__{case}"] != np.asarray(integer_codes(q)).T)
    assert flips <= 0.0025
    scale = reference[f"scale__{case}"].reshape(q.scale.T.shape)
    np.testing.assert_allclose(q.scale.T, scale, rtol=2e-5)
    error = np.sum((x.astype(np.float64) @ (w - np.asarray(dequantize(q)))) ** 2)
    np.testing.assert_allclose(error, reference[f"err_gptq__{case}"], rtol=2e-3)
    return flips


FAST = ("sym_b3_g64", "asym_b4_g96", "dead_sym_b4_g-1")


@pytest.mark.parametrize("case", FAST)
def test_qdit_release_gptq_gives_the_release_s_codes(golden, case):
    assert check_release_case(np.load(golden("gptq_linear.npz")), case) == 0


@pytest.mark.slow
def test_qdit_release_gptq_gives_every_case_s_codes(golden):
    reference = np.load(golden("gptq_linear.npz"))
    for case in json.loads(str(reference["cases"])):
        check_release_case(reference, case)


def test_the_inverse_factor_is_upper_and_reproduces_the_inverse():
    _, x = layer()
    hessian = hessian_of(x)
    factor = np.asarray(inverse_factor(hessian, 0.01), np.float64)
    damped = np.asarray(hessian) + 0.01 * np.mean(np.diag(hessian)) * np.eye(K)
    assert np.abs(np.tril(factor, -1)).max() == 0
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(K), atol=2e-3)


@pytest.mark.parametrize(
    "spec",
    [
        WeightSpec(4, 32),
        WeightSpec(4, 25, range_fn=ranges.mse(10), scale_dtype="float16"),
        WeightSpec(4, 32, channel_group=4),
    ],
    ids=str,
)
def test_gptq_beats_nearest_on_unseen_inputs_but_not_on_weights(spec):
    w, x = layer(tokens=2000)
    seen, unseen = hessian_of(x[:1500]), hessian_of(x[1500:])
    q, nearest = gptq(w, seen, spec), quantize(w, spec)
    assert output_error(w, q, unseen) < 0.7 * output_error(w, nearest, unseen)
    assert jnp.linalg.norm(dequantize(q) - w) > jnp.linalg.norm(dequantize(nearest) - w)
    np.testing.assert_array_equal(q.scale, nearest.scale)  # the groups are static


def test_gptq_is_a_sequential_solution_in_float64():
    w, x = layer(key=3)
    spec, hessian = WeightSpec(4, 32), np.asarray(hessian_of(x), np.float64)
    damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(K)
    order = np.argsort(-np.diag(hessian), kind="stable")
    grid = quantize(w, spec)
    scale = np.repeat(np.asarray(grid.scale, np.float64), 32, axis=0)[order]
    zero_point = np.repeat(np.asarray(grid.zero_point, np.float64), 32, axis=0)[order]
    rest, remaining = w[order].astype(np.float64), damped[np.ix_(order, order)]
    codes = np.zeros((K, N))
    for i in range(K):
        inverse = np.linalg.inv(remaining[i:, i:])
        codes[i] = np.clip(np.round(rest[i] / scale[i]) + zero_point[i], 0, 15)
        error = (rest[i] - (codes[i] - zero_point[i]) * scale[i]) / inverse[0, 0]
        rest[i:] -= inverse[:, :1] * error
    found = np.asarray(integer_codes(gptq(w, hessian.astype(np.float32), spec)))[order]
    assert np.mean(found != codes) < 0.003


def test_the_holdout_check_never_does_worse_than_nearest_where_it_looks():
    w, x = layer(tokens=60)  # fewer tokens than channels: gains in sample are illusory
    seen, holdout = hessian_of(x[:30]), hessian_of(x[30:])
    spec = WeightSpec(4, 32)
    checked = output_error(w, gptq(w, seen, spec, holdout=holdout), holdout)
    assert checked <= output_error(w, gptq(w, seen, spec), holdout)
    assert checked <= output_error(w, quantize(w, spec), holdout) * (1 + 1e-5)


def test_channels_without_input_and_singular_hessians_are_survived():
    w, x = layer(tokens=20)
    x[:, [5, 6]] = 0
    q = gptq(w, hessian_of(x), WeightSpec(4, 32), damping=0.0)
    restored = np.asarray(dequantize(q))
    assert np.isfinite(restored).all()
    assert (restored[[5, 6]] == 0).all()


@pytest.mark.slow
def test_layers_of_one_shape_run_together():
    pairs = [layer(key) for key in (1, 2)]
    w = np.stack([w for w, _ in pairs])
    hessians = jnp.stack([hessian_of(x) for _, x in pairs])
    spec = WeightSpec(4, 32)
    together = jax.vmap(lambda w, hessian: gptq(w, hessian, spec))(w, hessians)
    for i in range(2):
        alone = integer_codes(gptq(w[i], hessians[i], spec))
        assert np.mean(np.asarray(integer_codes(together))[i] != alone) < 0.003


@pytest.mark.parametrize("symmetric", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_adaround_beats_nearest_and_stays_on_its_codes_neighbors(symmetric):
    w, x = layer(tokens=800)
    spec = WeightSpec(3, 32, symmetric)
    seen, unseen = hessian_of(x[:500]), hessian_of(x[500:])
    settings = AdaRoundSettings(num_steps=200, learning_rate=4e-2)
    q, nearest = adaround(w, seen, spec, settings=settings), quantize(w, spec)
    assert output_error(w, q, unseen) < 0.75 * output_error(w, nearest, unseen)
    moved = np.abs(np.asarray(integer_codes(q), int) - np.asarray(integer_codes(nearest), int))
    assert moved.max() <= 1


def test_a_wrong_hessian_or_a_format_is_refused():
    w, _ = layer()
    for fn in (gptq, qdit_release_gptq, adaround):
        with pytest.raises(ValueError, match=r"hessian has shape \(3, 3\); w \(96, 16\) needs"):
            fn(w, jnp.eye(3), WeightSpec())
        with pytest.raises(ValueError, match="'mxfp4'"):
            fn(w, jnp.eye(K), WeightSpec(fmt=formats.mxfp4))
