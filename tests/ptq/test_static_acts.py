"""Static activation quantizers: the rule they were made by, their limits, and bad statistics."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.calibration import Stats
from qdit_jax.checkpoint import encode_params
from qdit_jax.checkpoint.codec import decode_params
from qdit_jax.errors import UserError
from qdit_jax.ptq import act_quantizer, quantize_params
from qdit_jax.ptq.static_acts import group_limits
from qdit_jax.quant import ActSpec, formats, ranges, static_act_quant
from qdit_jax.quant.act import dynamic_grid
from qdit_jax.recipes import LayerSpec, Recipe, Rule

S, M, K = 3, 40, 10
PATH = "blocks_0/mlp/fc2"
RNG = np.random.default_rng(0)
TOKENS = RNG.gamma(1.0, size=(S, M, K)).astype(np.float32) - 0.17
TOKENS[1, 3] *= 9


def statistics(**changes) -> Stats:
    settings = {
        "timesteps": np.array([900.0, 500.0, 100.0]),
        "low": {PATH: TOKENS.min(1)},
        "high": {PATH: TOKENS.max(1)},
        "tokens": {PATH: TOKENS},
        **changes,
    }
    return Stats(**settings)


RULES = [ranges.minmax, ranges.mse(), ranges.percentile(0.95), ranges.qdit_release_mse]
KINDS = [{}, {"symmetric": True}, {"symmetric": True, "unsigned": True, "shift": 0.1701}]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("per_timestep", [False, True])
def test_the_stored_quantizer_says_the_rule_of_the_recipe_and_works(rule, kind, per_timestep):
    spec = ActSpec(8, 4, range_fn=rule, mode="static", per_timestep=per_timestep, **kind)
    params = {"blocks_0": {"mlp": {"fc2": {"kernel": np.ones((K, 2), np.float32)}}}}
    recipe = Recipe((Rule(PATH, LayerSpec(None, spec)),))
    found = quantize_params(params, recipe=recipe, stats=statistics())
    act = found["blocks_0"]["mlp"]["fc2"]["act_quant"]
    assert act.spec == spec
    arrays, manifest = encode_params(found)
    again = decode_params(arrays, manifest)["blocks_0"]["mlp"]["fc2"]["act_quant"]
    assert again.spec == spec
    one = again.at(0)
    x = TOKENS[0]
    error = np.abs(np.asarray(one(x)) - x)
    assert np.median(error) < 0.5 * np.asarray(one.scale).max()  # rules may clip a few


@pytest.mark.parametrize("rule", [ranges.mse(20), ranges.percentile(0.9)], ids=lambda r: r.name)
def test_limits_are_of_the_shifted_values_and_given_without_the_shift(rule):
    spec = ActSpec(4, 0, True, rule, "static", unsigned=True, shift=0.25)
    low, high = group_limits(TOKENS[0], spec)
    shifted = TOKENS[0] + np.float32(0.25)
    wanted = rule.limits(jnp.asarray(shifted.reshape(1, -1)), 4, False, 1)
    np.testing.assert_allclose(low, np.asarray(wanted[0]) - 0.25, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(high, np.asarray(wanted[1]) - 0.25, rtol=1e-6, atol=1e-6)
    act = act_quantizer(PATH, dataclasses.replace(spec), statistics())
    limits = rule.limits(jnp.asarray(TOKENS + np.float32(0.25)).reshape(1, -1), 4, False, 1)
    np.testing.assert_allclose(act.scale, np.asarray(limits[1]) / 15, rtol=1e-5)


@pytest.mark.parametrize("per_timestep", [False, True])
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "nvfp4"])
def test_formats_are_calibrated_too(name, per_timestep):
    fmt = formats.by_name(name)
    spec = ActSpec(group_size=4, fmt=fmt, mode="static", per_timestep=per_timestep)
    params = {"blocks_0": {"mlp": {"fc2": {"kernel": np.ones((K, 2), np.float32)}}}}
    recipe = Recipe((Rule(PATH, LayerSpec(None, spec)),))
    found = quantize_params(params, recipe=recipe, stats=statistics())
    act = decode_params(*encode_params(found))["blocks_0"]["mlp"]["fc2"]["act_quant"]
    assert act.spec == spec
    groups = [np.s_[:]] if name == "nvfp4" else [np.s_[0:4], np.s_[4:8], np.s_[8:10]]
    top = fmt.max_value() * (448 if name == "nvfp4" else 1)
    kept = (1, 2) if per_timestep else (0, 1, 2)
    expected = np.stack([np.abs(TOKENS[..., g]).max(axis=kept) for g in groups], axis=-1) / top
    np.testing.assert_allclose(act.scale, expected, rtol=1e-6)
    error = np.abs(np.asarray(act.at(1)(TOKENS[1])) - TOKENS[1])
    assert error.max() <= np.abs(TOKENS).max() / (10 if name != "nvfp4" else 4)


@pytest.mark.parametrize("kind", [*KINDS, {"shift": 0.1}], ids=str)
def test_scales_follow_from_the_range_in_closed_form(kind):
    spec = ActSpec(4, 4, mode="static", **kind)
    act = act_quantizer(PATH, spec, statistics())
    groups = [np.s_[0:4], np.s_[4:8], np.s_[8:10]]  # the last one is shorter
    low = np.array([TOKENS[..., g].min() for g in groups]) + spec.shift
    high = np.array([TOKENS[..., g].max() for g in groups]) + spec.shift
    if not spec.symmetric:
        wanted = (high - np.minimum(low, 0)) / 15
        np.testing.assert_array_equal(act.zero_point, np.round(-np.minimum(low, 0) / wanted))
    elif spec.unsigned:
        wanted = high / 15
    else:
        wanted = np.maximum(-low, high) / 7
    np.testing.assert_allclose(act.scale, wanted, rtol=1e-5)
    assert (act.zero_point is None) == spec.symmetric


def test_unsigned_codes_cover_what_is_positive_however_low_the_rest_goes():
    """What lies below the shift is cut off; it does not widen the grid."""
    x = np.linspace(-3, 1, 40, dtype=np.float32)[None]
    kind = {"symmetric": True, "unsigned": True, "shift": 0.25}
    static = static_act_quant(
        np.float32([-3]), np.float32([1]), ActSpec(4, 0, mode="static", **kind)
    )
    np.testing.assert_allclose(static.scale, 1.25 / 15, rtol=1e-6)
    stats = statistics(
        low={PATH: np.full((S, K), -3, np.float32)}, high={PATH: np.full((S, K), 1, np.float32)}
    )
    act = act_quantizer(PATH, ActSpec(4, 0, mode="static", **kind), stats)
    np.testing.assert_allclose(act.scale, 1.25 / 15, rtol=1e-6)
    scale, zero_point = dynamic_grid(jnp.asarray(x) + 0.25, ActSpec(4, 0, **kind))
    np.testing.assert_allclose(scale[0], 1.25 / 15, rtol=1e-6)
    assert zero_point is None


def test_a_table_has_the_limits_of_each_timestep_and_one_scale_those_of_all():
    spec = ActSpec(8, 0, range_fn=ranges.mse(10), mode="static", per_timestep=True)
    table = act_quantizer(PATH, spec, statistics())
    np.testing.assert_array_equal(table.timesteps, [900, 500, 100])
    for row in range(S):
        low, high = ranges.mse(10).limits(jnp.asarray(TOKENS[row]).reshape(1, -1), 8, False, 1)
        np.testing.assert_allclose(table.scale[row], np.asarray(high - low) / 255, rtol=1e-5)
    whole = act_quantizer(PATH, dataclasses.replace(spec, per_timestep=False), statistics())
    low, high = ranges.mse(10).limits(jnp.asarray(TOKENS).reshape(1, -1), 8, False, 1)
    np.testing.assert_allclose(whole.scale, np.asarray(high - low) / 255, rtol=1e-5)


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


LOW, HIGH = TOKENS.min(1), TOKENS.max(1)
SPOILED = {
    "low nan": ({"low": {PATH: changed(LOW, (1, 2), np.nan)}}, "low holds 1 of 30"),
    "high inf": ({"high": {PATH: changed(HIGH, (1, 2), np.inf)}}, "high holds 1 of 30"),
    "reversed": ({"low": {PATH: HIGH + 1}}, "above high .* at step 0, channel 0"),
    "one step": ({"low": {PATH: LOW[:1]}, "high": {PATH: HIGH[:1]}}, r"low of shape \(1, 10\)"),
    "flat": ({"low": {PATH: LOW[0]}}, r"low of shape \(10,\)"),
    "widths": ({"high": {PATH: HIGH[:, :4]}}, r"high of shape \(3, 4\)"),
    "tokens nan": ({"tokens": {PATH: changed(TOKENS, (0, 0, 0), np.nan)}}, "tokens holds 1"),
    "tokens width": ({"tokens": {PATH: TOKENS[..., :4]}}, r"tokens of shape \(3, 40, 4\)"),
    "hessian": ({"hessians": {PATH: np.eye(4, dtype=np.float32)}}, r"hessian of shape \(4, 4\)"),
    "hessian nan": (
        {"hessians": {PATH: np.full((K, K), np.nan, np.float32)}},
        "hessian holds 100 of 100",
    ),
    "no high": ({"high": {}}, "no array 'high'"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_statistics_that_cannot_be_used_are_refused_by_layer(name, tmp_path):
    changes, message = SPOILED[name]
    stats = statistics(**changes)
    with pytest.raises(ValueError, match=f"the statistics of {PATH}.*{message}"):
        act_quantizer(PATH, ActSpec(8, 0, mode="static"), stats)
    stats.save(tmp_path / "stats.npz")
    with pytest.raises(UserError, match=message if name != "no high" else "no calibration stat"):
        Stats.load(tmp_path / "stats.npz")


def test_good_statistics_load(tmp_path):
    half = statistics(tokens={})
    stats = statistics(halves={"conditional": half, "null": half})
    stats.save(tmp_path / "stats.npz")
    np.testing.assert_array_equal(Stats.load(tmp_path / "stats.npz").low[PATH], stats.low[PATH])
