"""Inputs weighed by timestep: what equal and zero weights do, how they are measured, who refuses."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import tiny_checkpoint
from told import Told

import qdit_jax as qdit
from qdit_jax import diffusion
from qdit_jax.allocation import Rollouts, measured_timestep_weights
from qdit_jax.calibration import TimestepWeights, collect_items
from qdit_jax.cli import main
from qdit_jax.ptq.rounding import hessians_of
from qdit_jax.sampling import Denoiser, denoiser, sampler_timesteps

STEPS = 4
SAMPLER = diffusion.ddim(STEPS)
TIMESTEPS = sampler_timesteps(SAMPLER)


@pytest.fixture(scope="module")
def full():
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def items(full):
    return collect_items(full, jax.random.key(0), 8, sampler=SAMPLER, batch_size=8)


def rounded(full, items, weights, method="gptq"):
    data = qdit.CalibrationData(items=items, timestep_weights=weights)
    recipe = qdit.Recipe.preset("w4a8", group_size=16)
    return qdit.quantize(full, method, recipe, data=data).params


def differing(a, b):
    flat = [flatten_dict(tree, sep="/") for tree in (a, b)]
    return [
        path
        for path in flat[0]
        if not all(
            np.array_equal(*pair)
            for pair in zip(
                jax.tree.leaves(flat[0][path]), jax.tree.leaves(flat[1][path]), strict=True
            )
        )
    ]


def test_equal_weights_change_nothing_and_zero_leaves_items_out(full, items):
    plain = rounded(full, items, None)
    ones = rounded(full, items, TimestepWeights(TIMESTEPS, (1.0,) * STEPS))
    assert differing(plain, ones) == []
    without = rounded(full, items, TimestepWeights(TIMESTEPS, (1.0, 0.0, 1.0, 1.0)))
    kept = np.flatnonzero(items.timestep != np.float32(TIMESTEPS[1]))
    assert 0 < len(kept) < len(items.x)
    x, timestep, condition = items.taken(kept)
    fewer = items._replace(x=x, timestep=timestep, condition=condition, sample=items.sample[kept])
    assert differing(without, rounded(full, fewer, None)) == []
    assert differing(without, plain) != []


def test_the_hessian_is_the_weighted_sum(full, items):
    weights = TimestepWeights(TIMESTEPS, (3.0, 0.5, 2.0, 0.25))
    network = Denoiser(full.params, full.model)
    path, chosen = "blocks_0/mlp/fc1", np.ones(len(items.x), bool)
    found = hessians_of(network, items, chosen, [path], 5, weights=weights.at(items.timestep))[path]
    total = np.zeros(found.shape)
    for timestep, weight in zip(TIMESTEPS, weights.weights, strict=True):
        at = items.timestep == np.float32(timestep)
        total += weight * np.asarray(hessians_of(network, items, at, [path], 5)[path], np.float64)
    np.testing.assert_allclose(found, total, rtol=1e-4, atol=1e-4 * np.abs(total).max())


def test_a_weight_shifts_the_error_to_other_timesteps(full, items):
    """Weights of one timestep alone lower its output error, against weights of all others alone."""
    path = "blocks_0/mlp/fc1"
    errors = []
    for first in (1.0, 0.0):
        weights = TimestepWeights(TIMESTEPS, (first, *(3 * [1.0 - first])))
        data = qdit.CalibrationData(items=items, holdout=0, timestep_weights=weights)
        recipe = qdit.Recipe((qdit.Rule(path, qdit.LayerSpec(qdit.WeightSpec(2, 0))),))
        q = qdit.quantize(full, "gptq", recipe, data=data).params["blocks_0"]["mlp"]["fc1"][
            "kernel"
        ]
        at = items.timestep == np.float32(TIMESTEPS[0])
        network = Denoiser(full.params, full.model)
        hessian = np.asarray(hessians_of(network, items, at, [path], 8)[path], np.float64)
        gap = np.asarray(qdit.dequantize(q)) - full.params["blocks_0"]["mlp"]["fc1"]["kernel"]
        errors.append(float(np.einsum("kn,kl,ln->", gap, hessian, gap)))
    assert errors[0] < 0.95 * errors[1]


def test_effects_are_those_of_one_rounded_step(full):
    recipe = qdit.Recipe.preset("w4a8", group_size=16)
    rollouts = Rollouts(num_steps=STEPS, num_batches=1, batch_size=3, guidance=None)
    told = Told()
    found = measured_timestep_weights(
        full, jax.random.key(3), recipe=recipe, rollouts=rollouts, progress_fn=told.tell
    )
    assert sum(told.counts) == STEPS
    assert found.timesteps == TIMESTEPS
    assert np.mean(found.weights) == pytest.approx(1)
    from qdit_jax.allocation import seeds

    noise, label, _ = jax.tree.map(lambda a: a[0], seeds(full.model, jax.random.key(3), 1, 3))
    small = qdit.quantize_params(full.params, recipe=recipe)
    call = jax.jit(lambda fn, *given: fn(*given))
    nets = [denoiser(full.model, params, None) for params in (full.params, small)]

    def final(lowered):
        x = noise
        for step in range(STEPS):
            row = jax.tree.map(lambda leaf, step=step: np.asarray(leaf)[step], SAMPLER.table)
            network = nets[step == lowered]
            x = SAMPLER.step(lambda *a, n=network: call(n, *a), x, label, row, None).x_next
        return np.asarray(x, np.float64)

    exact = final(None)
    effects = np.array([np.square(final(step) - exact).mean() for step in range(STEPS)])
    np.testing.assert_allclose(found.weights, effects / effects.mean(), rtol=0.05)


def test_a_recipe_of_weights_alone_is_measured_too(full):
    found = measured_timestep_weights(
        full,
        jax.random.key(0),
        recipe=qdit.Recipe.preset("w4a16", group_size=16),
        rollouts=Rollouts(num_steps=2, num_batches=1, batch_size=2),
    )
    assert min(found.weights) > 0


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "brecq"])
def test_methods_that_cannot_refuse(full, items, method):
    with pytest.raises(ValueError, match=f"method '{method}' does not weigh its inputs"):
        rounded(full, items, TimestepWeights(TIMESTEPS, (1.0,) * STEPS), method)


def test_wrong_weights_are_named():
    for timesteps, weights, message in (
        ((1,), (1, 2), "1 timesteps and 2 weights"),
        ((1,), (-1,), r"weight -1.0 of timestep 1.0 is not supported"),
        ((1,), (float("nan"),), "weight nan"),
        ((1, 2), (0, 0), "all weights of timesteps are 0"),
    ):
        with pytest.raises(ValueError, match=message):
            TimestepWeights(timesteps, weights)


def test_weights_that_leave_a_side_empty_are_refused(full, items):
    one = items._replace(timestep=np.full_like(items.timestep, 10.0))
    with pytest.raises(ValueError, match="leave no inputs to fit to"):
        rounded(full, one, TimestepWeights((0.0, 900.0), (0.0, 1.0)))


def test_the_command_line_measures_and_says_so(full, tmp_path, capsys):
    qdit.save(tmp_path / "full", full)
    given = ["quantize", str(tmp_path / "full"), str(tmp_path / "out"), "--recipe", "w4a8"]
    given += ["--group-size", "16", "--weight-timesteps"]
    assert main([*given, "--method", "smoothquant"]) == 2
    printed = capsys.readouterr().err
    assert "--weight-timesteps has no effect: --method smoothquant does not round by" in printed
    sampling = ["--num-samples", "4", "--steps", "4", "--batch-size", "4"]
    assert main([*given, "--method", "gptq", *sampling]) == 0
    assert "by their timestep, the most at timestep" in capsys.readouterr().out
    told = qdit.load(tmp_path / "out").metadata["quantization"]["data"]
    assert len(told["timestep_weights"]["weights"]) == 4
