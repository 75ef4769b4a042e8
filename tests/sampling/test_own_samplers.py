"""Samplers that checkpoints bring, of networks with units, shifts and guidance of their own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny_models import tiny_checkpoint

from qdit_jax import diffusion, sampling
from qdit_jax.allocation.rollouts import Rollout
from qdit_jax.calibration import calibrate, collect_items
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.errors import UserError
from qdit_jax.models import NetworkModule, embeds_guidance, example_inputs, with_guidance

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
DYNAMIC = EULER | {"use_dynamic_shifting": True}


class ToyFlow(NetworkModule):
    """A small network of a velocity with embeddings of prompts, and guidance embedded or not."""

    embedded: bool = False
    size: int = 4

    prediction = "velocity"
    learned_variance = False
    guided_channels = None
    default_sampler = "flow-euler"
    flow_times = (1000.0, 0.0)
    velocity_to = "noise"

    @nn.compact
    def __call__(self, x: Any, timestep: Any, condition: Any) -> Any:
        given = self.layers.linear(2, name="caption")(condition["text"].mean(1))
        if self.embedded:
            given = given * condition["guidance"][:, None]
        hidden = x + given[:, None, None] + (timestep / 1000)[:, None, None, None]
        return self.layers.linear(2, name="out")(nn.silu(hidden))

    @property
    def has_null(self) -> bool:
        return not self.embedded

    def sample_shape(self) -> tuple[int, ...]:
        return (self.size, self.size, 2)

    def example_condition(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        found = {"text": jax.ShapeDtypeStruct((batch, 3, 5), jnp.float32)}
        guidance = jax.ShapeDtypeStruct((batch,), jnp.float32)
        return found | ({"guidance": guidance} if self.embedded else {})

    def all_conditions(self) -> None:
        return None

    def null_condition(self, condition: Any, params: Any) -> Any:
        return None if self.embedded else {"text": jnp.zeros_like(condition["text"])}

    def check_condition(self, condition: Any) -> None:
        if set(condition) != set(self.example_condition(1)):
            raise ValueError(f"condition has {sorted(condition)}.")

    def example_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        return example_inputs(self, batch)


class ByTokens(ToyFlow):
    flow_shift = "tokens"
    flow_spacing = "uniform"

    def num_tokens(self, shape: tuple[int, ...]) -> int:
        return shape[0] * shape[1] // 4


class ByResolution(ToyFlow):
    flow_shift = "resolution"

    def resolution_of(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        return 8 * shape[0], 8 * shape[1], 1


class Shifted(ToyFlow):
    flow_shift = 3.0
    flow_spacing = "trained"


class Untold(ToyFlow):
    flow_shift = "tokens"


class Unipc(ToyFlow):
    default_sampler = "unipc"
    flow_shift = 5.0


def made(kind: type = ToyFlow, scheduler: Any = None, **fields: Any) -> Checkpoint:
    model = kind(**fields)
    inputs = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), model.example_inputs(1))
    params = model.init(jax.random.key(0), *inputs)["params"]
    return Checkpoint(model, params, metadata={"scheduler": scheduler} if scheduler else {})


def prompts(count: int = 3, **more: Any) -> dict[str, Any]:
    text = np.random.default_rng(3).standard_normal((count, 3, 5)).astype(np.float32)
    return {"text": text, **more}


def sigmas_of(sampler: Any) -> np.ndarray:
    return np.asarray(sampler.table.timestep, np.float64) / 1000


OWN = [
    (ToyFlow, {}, {"shift": 1.0}),
    (ByTokens, {}, {"shift": diffusion.dynamic_shift(4)}),
    (ByTokens, {"shape": (16, 32, 2)}, {"shift": diffusion.dynamic_shift(128)}),
    (ByResolution, {"shape": (64, 16, 2)}, {"shift": diffusion.resolution_shift(512, 128)}),
    (Shifted, {}, {"shift": 3.0, "spacing": "trained"}),
    (Shifted, {"shift": 7.0}, {"shift": 7.0, "spacing": "trained"}),
    (Shifted, {"spacing": "wan"}, {"shift": 3.0, "spacing": "wan"}),
    (Untold, {"shift": 2.0}, {"shift": 2.0}),
]


@pytest.mark.parametrize(("kind", "given", "expected"), OWN)
def test_a_network_says_its_own_shift_and_spacing(kind, given, expected):
    sampler = sampling.checkpoint_sampler(made(kind), 6, **given)
    levels = diffusion.flow_match_sigmas(6, **{"spacing": "uniform"} | expected)
    np.testing.assert_allclose(sigmas_of(sampler), levels[:-1], atol=1e-6)
    assert sampler.velocity_to == "noise"


def test_what_a_network_does_not_tell_is_asked_for():
    with pytest.raises(ValueError, match=r"flow_shift='tokens' follows from a sample's size"):
        sampling.checkpoint_sampler(made(Untold), 6)
    with pytest.raises(UserError, match=r"use_dynamic_shifting=True: its shift depends"):
        sampling.checkpoint_sampler(made(Untold, DYNAMIC), 6)
    with pytest.raises(UserError, match=r"num_train_timesteps=500, but the network's time"):
        sampling.checkpoint_sampler(made(scheduler=EULER | {"num_train_timesteps": 500}), 6)
    with pytest.raises(ValueError, match=r"shift=2.0 is an option of flow-euler, .*unipc, not of"):
        sampling.checkpoint_sampler(made(), 6, sampler="flow", shift=2.0)


def test_a_scheduler_goes_before_what_the_network_says():
    shape = (64, 64, 2)
    sampler = sampling.checkpoint_sampler(made(ByTokens, DYNAMIC), 6, shape=shape)
    levels = diffusion.flow_match_sigmas(6, shift=diffusion.dynamic_shift(1024), spacing="uniform")
    np.testing.assert_allclose(sigmas_of(sampler), levels[:-1], atol=1e-6)
    # The pipeline's spacing is the network's, the shift the scheduler's.
    sampler = sampling.checkpoint_sampler(made(ByTokens, EULER | {"shift": 2.0}), 6)
    levels = diffusion.flow_match_sigmas(6, shift=2.0, spacing="uniform")
    np.testing.assert_allclose(sigmas_of(sampler), levels[:-1], atol=1e-6)
    other = sampling.checkpoint_sampler(made(Shifted, EULER), 6, sampler="unipc", spacing="wan")
    assert isinstance(other, diffusion.UniPC)
    assert (other.table.timestep % 1 == 0).all()


def test_sits_sampler_is_what_it_was():
    sampler = sampling.checkpoint_sampler(tiny_checkpoint(velocity=True, learn_sigma=False), 7)
    edges = np.linspace(0.0, 1.0, 8).astype(np.float32)
    np.testing.assert_array_equal(sampler.table.timestep, edges[:-1])
    np.testing.assert_array_equal(sampler.table.timestep_next, edges[1:])
    assert (sampler.flow_times, sampler.velocity_to) == ((0.0, 1.0), "data")
    x = jnp.asarray([[0.3, -0.7]])
    row = jax.tree.map(lambda leaf: leaf[2], sampler.table)
    step = sampler.step(lambda x, t, c: x * t[:, None], x, None, row, None)
    velocity = x * edges[2]
    np.testing.assert_array_equal(step.x_next, x + velocity * (edges[3] - edges[2]))
    np.testing.assert_array_equal(step.x0, x + velocity * (1 - edges[2]))


@pytest.mark.parametrize("kind", [ToyFlow, Unipc])
def test_networks_of_other_units_are_sampled_calibrated_and_searched(kind):
    checkpoint = made(kind)
    condition = prompts(2)
    sampler = sampling.checkpoint_sampler(checkpoint, 3)
    batch = sampling.generate(checkpoint, sampler, condition, guidance=2.0, batch_size=2)
    one = sampling.generate(checkpoint, sampler, condition, guidance=2.0, batch_size=1)
    np.testing.assert_allclose(batch, one, atol=1e-5)
    key = jax.random.key(0)
    stats = calibrate(checkpoint, key, 2, conditions=condition, sampler=sampler, guidance=2.0)
    np.testing.assert_array_equal(stats.timesteps, sampler.table.timestep)
    items = collect_items(checkpoint, key, 2, conditions=condition, sampler=sampler)
    assert set(items.timestep) <= set(np.asarray(sampler.table.timestep).tolist())
    rollout = Rollout.of(checkpoint.model, sampler, 2.0)
    noise, keys = sampling.initial_noise(key, jnp.arange(2), (4, 4, 2))
    carried = rollout.start(noise)
    for step in range(rollout.num_steps):
        carried = rollout.step(checkpoint.params, carried, condition, keys, step)
    whole = rollout(checkpoint.params, noise, condition, keys)
    np.testing.assert_allclose(carried.x, whole, atol=1e-5)


def test_a_scale_over_time_guides_each_step_by_its_timestep():
    checkpoint = made()
    scale = diffusion.SteppedScale(boundary=600.0, at_or_above=4.0, below=3.0)
    fns = [sampling.denoiser(checkpoint.model, checkpoint.params, g) for g in (scale, 4.0, 3.0)]
    x = jnp.ones((2, 4, 4, 2))
    for timestep, other in ((999.0, 1), (600.0, 1), (599.0, 2)):
        by_time, plain = (fns[i](x, jnp.full(2, timestep), prompts(2)) for i in (0, other))
        np.testing.assert_allclose(by_time, plain, rtol=1e-6)
    sampler = sampling.checkpoint_sampler(checkpoint, 3)
    found = sampling.generate(checkpoint, sampler, prompts(2), guidance=scale, batch_size=2)
    assert np.isfinite(found).all()
    other = sampling.generate(checkpoint, sampler, prompts(2), guidance=4.0, batch_size=2)
    assert np.abs(found - other).max() > 1e-3
    with pytest.raises(ValueError, match="cannot change over time; use a number"):
        sampling.denoiser(made(embedded=True).model, {}, scale)


def test_embedded_guidance_is_one_call_with_an_entry():
    checkpoint = made(embedded=True)
    model, params = checkpoint.model, checkpoint.params
    assert embeds_guidance(model)
    assert not embeds_guidance(ToyFlow())
    x, time = jnp.ones((2, 4, 4, 2)), jnp.full(2, 500.0)
    plain = jax.tree.map(jnp.asarray, prompts(2))
    entry = {**plain, "guidance": jnp.array([3.5, 3.5])}
    expected = model.apply({"params": params}, x, time, entry)
    for guidance, given in ((3.5, plain), (None, entry), (1.5, entry), (3.5, entry)):
        fn = sampling.denoiser(model, params, guidance)
        np.testing.assert_allclose(fn(x, time, given), expected, rtol=1e-6)
    scales = sampling.denoiser(model, params, jnp.array([3.5, 1.0]))(x, time, plain)
    np.testing.assert_allclose(scales[0], expected[0], rtol=1e-6)
    assert np.abs(scales[1] - expected[1]).max() > 1e-3
    for guidance, calls in ((3.5, 1), (1.0, 1), (None, 1)):
        assert sampling.calls_per_step(model, guidance) == calls
    assert sampling.calls_per_step(ToyFlow(), 3.5) == 2
    assert Rollout.of(model, diffusion.flow(2), 1.0).guidance == 1.0
    assert Rollout.of(model, diffusion.flow(2), 3.5).evaluations == 2
    assert with_guidance(ToyFlow(), entry, 2.0) is entry


def test_embedded_guidance_reaches_every_use_of_the_network():
    checkpoint = made(embedded=True)
    sampler, key = sampling.checkpoint_sampler(checkpoint, 2), jax.random.key(0)
    ours = sampling.generate(checkpoint, sampler, prompts(2), guidance=3.5, batch_size=2)
    entry = prompts(2, guidance=np.array([3.5, 3.5], np.float32))
    by_entry = sampling.generate(checkpoint, sampler, entry, guidance=None, batch_size=2)
    np.testing.assert_allclose(ours, by_entry, atol=1e-6)
    given = {"conditions": prompts(2), "sampler": sampler, "guidance": 3.5}
    calibrate(checkpoint, key, 2, **given)
    items = collect_items(checkpoint, key, 2, **given)
    np.testing.assert_array_equal(items.condition["guidance"], 3.5)
    with pytest.raises(ValueError, match=r"guidance=2.0, but the condition has an entry guidance"):
        sampling.generate(checkpoint, sampler, entry, guidance=2.0)
    with pytest.raises(ValueError, match=r"condition has \['text'\]"):
        sampling.generate(checkpoint, sampler, prompts(2), guidance=None)
