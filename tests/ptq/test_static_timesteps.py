"""Static activation scales by timestep: chosen in the denoiser, one or a sample, saved and loaded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qdit_jax as qdit
from qdit_jax import diffusion
from qdit_jax.ptq import quantize_params
from qdit_jax.quant import ActQuant, ActSpec, select_timestep
from qdit_jax.recipes import Recipe
from qdit_jax.sampling import Denoiser, denoiser, initial_noise
from qdit_jax.testing import realistic_dit

STEPS = 4


@pytest.fixture(scope="module")
def network():
    model, params = realistic_dit(0, hidden_size=48, depth=1, num_heads=4)
    stats = qdit.calibrate(
        qdit.Checkpoint(model, params), jax.random.key(0), 2, sampler=qdit.ddim(steps=STEPS)
    )
    return model, params, stats


@jax.jit
def call(denoise_fn, x, timestep, label):
    return denoise_fn(x, timestep, label)


def quantized(network, **options):
    _, params, stats = network
    recipe = Recipe.preset("w8a8", params, group_size=0, act_mode="static", **options)
    return quantize_params(params, recipe=recipe, stats=stats)


def only_row(params, row):
    return jax.tree.map(
        lambda leaf: leaf.at(row) if isinstance(leaf, ActQuant) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, ActQuant),
    )


def inputs(model, num):
    x = jax.random.normal(jax.random.key(1), (num, 8, 8, 4))
    return x, jnp.arange(num) % model.num_classes


def test_the_row_of_the_nearest_timestep_is_chosen():
    table = ActQuant(
        ActSpec(8, 0, mode="static", per_timestep=True),
        jnp.array([[1.0], [2.0], [3.0]]),
        jnp.zeros((3, 1)),
        jnp.array([900.0, 500.0, 0.0]),
    )
    for timestep, row in [(999, 1.0), (701, 1.0), (699, 2.0), (251, 2.0), (249, 3.0)]:
        assert table.at_timestep(timestep).scale == row
    rows = jax.jit(lambda t: table.at_timestep(t).scale)(jnp.array([0, 999, 500]))
    np.testing.assert_array_equal(rows[:, 0, 0], [3, 1, 2])
    plain = ActQuant(ActSpec(8, 0))
    assert select_timestep({"a": plain}, 5)["a"] is plain


def test_each_row_covers_what_was_seen_at_its_timestep(network):
    stats = network[2]
    act = quantized(network, per_timestep=True)["blocks_0"]["attn"]["qkv"]["act_quant"]
    low, high = stats.low["blocks_0/attn/qkv"].min(1), stats.high["blocks_0/attn/qkv"].max(1)
    np.testing.assert_allclose(act.scale[:, 0], (high - low) / 255, rtol=1e-5)
    np.testing.assert_array_equal(act.timesteps, stats.timesteps)
    assert act.scale.shape == (STEPS, 1)


@pytest.mark.parametrize("numerics", ["simulated", "integer"])
def test_samples_of_one_batch_may_stand_at_different_timesteps(network, numerics):
    model, _, stats = network
    params, model = quantized(network, per_timestep=True), model.clone(numerics=numerics)
    x, label = inputs(model, STEPS)
    timestep = jnp.asarray(stats.timesteps, jnp.float32)
    mixed = call(Denoiser(params, model), x, timestep, label)
    for i in (0, STEPS - 1):
        one = slice(i, i + 1)
        row = only_row(params, i)
        alone = call(Denoiser(row, model), x[one], timestep[one], label[one])
        np.testing.assert_allclose(mixed[one], alone, atol=2e-4 * float(jnp.abs(alone).max()))


def test_the_table_is_indexed_inside_the_sampling_loop(network):
    model, _, stats = network
    params = quantized(network, per_timestep=True)
    noise, label = inputs(model, 2)
    sampler = qdit.ddim(steps=STEPS)
    looped = diffusion.sample(denoiser(model, params, guidance=1.5), sampler, noise, label)
    _, step = diffusion.sample_trajectory(
        denoiser(model, params, guidance=1.5), sampler, noise, label
    )
    for i, timestep in list(enumerate(np.asarray(step.timestep)))[::2]:
        assert timestep == stats.timesteps[i]
        by_hand = denoiser(model, only_row(params, i), guidance=1.5)
        output = call(by_hand, step.x[i], jnp.full(2, timestep), label)
        np.testing.assert_allclose(output, step.output[i], atol=1e-3 * jnp.abs(output).max())
    np.testing.assert_array_equal(looped, step.x_next[-1])


def test_a_table_is_nearer_to_full_precision_than_one_range(network):
    model, params, _ = network
    noise, keys = initial_noise(jax.random.key(0), jnp.arange(2), (8, 8, 4))
    full = denoiser(model, params, guidance=1.5)
    _, step = diffusion.sample_trajectory(full, qdit.ddim(steps=STEPS), noise, jnp.arange(2), keys)
    x = step.x.reshape(-1, 8, 8, 4)  # every step, as one batch
    timestep, label = jnp.repeat(step.timestep, 2), jnp.tile(jnp.arange(2), STEPS)
    expected = call(Denoiser(params, model), x, timestep, label)

    def error(**options):
        out = call(Denoiser(quantized(network, **options), model), x, timestep, label)
        return float(jnp.linalg.norm(out - expected))

    assert error(per_timestep=True) < error()


def test_a_checkpoint_keeps_its_table(network, tmp_path):
    model, _, _ = network
    params = quantized(network, per_timestep=True)
    qdit.save(tmp_path / "out", qdit.Checkpoint(model, params))
    loaded = qdit.load(tmp_path / "out").params
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    act = loaded["blocks_0"]["mlp"]["fc2"]["act_quant"]
    assert act.spec.per_timestep
    assert act.timesteps.shape == (STEPS,)


def test_errors_name_the_remedy(network):
    model, _, _ = network
    x, label = inputs(model, 1)
    params = quantized(network, per_timestep=True)
    with pytest.raises(ValueError, match=r"select_timestep\(params, timestep\)"):
        jax.eval_shape(model.apply, {"params": params}, x, jnp.zeros(1), label)
    selected = select_timestep(params, jnp.zeros(1))
    out = jax.eval_shape(model.apply, {"params": selected}, x, jnp.zeros(1), label)
    assert out.shape == (1, 8, 8, 8)
    with pytest.raises(ValueError, match="per_timestep=True needs mode='static'"):
        ActSpec(8, 0, per_timestep=True)
