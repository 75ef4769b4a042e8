"""Folds change what a layer's input looks like and nothing that the network computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from tiny_models import layer_ranges

from qdit_jax import Recipe, quantize_params
from qdit_jax.methods import fold_inputs
from qdit_jax.methods.input_transforms import places
from qdit_jax.models import FAMILIES, abstract_params, build_model, layers_of
from qdit_jax.testing import realistic_dit

PATHS = ["blocks_0/attn/qkv", "blocks_1/attn/proj", "blocks_1/mlp/fc1", "final_layer/linear"]
WIDTH = 128


# By family and example: the layers of a block whose input takes a scale at no cost, and no shift.
SCALE_ONLY = {
    ("lightningdit", 0): {"mlp/w3"},
    ("lightningdit", 1): {"attn/qkv", "mlp/w12", "mlp/w3"},  # its modulation has no shifts
    ("z-image", 0): {
        "attention/qkv",
        *(f"feed_forward/w{i}" for i in (1, 2, 3)),
        "final_layer/linear",
    },
    ("flux2", 0): {"img_mlp_2", "txt_mlp_2", "linear2"},
    ("sana", 0): {"attn/proj", "mlp/point_conv"},
    ("latte_t2v", 1): {"glu/fc2"},
    ("flux", 0): set(),
    ("dit", 0): set(),
}


def vectors(seed: int, paths=PATHS):
    """Returns random `(scale, shift)` by layer: factors from 1/20 to 20, either sign of the shift."""
    rng = np.random.default_rng(seed)
    scale = {path: np.exp(rng.uniform(-3, 3, WIDTH)) for path in paths}
    return scale, {path: rng.normal(0, 3, WIDTH) for path in paths}


def inputs(seed: int, num: int = 4):
    x = jax.random.normal(jax.random.key(seed), (num, 8, 8, 4))
    return x, jnp.linspace(0, 999, num), jnp.arange(num) + 7


@jax.jit(static_argnames="model")
def output(params, args, *, model):
    return model.apply({"params": params}, *args)


def relative_error(model, params, other, args) -> float:
    before, after = (output(p, args, model=model) for p in (params, other))
    return float(jnp.abs(after - before).max() / jnp.abs(before).max())


@pytest.mark.parametrize("paths", [[path] for path in PATHS] + [PATHS])
def test_the_output_is_unchanged(paths):
    model, params = realistic_dit()
    scale, shift = vectors(1, paths)
    folded = fold_inputs(params, scale=scale, shift=shift)
    assert relative_error(model, params, folded, inputs(2)) < 1e-5


def test_all_layers_together_in_float64():
    model, params = realistic_dit(1)
    paths = [f"blocks_{i}/{n}" for i in (0, 1) for n in ("attn/qkv", "attn/proj", "mlp/fc1")]
    scale, shift = vectors(3, [*paths, "final_layer/linear"])
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        x, timestep, label = inputs(4)
        args = x.astype(jnp.float64), timestep, label
        folded = fold_inputs(exact, scale=scale, shift=shift)
        assert relative_error(model, exact, folded, args) < 1e-11


def test_the_layer_sees_the_shifted_and_scaled_input():
    model, params = realistic_dit()
    scale, shift = vectors(5)
    folded = fold_inputs(params, scale=scale, shift=shift)
    x, timestep, label = inputs(6)
    before, after = (layer_ranges(p, x, timestep, label, model=model) for p in (params, folded))
    for path in PATHS:
        for old, new in zip(before[path], after[path], strict=True):
            expected = (np.asarray(old) - shift[path]) / scale[path]
            np.testing.assert_allclose(new, expected, rtol=1e-3, atol=1e-3)
    untouched = "blocks_1/mlp/fc2"
    np.testing.assert_allclose(before[untouched], after[untouched], rtol=1e-3, atol=1e-3)


def test_the_inverse_gives_the_params_back_and_inputs_are_not_written_to():
    _, params = realistic_dit()
    copies = jax.tree.map(np.copy, params)
    scale, shift = vectors(7)
    there = fold_inputs(params, scale=scale, shift=shift)
    back = fold_inputs(
        there,
        scale={path: 1 / s for path, s in scale.items()},
        shift={path: -shift[path] / scale[path] for path in PATHS},
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), back, params)
    jax.tree.map(np.testing.assert_array_equal, params, copies)


def test_scale_or_shift_alone_and_half_precision():
    model, params = realistic_dit()
    scale, shift = vectors(8)
    for settings in ({"scale": scale}, {"shift": shift}, {}):
        assert relative_error(model, params, fold_inputs(params, **settings), inputs(9)) < 1e-5
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    folded = fold_inputs(half, scale=scale)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(folded)} == {"bfloat16"}


@pytest.mark.parametrize(("name", "example"), SCALE_ONLY)
def test_places_that_take_a_scale_alone(name, example):
    row = FAMILIES[name]
    flat = abstract_params(build_model(name, row.examples[example]))
    found = [
        place
        for place in places(unflatten_dict(flat, sep="/"), layers_of(flat))
        if place.scale_only
    ]
    kinds = {row.kind_of(layer) for place in found for layer in place.layers}
    assert kinds == SCALE_ONLY[name, example]
    for place in found:
        assert place.folded
        shared = place.layers[0].endswith("feed_forward/w1")
        assert [layer[-2:] for layer in place.layers] == (
            ["w1", "w3"] if shared else [place.layers[0][-2:]]
        )


def test_what_cannot_be_folded_is_an_error():
    _, params = realistic_dit()
    one = np.ones(WIDTH)
    with pytest.raises(ValueError, match=r"no fold reaches the input of 'blocks_0/mlp/fc2'"):
        fold_inputs(params, scale={"blocks_0/mlp/fc2": one})
    with pytest.raises(ValueError, match="which the params lack"):
        fold_inputs(params, scale={"blocks_7/mlp/fc1": one})
    with pytest.raises(ValueError, match=r"shape \(3,\); give one value per channel, \(128,\)"):
        fold_inputs(params, shift={"blocks_0/mlp/fc1": one[:3]})
    with pytest.raises(ValueError, match="finite and not 0"):
        fold_inputs(params, scale={"blocks_0/mlp/fc1": 0 * one})
    quantized = quantize_params(params, recipe=Recipe.preset("w4a8"))
    with pytest.raises(ValueError, match="fold first, then quantize"):
        fold_inputs(quantized, scale={"blocks_0/mlp/fc1": one})
