"""Modulation computed before the loop: the same samples, and NaN where it would not be the same."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qdit_jax as qdit
from qdit_jax.diffusion import euler, heun
from qdit_jax.models import RUNS, DiT
from qdit_jax.sampling import (
    HoistedDenoiser,
    batch_denoisers,
    check_hoisting,
    denoiser,
    hoisted,
    sampler_timesteps,
)
from qdit_jax.sampling.own_samplers import has_known_calls
from qdit_jax.sampling.spare_memory import spare_bytes

LABELS = jnp.array([1, 4, 2])
NETWORKS = {
    "dit": {"depth": 2},
    "dit in runs": {"depth": 8},
    "sit": {"depth": 2, "velocity": True},
    "bfloat16": {"depth": 2, "dtype": "bfloat16"},
}


def network(**settings):
    model = DiT(input_size=8, hidden_size=32, num_heads=2, num_classes=6, **settings)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda a: 0.2 * rng.normal(size=a.shape).astype("f"), shapes)


def sampler_of(model):
    return qdit.flow(steps=4) if model.velocity else qdit.ddim(steps=4)


def noise_of(batch):
    return jax.random.normal(jax.random.key(0), (batch, 8, 8, 4))


@pytest.mark.parametrize("name", NETWORKS)
def test_samples_are_those_of_the_network(name):
    model, params = network(**NETWORKS[name])
    sampler = sampler_of(model)
    noise = noise_of(3)
    fast = hoisted(model, params, sampler_timesteps(sampler), LABELS, 1.5)
    assert (RUNS in fast.denoise_fn.params) == (name == "dit in runs")
    found = qdit.sample(fast, sampler, noise, LABELS)
    expected = qdit.sample(denoiser(model, params, 1.5), sampler, noise, LABELS)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_quantized_modulation_is_computed_as_in_the_loop():
    model, params = network(depth=2)
    layers = r".*/adaLN_modulation"
    recipe = qdit.Recipe.preset("w8a8", params, layers=layers, group_size=16)
    params = qdit.quantize_params(params, recipe=recipe)
    sampler = sampler_of(model)
    fast = hoisted(model, params, sampler_timesteps(sampler), LABELS, None)
    found = qdit.sample(fast, sampler, noise_of(3), LABELS)
    expected = qdit.sample(denoiser(model, params, None), sampler, noise_of(3), LABELS)
    np.testing.assert_allclose(found, expected, atol=1e-2 * float(jnp.abs(expected).max()))


def test_the_weights_of_the_modulation_are_not_read():
    model, params = network(depth=2)
    fast = hoisted(model, params, [7.0, 3.0], LABELS, None)
    gone = {
        name: {**params[name], "adaLN_modulation": {}}
        for name in ("blocks_0", "blocks_1", "final_layer")
    }
    fast = dataclasses.replace(fast, params={**params, **gone})
    x, timestep = noise_of(3), jnp.full(3, 3.0)
    expected = denoiser(model, params, None)(x, timestep, LABELS)
    np.testing.assert_allclose(fast(x, timestep, LABELS), expected, rtol=1e-4, atol=1e-4)


def test_another_timestep_or_condition_is_nan():
    model, params = network(depth=2)
    fast = hoisted(model, params, [7.0, 3.0], LABELS, 1.5)
    x = noise_of(3)
    assert np.isfinite(fast(x, jnp.full(3, 7.0), LABELS)).all()
    assert np.isnan(fast(x, jnp.full(3, 4.0), LABELS)).all()
    assert np.isnan(fast(x, jnp.array([7.0, 3.0, 7.0]), LABELS)).all()
    assert np.isnan(fast(x, jnp.full(3, 7.0), LABELS[::-1])).all()
    with pytest.raises(ValueError, match="hoisted were"):
        fast(x[:2], jnp.full(2, 7.0), LABELS[:2])


def test_what_cannot_be_hoisted_is_refused_by_name():
    model, params = network(depth=2)
    with pytest.raises(ValueError, match="take 0 MB, more than most_bytes=1000"):
        hoisted(model, params, [7.0, 3.0], LABELS, most_bytes=1000)
    with pytest.raises(ValueError, match=r"no condition says .* use generate\(hoist=True\)"):
        hoisted(model, params, [7.0, 3.0], None)
    with pytest.raises(ValueError, match="blocks in runs, cannot be hoisted"):
        hoisted(model, {**params, RUNS: {}}, [7.0], LABELS)


def test_generating_computes_it_for_every_batch():
    model, params = network(depth=2)
    checkpoint, sampler = qdit.Checkpoint(model, params), sampler_of(model)
    labels = jnp.arange(5)
    told = {"guidance": 1.5, "batch_size": 2}
    found = qdit.generate(checkpoint, sampler, labels, hoist=True, **told)
    expected = qdit.generate(checkpoint, sampler, labels, **told)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def hoisted_batches(monkeypatch, spare, **told):
    """Returns samples, how many batches had known modulation, and what they should be."""
    model, params = network(depth=2)
    checkpoint, labels = qdit.Checkpoint(model, params), jnp.arange(5)
    told = {"sampler": sampler_of(model), "guidance": 1.5, "batch_size": 2, **told}
    expected = qdit.generate(checkpoint, condition=labels, **told, hoist=False)
    calls = []
    jax.clear_caches()  # so that it is traced once more
    monkeypatch.setattr(batch_denoisers, "spare_bytes", lambda params: spare)
    inner = HoistedDenoiser.__call__
    monkeypatch.setattr(HoistedDenoiser, "__call__", lambda *a: calls.append(a) or inner(*a))
    return qdit.generate(checkpoint, condition=labels, **told), len(calls), expected


@pytest.mark.parametrize(("spare", "is_hoisted"), [(2**20, True), (100, False), (0, False)])
def test_by_default_it_is_computed_where_memory_allows(monkeypatch, spare, is_hoisted):
    found, calls, expected = hoisted_batches(monkeypatch, spare)
    assert bool(calls) == is_hoisted
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_by_default_no_sampler_that_might_look_elsewhere_has_it(monkeypatch):
    known = qdit.ddim(steps=3)

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True, eq=False)
    class Own(type(known)):
        pass

    def rule(*args):
        return euler(*args)

    fields = {field.name: getattr(known, field.name) for field in dataclasses.fields(known)}
    assert has_known_calls(known)
    assert not has_known_calls(qdit.flow(steps=3, solve_fn=rule))
    found, calls, expected = hoisted_batches(monkeypatch, 2**20, sampler=Own(**fields))
    assert calls == 0
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_device_says_what_it_can_spare(monkeypatch):
    params = {"kernel": np.zeros((100, 10), np.float32)}
    assert spare_bytes(params) == 0  # on CPU nothing is gained

    def spare_on(stats):
        device = SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        return spare_bytes(params)

    assert spare_on({"bytes_limit": 100_000, "bytes_in_use": 20_000}) == 16_000
    assert spare_on({"bytes_limit": 10_000}) == 0
    assert spare_on({"bytes_limit": 2**40}) == 2**30
    assert spare_on({}) == spare_on(None) == 0


@pytest.mark.parametrize("flow_times", [(0.0, 1.0), (1000.0, 0.0)])
def test_a_rule_that_looks_at_the_end_of_a_step_finds_it(flow_times):
    model, params = network(depth=2, velocity=True)
    checkpoint, labels = qdit.Checkpoint(model, params), jnp.arange(2)
    sampler = qdit.flow(steps=7, solve_fn=heun, flow_times=flow_times)
    found = qdit.generate(checkpoint, sampler, labels, hoist=True, guidance=None)
    expected = qdit.generate(checkpoint, sampler, labels, guidance=None)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"first_frames": np.zeros(1)}, "first frames have timesteps of their own"),
        ({"shard_tokens": 2}, "takes whole samples, and shard_tokens is 2."),
    ],
)
def test_samples_that_cannot_have_it_are_refused(settings, sentence):
    model, params = network(depth=2)
    with pytest.raises(ValueError, match=sentence):
        check_hoisting(model, params, **settings)
