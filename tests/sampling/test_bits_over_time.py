"""Bits of activations by timestep: one program, the right network at every step, saved and loaded."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_checkpoint

import qdit_jax as qdit
from qdit_jax import diffusion
from qdit_jax.ptq import quantize_in_order, schedule_act_bits
from qdit_jax.quant import (
    OVER_TIME,
    ActQuant,
    ActSpec,
    bits_over_time,
    formats,
    quantize_array,
    ranges,
    static_act_quant,
    with_act_bits,
)
from qdit_jax.quant.over_time import with_bits
from qdit_jax.recipes import OverTime, Recipe
from qdit_jax.recipes.over_time import step_numbers
from qdit_jax.sampling import Denoiser, checkpoint_sampler, denoiser, sampler_timesteps

STEPS = 4
SETTINGS = {"ddim": diffusion.ddim(STEPS), "ddpm": diffusion.ddpm(STEPS)}


@pytest.fixture(scope="module")
def checkpoint():
    return qdit.quantize(tiny_checkpoint(), "rtn", Recipe.preset("w4a4", group_size=16))


def scheduled(checkpoint, sampler, steps):
    return schedule_act_bits(checkpoint, OverTime.at_steps(sampler_timesteps(sampler), steps))


def start(num=3):
    noise = jax.random.normal(jax.random.key(1), (num, 4, 4, 4))
    return noise, jnp.arange(num), jax.random.split(jax.random.key(2), num)


call = jax.jit(lambda denoise_fn, *args: denoise_fn(*args))


def by_hand(checkpoint, sampler, act_bits, guidance):
    """Returns the samples of a loop that calls a different network at every step."""
    x, label, keys = start()
    for step, bits in enumerate(act_bits):
        params = with_act_bits(checkpoint.params, bits)
        row = jax.tree.map(lambda leaf, step=step: jnp.asarray(leaf)[step], sampler.table)
        noise = None
        if sampler.stochastic:
            drawn = [jax.random.fold_in(key, step) for key in keys]
            noise = jnp.stack([jax.random.normal(key, x.shape[1:]) for key in drawn])
        denoise_fn = partial(call, denoiser(checkpoint.model, params, guidance))
        x = sampler.step(denoise_fn, x, label, row, noise).x_next
    return x


@pytest.mark.parametrize(("name", "guidance"), [("ddim", None), ("ddpm", 1.5)])
def test_every_step_runs_the_network_of_its_bits(checkpoint, name, guidance):
    sampler = SETTINGS[name]
    act_bits = (16, None, 8, 16)
    found = scheduled(checkpoint, sampler, {"0,-1": 16, "2": 8})
    denoise_fn = denoiser(found.model, found.params, guidance)
    samples = diffusion.sample(denoise_fn, sampler, *start())
    np.testing.assert_allclose(
        samples, by_hand(checkpoint, sampler, act_bits, guidance), rtol=1e-3, atol=1e-3
    )
    others = by_hand(checkpoint, sampler, (None,) * STEPS, guidance)
    assert np.abs(samples - others).max() > 0.01


def test_a_flow_follows_its_own_timesteps():
    model = tiny_checkpoint(velocity=True, learn_sigma=False)
    checkpoint = qdit.quantize(model, "rtn", Recipe.preset("w4a4", group_size=16))
    sampler = diffusion.flow(STEPS)
    found = scheduled(checkpoint, sampler, {"0-1": 16})
    samples = diffusion.sample(denoiser(found.model, found.params, None), sampler, *start())
    expected = by_hand(checkpoint, sampler, (16, 16, None, None), None)
    np.testing.assert_allclose(samples, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "velocity"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler"}, False),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, False),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, True),
    ],
)
def test_a_checkpoints_own_scheduler_is_followed(scheduler, velocity):
    full = tiny_checkpoint(velocity=velocity, learn_sigma=False)
    full = dataclasses.replace(full, metadata={"scheduler": scheduler})
    sampler = checkpoint_sampler(full, STEPS)
    small = qdit.quantize(full, "rtn", Recipe.preset("w4a4", group_size=16))
    found = scheduled(small, sampler, {"1": 16, "last": "a8"})
    timesteps = jnp.asarray(sampler_timesteps(sampler))
    level = jnp.array([0, 1, 0, 2])
    networks = [Denoiser(with_act_bits(small.params, bits), full.model) for bits in (None, 16, 8)]

    def by_hand(x, timestep, condition):  # all three, of which one is taken
        outputs = jnp.stack([network(x, timestep, condition) for network in networks])
        nearest = level[jnp.abs(timestep[0] - timesteps).argmin()]
        return outputs[nearest]

    samples = diffusion.sample(denoiser(full.model, found.params, None), sampler, *start())
    expected = diffusion.sample(by_hand, sampler, *start())
    plain = diffusion.sample(networks[0], sampler, *start())
    away = [float(np.linalg.norm(np.asarray(other - expected))) for other in (samples, plain)]
    assert away[0] < 0.1 * away[1]  # a value near a tie may round the other way


def test_one_timestep_per_token_is_refused(checkpoint):
    table = bits_over_time([900, 100], [16, None])
    with pytest.raises(ValueError, match=r"timestep has shape \(2, 7\); .* one number per sample"):
        table.at(jnp.zeros((2, 7)))


@pytest.mark.parametrize("jitted", [False, True])
def test_samples_of_one_batch_may_have_different_bits(checkpoint, jitted):
    table = bits_over_time([900, 100], [16, None])
    x, label, _ = start()
    timestep = jnp.array([999, 0, 800])
    mixed = Denoiser({**checkpoint.params, OVER_TIME: table}, checkpoint.model)
    found = call(mixed, x, timestep, label) if jitted else mixed(x, timestep, label)
    for bits, samples in ((16, [0, 2]), (None, [1])):
        alone = Denoiser(with_act_bits(checkpoint.params, bits), checkpoint.model)
        expected = call(alone, x, timestep, label)
        np.testing.assert_allclose(
            found[jnp.array(samples)], expected[jnp.array(samples)], rtol=1e-4, atol=1e-4
        )


def test_schedules_of_the_same_bits_share_one_compilation(checkpoint):
    sampler = SETTINGS["ddim"]
    loop = diffusion.loop._sample_loop
    before = None
    for steps in ({"0": 16}, {"1,3": 16}, {"1-3": 16}):
        act_bits = OverTime.at_steps(sampler_timesteps(sampler), steps).act_bits
        table = bits_over_time(sampler_timesteps(sampler), act_bits, (None, 16))
        denoise_fn = denoiser(checkpoint.model, {**checkpoint.params, OVER_TIME: table}, None)
        diffusion.sample(denoise_fn, sampler, *start())
        before = loop._cache_size() if before is None else before
    assert loop._cache_size() == before


def test_no_kernel_is_held_twice(checkpoint):
    sampler = SETTINGS["ddim"]
    found = scheduled(checkpoint, sampler, {"0": 16})
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert size(found.params) - size(checkpoint.params) == 8 * STEPS  # timesteps and levels


@pytest.mark.parametrize("name", ["saved", "saved.safetensors"])
def test_a_saved_checkpoint_samples_the_same(checkpoint, tmp_path, name):
    sampler = SETTINGS["ddim"]
    found = scheduled(checkpoint, sampler, {"0-1": 16})
    qdit.save(tmp_path / name, found)
    loaded = qdit.load(tmp_path / name)
    assert loaded.recipe == found.recipe
    assert loaded.params[OVER_TIME].bits == (16, None)
    label = np.arange(4)
    samples = [qdit.generate(c, sampler, label) for c in (found, loaded, checkpoint)]
    np.testing.assert_array_equal(samples[0], samples[1])
    assert np.abs(samples[0] - samples[2]).max() > 0.01


def test_a_recipe_says_it_to_every_way_of_quantizing(checkpoint, tmp_path):
    full = tiny_checkpoint()
    over_time = OverTime.at_steps(sampler_timesteps(SETTINGS["ddim"]), {"0": 16})
    recipe = dataclasses.replace(checkpoint.recipe, over_time=over_time)
    acts_only = dataclasses.replace(Recipe.preset("w16a4", group_size=16), over_time=over_time)
    trees = [
        qdit.quantize_params(full.params, recipe=recipe),
        qdit.quantize(full, "rtn", recipe, out=tmp_path / "out").params,
        quantize_in_order(
            full.params,
            recipe=acts_only,
            hessians_fn=lambda params, paths: ({}, None),
            round_fn=lambda w, hessian, spec: quantize_array(w, spec),
            stages=[],
        ),
    ]
    for params in trees:
        np.testing.assert_array_equal(params[OVER_TIME].level, [0, 1, 1, 1])
    assert (
        OVER_TIME not in schedule_act_bits(dataclasses.replace(full, params=trees[0]), None).params
    )


def test_integer_numerics_follow_the_schedule(checkpoint):
    sampler = SETTINGS["ddim"]
    found = scheduled(checkpoint, sampler, {"0": 16})
    samples = [
        qdit.generate(found, sampler, np.arange(2), guidance=None, numerics=numerics)
        for numerics in ("simulated", "integer")
    ]
    np.testing.assert_allclose(*samples, rtol=0.05, atol=0.05)


def test_json_round_trip_and_older_recipes(tmp_path):
    plain = Recipe.preset("w4a4")
    assert "over_time" not in plain.to_json()
    assert Recipe.from_json(plain.to_json()).over_time is None
    recipe = dataclasses.replace(plain, over_time=OverTime((900, 0.5), (16, None)))
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.to_json()))
    assert Recipe.from_json(file) == recipe
    assert recipe != plain


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"timesteps": [1]}, "an object with timesteps and act_bits"),
        ({"timesteps": [1], "act_bits": [8, 8]}, "1 timesteps and 2 act_bits"),
        ({"timesteps": [1], "act_bits": [9]}, "act_bits=9 is not supported"),
        ({"timesteps": [float("nan")], "act_bits": [8]}, "not a finite number"),
        ({"timesteps": 3, "act_bits": [8]}, "not iterable"),
    ],
)
def test_a_wrong_schedule_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_json({**Recipe.preset("w4a4").to_json(), "over_time": data})


def test_steps_by_number():
    assert step_numbers("0-3,-1", 50) == [0, 1, 2, 3, 49]
    for text, message in (
        ("first", "'first' is not a step"),
        ("3-50", "not within the 50"),
        ("-51", "not within"),
        ("-3-2", "a range starts at 0"),
    ):
        with pytest.raises(ValueError, match=message):
            step_numbers(text, 50)


def test_a_schedule_without_effect_or_sense_is_refused():
    full = tiny_checkpoint()
    over_time = OverTime((900.0,), (8,))
    with pytest.raises(ValueError, match="none is quantized"):
        schedule_act_bits(qdit.quantize(full, "rtn", "w4a16"), over_time)
    spec = qdit.LayerSpec(None, ActSpec(fmt=formats.by_name("fp8_e4m3")))
    recipe = Recipe((qdit.Rule("blocks_0/mlp/fc1", spec),))
    params = qdit.quantize_params(full.params, recipe=recipe)
    coded = dataclasses.replace(full, params=params)
    with pytest.raises(ValueError, match=r"blocks_0/mlp/fc1/act_quant has format 'fp8_e4m3'"):
        schedule_act_bits(coded, OverTime((900.0,), (4,)))
    bits16 = schedule_act_bits(coded, OverTime((900.0, 0.0), (16, None)))
    assert bits16.params[OVER_TIME].bits == (16, None)


@pytest.mark.parametrize("spec", [
    ActSpec(8, 4, mode="static"),
    ActSpec(8, 4, symmetric=True, mode="static", range_fn=ranges.absmax),
    ActSpec(8, 4, symmetric=True, unsigned=True, shift=0.2, mode="static"),
])  # fmt: skip
def test_a_static_quantizer_keeps_its_range(spec):
    low, high = jnp.array([-0.2, -0.1]), jnp.array([1.0, 3.0])
    found = with_bits(static_act_quant(low, high, spec), 5)
    expected = static_act_quant(low, high, dataclasses.replace(spec, bits=5))
    assert isinstance(found, ActQuant)
    assert found.spec == expected.spec
    np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-5)
    if expected.zero_point is not None:
        np.testing.assert_allclose(found.zero_point, expected.zero_point, atol=1)
