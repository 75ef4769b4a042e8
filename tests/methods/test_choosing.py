"""What input coordinates are chosen, by which equations, and that held-out error decides."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_painter
from flax.traverse_util import flatten_dict
from scipy.stats import spearmanr
from tiny_models import random_params, tiny_checkpoint
from told import Told

import qdit_jax as qdit
from qdit_jax.calibration import LayerInputs, collect_items
from qdit_jax.diffusion import ddim
from qdit_jax.methods import CalibrationData, best, fold_inputs
from qdit_jax.methods.bench import LEAST_COLUMNS, Bench, some_columns
from qdit_jax.methods.branches import branch_error, closest_branch, weight_branch
from qdit_jax.methods.choosing import WORTH_IT, ChooseTransforms
from qdit_jax.methods.input_transforms import Place, Transform
from qdit_jax.methods.ptq4dit import weighted_salience
from qdit_jax.methods.ptq4dm import normal_items
from qdit_jax.methods.repq_vit import one_range
from qdit_jax.methods.scales import activation_aware, balanced, smoothing
from qdit_jax.methods.scoring import output_errors, rounded_rows
from qdit_jax.methods.vidit_q import nearest_to_noise
from qdit_jax.models import FAMILIES
from qdit_jax.quant import (
    ActSpec,
    InputMap,
    LowRank,
    QTensor,
    Rotation,
    WeightSpec,
    fake_quantize,
)
from qdit_jax.recipes import LayerSpec, Recipe
from qdit_jax.sampling import Denoiser

SPEC = LayerSpec(WeightSpec(4, 0, symmetric=True), ActSpec(8, 0, symmetric=True))
FREE, PAID = (Place(("a",), folded) for folded in (True, False))


def rows_with(outliers, seed=0, m=256, k=32):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((m, k)).astype(np.float32)
    rows[:, list(outliers)] *= 40
    return rows


def bench(rows, kernel, spec=SPEC):
    fitted, held_out = rows[::2], rows[1::2]
    inputs = LayerInputs(fitted.min(0), fitted.max(0), np.abs(fitted).mean(0), fitted)
    return Bench(inputs, held_out, {spec: kernel}, {spec: kernel})


def kernel_of(seed=1, k=32, n=24):
    return np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)


def rounded_by_hand(values, bits, axis):
    """Returns symmetric rounding in float64, one scale per line along `axis`."""
    top = 2 ** (bits - 1) - 1
    scale = np.abs(values).max(axis, keepdims=True) / top
    return np.clip(np.round(values / scale), -top - 1, top) * scale


def test_output_errors_are_those_of_float64_by_hand():
    rows, kernel = rows_with([3]), kernel_of()
    rng = np.random.default_rng(2)
    scales = np.exp(rng.uniform(-1, 1, (3, 32))).astype(np.float32)
    shift = rng.standard_normal(32).astype(np.float32)
    weight = WeightSpec(4, 0, symmetric=True, scale_dtype="float32")
    spec = LayerSpec(weight, ActSpec(8, 0, symmetric=True))
    found = output_errors(rows, kernel, scales, shift, None, spec=spec)
    x, w = rows.astype(np.float64) - shift, kernel.astype(np.float64)
    for error, scale in zip(found, scales.astype(np.float64), strict=True):
        product = rounded_by_hand(x / scale, 8, 1) @ rounded_by_hand(w * scale[:, None], 4, 0)
        np.testing.assert_allclose(error, np.square(product - x @ w).sum(), rtol=0.02)


def test_smoothing_and_awq_follow_their_equations():
    rows, kernel = rows_with([3]), kernel_of()
    inputs = LayerInputs(rows.min(0), rows.max(0), np.abs(rows).mean(0), rows)
    x, w = np.abs(rows).max(0).astype(np.float64), np.abs(kernel).max(1).astype(np.float64)
    raw = np.stack([x**0.5 / w**0.5, x**0.8 / w**0.2, x**0.5, x**0.8])
    expected = raw / np.exp(np.log(raw).mean(1, keepdims=True))
    np.testing.assert_allclose(smoothing((0.5, 0.8))(inputs, kernel), expected, rtol=1e-4)
    means = np.abs(rows).mean(0).astype(np.float64) ** 0.25
    means /= np.exp(np.log(means).mean())
    np.testing.assert_allclose(activation_aware((0.25,))(inputs, kernel)[0], means, rtol=1e-4)


def test_channels_that_are_never_used_keep_the_scale_1():
    x, w = np.array([0.0, 4.0, 9.0, 1e-30]), np.array([1.0, 1.0, 0.0, 1.0])
    found = balanced(x, w, 0.5, 0.5)
    assert np.isfinite(found).all()
    assert (found[0], found[2]) == (1.0, 1.0)
    np.testing.assert_array_equal(balanced(np.zeros(3), np.ones(3), 0.5, 0.5), np.ones(3))


def test_an_outlier_channel_is_smoothed_and_its_error_falls():
    spec = LayerSpec(WeightSpec(8, 0), ActSpec(6, 0))
    place = bench(rows_with([3, 17]), kernel_of(), spec)
    chosen, before, after = ChooseTransforms(smoothing((0.3, 0.5, 0.8))).best(place, FREE, 0)
    assert after < 0.2 * before
    assert after == pytest.approx(place.error(chosen), rel=1e-5)
    assert chosen.scale[3] > 3 * np.median(chosen.scale)
    assert chosen.rotation is None


def test_a_transform_that_does_not_help_is_left_out():
    place = bench(rows_with([]), kernel_of())

    def harmful(inputs, kernel):
        return np.geomspace(1e-3, 1e3, 32, dtype=np.float32)[None]

    for at in (FREE, PAID):
        chosen, before, after = ChooseTransforms(harmful, shifts=True).best(place, at, 0)
        assert chosen.is_identity
        assert before == after
    forced, before, after = ChooseTransforms(harmful, leave=False).best(place, FREE, 0)
    assert not forced.is_identity
    assert after > before


def test_wide_kernels_are_scored_on_some_of_their_columns():
    wide = kernel_of(k=1024, n=600)
    found = some_columns(wide, SPEC)
    assert found.shape == (1024, LEAST_COLUMNS)
    np.testing.assert_array_equal(found[:, [0, -1]], wide[:, [0, -1]])
    shared = LayerSpec(WeightSpec(4, 0, channel_group=8))
    found = some_columns(wide, shared)
    np.testing.assert_array_equal(found[:, :8], wide[:, :8])
    np.testing.assert_array_equal(found[:, -8:], wide[:, -8:])
    for whole in (wide[:, :40], kernel_of(k=32, n=1200)):
        np.testing.assert_array_equal(some_columns(whole, shared), whole)


def test_what_costs_time_has_to_gain_more_than_what_is_folded():
    # Scales that gain a little: taken where they are free, left where they would be multiplied.
    place = bench(rows_with([]), kernel_of())
    base = place.error(Transform())
    rng = np.random.default_rng(0)
    tried = [np.exp(rng.uniform(-0.2, 0.2, 32)).astype(np.float32) for _ in range(60)]
    little = next(s for s in tried if WORTH_IT * base < place.error(Transform(s)) < base)
    choose = ChooseTransforms(lambda inputs, kernel: little[None])
    assert not choose.best(place, FREE, 0)[0].is_identity
    assert choose.best(place, PAID, 0)[0].is_identity


def test_a_shift_costs_time_where_only_a_scale_is_folded():
    same = ChooseTransforms(lambda inputs, kernel: np.ones((1, 32), np.float32), shifts=True)
    spec = LayerSpec(WeightSpec(8, 0), ActSpec(4, 0, symmetric=True))
    scale_only = Place(("a",), True, scale_only=True)
    gains = {}
    for offset in np.linspace(0, 2, 41):
        rows = rows_with([]) + np.float32(offset) * np.sign(rows_with([], seed=1)[:1])
        place = bench(rows, kernel_of(), spec)
        share = place.error(Transform(shift=place.middle)) / place.error(Transform())
        gains[share] = place
    little = next(place for share, place in gains.items() if WORTH_IT < share < 1)
    for place, at, is_shifted in (
        (little, FREE, True),
        (little, scale_only, False),
        (gains[min(gains)], scale_only, True),
    ):
        assert (same.best(place, at, 0)[0].shift is not None) == is_shifted


def test_an_outlier_is_spread_by_a_rotation():
    spec = LayerSpec(WeightSpec(8, 0), ActSpec(4, 0))
    place = bench(rows_with([3]), kernel_of(), spec)
    chosen, before, after = ChooseTransforms(rotations=("regular",)).best(place, PAID, 0)
    assert (chosen.rotation.kind, chosen.rotation.size) == ("regular", 16)
    assert after < 0.5 * before


def test_a_dense_rotation_has_the_directions_of_the_inputs():
    place = bench(rows_with([3]), kernel_of())
    rotation = place.rotation("pca", Transform(), 0)
    assert rotation.kind == "dense"
    turned = np.asarray(rotation(jnp.asarray(place.inputs.rows))).reshape(-1, 2, 16)
    covariance = np.einsum("mbi,mbj->bij", turned, turned)
    off = covariance - np.stack([np.diag(np.diag(c)) for c in covariance])
    assert np.abs(off).max() < 1e-3 * np.abs(covariance).max()


def test_static_ranges_of_rows_are_one_interval():
    rows = rows_with([3])
    spec = ActSpec(8, 0, symmetric=True, mode="static")
    found = rounded_rows(jnp.asarray(rows), spec)
    np.testing.assert_allclose(found, rounded_by_hand(rows, 8, (0, 1)), atol=1e-3)
    dynamic = dataclasses.replace(spec, mode="dynamic")
    np.testing.assert_array_equal(
        rounded_rows(jnp.asarray(rows), dynamic), fake_quantize(jnp.asarray(rows), dynamic)
    )


def test_repq_vit_gives_every_channel_the_codes_of_its_own_quantizer():
    rng = np.random.default_rng(3)
    rows = rng.uniform(-1, 1, (200, 6)) * np.array([1, 5, 20, 1, 3, 8]) + np.array([0, 2, -9, 0, 1, 4])  # fmt: skip
    low, high = rows.min(0), rows.max(0)
    transform = one_range(LayerInputs(low, high, np.abs(rows).mean(0), rows), 8)
    step = (np.maximum(high, 0) - np.minimum(low, 0)) / 255
    zero = np.round(-np.minimum(low, 0) / step)
    own = np.round(rows / step) + zero
    mapped = (rows - transform.shift) / transform.scale
    shared = np.round(mapped / step.mean() + zero.mean() - 0.0)
    assert np.abs(own - shared).max() <= 1  # zero.mean() is not a whole number


def test_ptq4dit_weights_timesteps_by_how_little_their_salience_is_that_of_the_weights():
    rng = np.random.default_rng(4)
    activations, weights = rng.uniform(1, 9, (3, 8)), rng.uniform(1, 9, 8)
    rho = np.array([spearmanr(row, weights).statistic for row in activations])
    share = np.exp(-rho) / np.exp(-rho).sum()
    expected = sum(s * row for s, row in zip(share, activations, strict=True))
    np.testing.assert_allclose(weighted_salience(activations, weights), expected)
    same = weighted_salience(np.ones((2, 8)), weights)  # no order, no correlation
    np.testing.assert_allclose(same, np.ones(8))


@pytest.fixture(scope="module")
def checkpoint():
    return tiny_checkpoint(depth=2)


@pytest.fixture(scope="module")
def items(checkpoint):
    return collect_items(checkpoint, jax.random.key(0), 8, sampler=ddim(steps=6), batch_size=8)


def test_vidit_q_takes_the_items_nearest_to_noise_whichever_way_time_runs(items):
    chosen = nearest_to_noise(items)
    assert items.timestep[chosen].min() >= np.quantile(items.timestep, 0.7)
    turned = items._replace(timestep=1 - items.timestep / 1000)
    np.testing.assert_array_equal(nearest_to_noise(turned), chosen)


def test_ptq4dm_draws_normally_distributed_timesteps(checkpoint):
    data = CalibrationData(num_samples=64, num_steps=20, batch_size=16, seed=1)
    found = normal_items(checkpoint, data)
    assert len(found.x) == 2 * 4 * 64
    share = found.timestep / 1000
    assert 0.3 < share.mean() < 0.55
    # A standard deviation of half the process puts a good part beyond its ends: they are clipped.
    assert 0.1 < (share == share.min()).mean() < 0.5


def outlying_checkpoint():
    checkpoint = tiny_checkpoint(depth=2)
    params = random_params(checkpoint.model)
    width = checkpoint.model.hidden_size
    scale = np.ones(width, np.float32)
    scale[[2, 9]] = 1 / 40
    paths = [f"blocks_{i}/{n}" for i in (0, 1) for n in ("attn/qkv", "mlp/fc1")]
    return dataclasses.replace(
        checkpoint, params=fold_inputs(params, scale=dict.fromkeys(paths, scale))
    )


@pytest.mark.parametrize("method", [pytest.param("smoothquant", marks=pytest.mark.slow), "best"])
def test_a_network_with_outliers_gains_and_says_where(method):
    full = outlying_checkpoint()
    items = collect_items(full, jax.random.key(1), 8, sampler=ddim(steps=4), batch_size=8)
    data = CalibrationData(items=items, batch_size=16)
    recipe = Recipe.preset("w4a8", full.params, group_size=0)
    told = Told()
    ours = qdit.quantize(full, method, recipe, data=data, progress_fn=told.tell)
    plain = qdit.quantize(full, "rtn", recipe)

    def error(params):
        outputs = [
            Denoiser(p, full.model)(*map(jnp.asarray, items[:3])) for p in (params, full.params)
        ]
        return float(jnp.linalg.norm(outputs[0] - outputs[1]) / jnp.linalg.norm(outputs[1]))

    assert error(ours.params) < 0.5 * error(plain.params)
    places = ours.metadata["quantization"]["transforms"]
    assert set(places) == set(recipe.resolve(full.params))
    gains = [place["after_db"] - place["before_db"] for place in places.values()]
    assert min(gains) >= 0
    assert places["blocks_0/attn/qkv"]["kinds"][0] == "scale"
    assert gains[list(places).index("blocks_0/attn/qkv")] > 6
    assert any("inputs have new coordinates at" in note for note in told.texts)


@pytest.mark.parametrize("numerics", ["simulated", "integer"])
def test_leaves_beside_a_kernel_work_in_both_numerics(items, checkpoint, numerics):
    recipe = Recipe.preset("w8a8", checkpoint.params, group_size=0)
    data = CalibrationData(items=items, batch_size=16)
    quantized = qdit.quantize(checkpoint, "quarot", recipe, data=data)
    flat = flatten_dict(quantized.params, sep="/")
    rotated = [p for p, leaf in flat.items() if isinstance(leaf, Rotation)]
    assert len(rotated) == sum(isinstance(leaf, QTensor) for leaf in flat.values()) == 8
    assert not any(isinstance(leaf, InputMap) for leaf in flat.values())
    model = checkpoint.model.clone(numerics=numerics)
    given = [jnp.asarray(array[:4]) for array in items[:3]]
    found = Denoiser(quantized.params, model)(*given)
    wanted = Denoiser(checkpoint.params, checkpoint.model)(*given)
    assert float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)) < 0.03


def test_a_layer_that_is_no_linear_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(FAMILIES, toy_painter.ROW.name, toy_painter.ROW)
    model = toy_painter.ToyPainter()
    full = qdit.Checkpoint(model, random_params(model))
    recipe = Recipe.preset("w8a8", full.params, layers="down/.*", group_size=4)
    with pytest.raises(ValueError, match="down/spread is not a linear layer"):
        qdit.quantize(full, "convrot", recipe)


def test_beside_groups_the_best_branch_may_be_of_the_inputs():
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((2, 64)).astype(np.float32)
    rows = 20 * rng.standard_normal((256, 2)).astype(np.float32) @ directions
    rows += rng.standard_normal((256, 64)).astype(np.float32)
    kernel = kernel_of(k=64, n=64)

    def own(weight, act):
        return best.branch(kernel, rows[::2], rows[1::2], LayerSpec(weight, act))

    for spec in (
        LayerSpec(WeightSpec(4, 32), ActSpec(8, 32)),
        LayerSpec(WeightSpec(8, 0), ActSpec(8, 32)),
        LayerSpec(WeightSpec(3, 32), None),
    ):
        found = own(spec.weight, spec.act)
        assert found.subspace
        before, after = (branch_error(kernel, b, rows[1::2], spec) for b in (None, found))
        assert after < 0.8 * before
    # One dot a layer: of the kernel alone, and this one has no few directions.
    for weight in (WeightSpec(4, 0), WeightSpec(4, 32, symmetric=True, scale_levels=2)):
        assert own(weight, ActSpec(8, 0)) is None


def test_the_closest_branch_is_taken_and_none_is_none():
    rows, kernel = rows_with([3]), kernel_of()
    made = [
        LowRank(np.zeros((32, 1)), np.zeros((1, 24))),
        weight_branch()(kernel, rows, rows, SPEC),
    ]

    def rule(*found):
        return closest_branch(*(lambda *_, f=f: f for f in found))(kernel, rows, rows, SPEC)

    least = min(made, key=lambda b: branch_error(kernel, b, rows, SPEC))
    assert rule(*made) is least
    assert rule(*made[::-1]) is least
    assert rule(None, made[0]) is made[0]
    assert rule(None, None) is None
