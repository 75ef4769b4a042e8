"""Sensitivities against differences of rollouts; predictions; rank correlation."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.stats
from search_models import batches_of_noise, search, small_model, small_rollout, small_space

from qdit_jax.allocation import Effects
from qdit_jax.allocation.rollouts import OneStep, Sensitivities

NUM_STEPS = 3


@pytest.fixture(scope="module")
def case():
    """Returns a network, a space with 8-bit weights or none, and the effects of its choices."""
    model, params = small_model()
    # Small errors, so that first-order effects are nearly the whole difference.
    space = small_space(params, weight_bits=(8, 16), act_bits=16, group_sizes=(16,))
    rollout = small_rollout(model, NUM_STEPS)
    data = tuple(a[0] for a in batches_of_noise(model, 1, 4))
    found = search.effects(
        OneStep(rollout),
        params,
        None,
        rollout.start(data[0]),
        *data[1:],
        jax.random.key(2),
        space=space,
        num_steps=NUM_STEPS,
        num_probes=3,
    )
    return rollout, params, space, data, jax.tree.map(np.asarray, found)


def test_a_change_is_the_difference_that_one_layer_makes_to_the_final_latents(case):
    rollout, params, space, data, found = case
    run = jax.jit(lambda a: rollout(search.assigned_params(params, space, a), *data))
    exact = run(np.ones(4, np.int32))
    probes = jax.random.normal(jax.random.key(2), (3, *exact.shape))
    for layer in range(4):
        one = np.ones(4, np.int32)
        one[layer] = 0
        gap = np.asarray(run(one) - exact)
        expected = np.einsum("pbhwc,bhwc->bp", probes, gap)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found.change[:, :, layer, 0] / scale, expected / scale, atol=0.1)
    assert np.abs(found.change[..., 1]).max() < 1e-3 * np.abs(found.change).max()
    np.testing.assert_allclose(found.signal, np.square(exact).sum((1, 2, 3)), rtol=1e-4)


@pytest.mark.slow
def test_the_weight_of_a_step_is_how_far_its_errors_grow(case):
    rollout, params, _, (noise, label, keys), found = case
    state, weights = noise, []
    bump = 1e-3 * jax.random.normal(jax.random.key(9), noise.shape)

    @jax.jit
    def rest(x, step):
        for later in range(NUM_STEPS):
            moved = rollout.step(params, rollout.start(x), label, keys, later).x
            x = jax.numpy.where(later > step, moved, x)
        return x

    for step in range(NUM_STEPS):
        state = rollout.step(params, rollout.start(state), label, keys, step).x
        gap = rest(state + bump, step) - rest(state, step)
        weights.append(np.square(gap).sum() / np.square(bump).sum())
    # Two noisy estimates of one trace, from 3 probes and from one bump.
    np.testing.assert_allclose(np.log(found.step_weight), np.log(weights), atol=0.7)


@pytest.mark.slow
def test_the_prediction_at_a_base_is_its_measured_error():
    model, params = small_model()
    space = small_space(params)
    rollout, data = small_rollout(model, NUM_STEPS), batches_of_noise(model, 1, 4)
    base = np.array([1, 2, 0, 3], np.int32)
    found = Sensitivities(rollout, space, params, data, jax.random.key(0), 2)(base)
    objective = search.paired_error(rollout, params, *data)
    measured = search.Evaluator(space, params, objective)(base)[0]
    assert found.joint(base)[0] == pytest.approx(measured, rel=1e-3)
    assert found.additive(base)[0] == pytest.approx(measured, rel=1e-3)


def test_predictions_sum_what_they_say():
    rng = np.random.default_rng(0)
    batch = Effects(rng.normal(size=(5, 2, 3, 4)), rng.normal(size=(5, 3, 4)), *np.ones((2, 5)), 0)
    found = search.prediction([batch, batch])
    assignment = np.array([1, 3, 0])
    picked = batch.change[:, :, np.arange(3), assignment]
    along = batch.along[:, np.arange(3), assignment].sum(axis=1).mean()
    joint = 1 + 2 * along + np.square(picked.sum(axis=2)).mean()
    assert found.joint(assignment)[0] == pytest.approx(joint)
    additive = 1 + 2 * along + np.square(picked).mean(axis=(0, 1)).sum()
    assert found.additive(assignment)[0] == pytest.approx(additive)


def test_rank_correlation_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 40), rng.normal(size=40)
    expected = scipy.stats.spearmanr(a, b + 0.3 * a).statistic
    assert search.rank_correlation(a, b + 0.3 * a) == pytest.approx(expected)
    assert search.rank_correlation(np.ones(5), b[:5]) == 0.0
