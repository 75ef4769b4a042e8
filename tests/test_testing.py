"""The properties that make the random test bed as hard as a trained DiT."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import layer_ranges

from qdit_jax import Recipe, quantize_params
from qdit_jax.calibration import Stats
from qdit_jax.metrics import signal_to_noise_db
from qdit_jax.models import DiT
from qdit_jax.testing import realistic_dit

TIMESTEPS = np.linspace(0, 999, 9)
BATCH = 16


@functools.cache
def bed():
    model, params = realistic_dit()
    x = jax.random.normal(jax.random.key(0), (BATCH, 8, 8, 4))
    return model, params, x


@functools.cache
def ranges(null: bool):
    """Returns `{layer: (low [S, K], high [S, K])}` over timesteps, of the classes or the null class."""
    model, params, x = bed()
    label = np.full(BATCH, 10) if null else np.arange(BATCH) % 10
    seen = [
        layer_ranges(params, x, np.full(BATCH, t, np.float32), label, model=model)
        for t in TIMESTEPS
    ]
    return {path: tuple(np.stack([s[path][i] for s in seen]) for i in (0, 1)) for path in seen[0]}


def sizes(path: str, null: bool = False) -> np.ndarray:
    """Returns the largest absolute value `[S, K]` of a layer's input channels."""
    low, high = ranges(null)[path]
    return np.maximum(-low, high)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize(
    ("layer", "least"), [("attn/qkv", 20), ("mlp/fc1", 20), ("attn/proj", 3), ("mlp/fc2", 3)]
)
def test_the_top_channel_exceeds_the_median_one(block, layer, least):
    size = sizes(f"blocks_{block}/{layer}").max(0)
    assert size.max() >= least * np.median(size)


@pytest.mark.parametrize("layer", ["attn/qkv", "mlp/fc1"])
def test_most_channels_drift_over_time(layer):
    size = sizes(f"blocks_0/{layer}")
    assert np.mean(size.max(0) >= 3 * size.min(0)) >= 0.4


@pytest.mark.parametrize("layer", ["attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2"])
def test_weights_spread_over_inputs_and_have_heavy_tails(layer):
    kernel = flatten_dict(bed()[1], sep="/")[f"blocks_1/{layer}/kernel"]
    inputs, outputs = (np.log(np.square(kernel).mean(axis)).std() / 2 for axis in (1, 0))
    if layer != "attn/qkv":  # There the columns of v differ too, to make outliers at proj.
        assert inputs > 3 * outputs
    assert inputs > 0.4
    assert np.mean(kernel**4) > 5 * np.mean(kernel**2) ** 2


@pytest.mark.parametrize("layer", ["attn/qkv", "mlp/fc1"])
def test_the_null_class_differs(layer):
    ratio = sizes(f"blocks_0/{layer}", null=True) / sizes(f"blocks_0/{layer}")
    assert np.mean(np.abs(np.log(ratio)) > np.log(1.2)) > 0.3


def test_activations_after_gelu_are_skewed():
    low, high = ranges(False)["blocks_0/mlp/fc2"]
    assert low.min() >= -0.171
    assert high.max() > 30 * -low.min()


def test_quantizing_without_groups_fails_and_groups_recover():
    model, params, x = bed()
    low, high = (
        {
            path: np.concatenate([ranges(n)[path][side] for n in (False, True)])
            for path in ranges(False)
        }
        for side in (0, 1)
    )
    stats = Stats(np.tile(TIMESTEPS, 2), low, high)
    timestep, label = jnp.full(BATCH, 250.0), jnp.arange(BATCH) % 10
    apply = jax.jit(lambda p: model.apply({"params": p}, x, timestep, label))

    def score(name, **settings):
        recipe = Recipe.preset(name, **settings)
        quantized = quantize_params(params, recipe=recipe, stats=stats)
        return signal_to_noise_db(apply(params), apply(quantized)).mean()

    static = score("w4a8", group_size=0, act_mode="static")
    grouped = score("w4a8", group_size=32)
    assert grouped > static + 4


def test_the_tree_is_that_of_the_model():
    config = {"input_size": (4, 8), "hidden_size": 24, "num_heads": 2, "null_class": False}
    for extra in ({"learn_sigma": False}, {"velocity": True, "mlp_ratio": 2.0}):
        model, params = realistic_dit(3, **config, **extra)
        assert isinstance(model, DiT)
        arguments = model.example_inputs()
        expected = jax.eval_shape(
            lambda *args, model=model: model.init(jax.random.key(0), *args)["params"], *arguments
        )
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), params, expected)


def test_the_same_seed_gives_the_same_weights():
    first, second = (flatten_dict(realistic_dit(5, depth=1)[1]) for _ in range(2))
    other = flatten_dict(realistic_dit(6, depth=1)[1])
    assert all(np.array_equal(first[path], second[path]) for path in first)
    assert not np.array_equal(first["pos_embed",], other["x_embedder", "proj", "kernel"])
    assert all(leaf.dtype == np.float32 for leaf in first.values())
