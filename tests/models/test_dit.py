"""The diffusion transformer against recorded outputs of the published PyTorch code."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import output

import qdit_convert
from qdit_jax.diffusion import guided_doubled
from qdit_jax.models import (
    abstract_params,
    build_model,
    config_of,
    published_config,
    sincos_positions,
    timestep_features,
)
from qdit_jax.sampling import denoiser


def nhwc(array):
    return jnp.asarray(np.moveaxis(array, 1, -1))


def assert_close(found, expected, tolerance=2e-4):
    expected = np.asarray(expected)
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=tolerance * (1 + np.abs(expected).max())
    )


def load(golden, file, heads):
    read = qdit_convert.read_model(golden(file), num_heads=heads)
    return build_model(read.family, read.config), read.params


@pytest.mark.parametrize(
    ("file", "forward", "heads"),
    [("dit_A.pt", "dit_A_forward.npz", 4), ("dit_B_ema.pt", "dit_B_forward.npz", 2)],
)
def test_forward_equals_the_original(golden, file, forward, heads):
    model, params = load(golden, file, heads)
    with np.load(golden(forward)) as data:
        x, t, y = nhwc(data["x"]), jnp.asarray(data["t"]), jnp.asarray(data["y"], jnp.int32)
        out, state = model.apply(
            {"params": params}, x, t, y, capture_intermediates=True, mutable=["intermediates"]
        )
        seen = state["intermediates"]
        assert_close(out, np.moveaxis(data["out"], 1, -1))
        assert_close(seen["x_embedder"]["__call__"][0], data["patch_embed"])
        assert_close(seen["t_embedder"]["__call__"][0], data["t_emb"])
        assert_close(seen["y_embedder"]["__call__"][0], data["y_emb"])
        for i in range(model.depth):
            assert_close(seen[f"blocks_{i}"]["__call__"][0], data[f"block{i}_out"])
        few = int(data["internals_num_samples"])
        block = seen["blocks_0"]
        for name, part in {
            "b0.adaLN": block["adaLN_modulation"],
            "b0.attn.qkv.out": block["attn"]["qkv"],
            "b0.attn.proj.out": block["attn"]["proj"],
            "b0.mlp.fc1.out": block["mlp"]["fc1"],
            "b0.mlp.fc2.out": block["mlp"]["fc2"],
        }.items():
            assert_close(part["__call__"][0][:few], data[name])


@pytest.mark.parametrize(
    ("file", "forward", "heads"),
    [("dit_A.pt", "dit_A_forward.npz", 4), ("dit_B_ema.pt", "dit_B_forward.npz", 2)],
)
def test_guidance_equals_the_original(golden, file, forward, heads):
    model, params = load(golden, file, heads)
    with np.load(golden(forward)) as data:
        inputs = (
            nhwc(data["cfg_x"]),
            jnp.asarray(data["cfg_t"]),
            jnp.asarray(data["cfg_y"], jnp.int32),
        )
        for scale in (1.5, 4.0):
            guided = guided_doubled(denoiser(model, params, guidance=None), scale)
            assert_close(guided(*inputs), np.moveaxis(data[f"cfg_out_scale{scale}"], 1, -1))
        half = len(data["cfg_x"]) // 2
        alone = denoiser(model, params, guidance=1.5)(*(a[:half] for a in inputs))
        assert_close(alone, np.moveaxis(data["cfg_out_scale1.5"], 1, -1)[:half])


def test_timestep_features_are_cosines_then_sines(golden):
    with np.load(golden("dit_A_forward.npz")) as data:
        np.testing.assert_allclose(
            timestep_features(jnp.asarray(data["temb_t"], jnp.float32)),
            data["temb_freq"],
            atol=2e-4,
        )


def test_positions_equal_the_published_table(golden):
    with np.load(golden("pos_embed_xl2.npz")) as data:
        size = int(data["grid_size"])
        table = sincos_positions(int(data["dim"]), (size, size))
        np.testing.assert_allclose(table[data["rows"]], data["values_f64"], atol=1e-6)


def test_configuration_round_trips_through_json():
    config = {**published_config("DiT-XL/2"), "input_size": [32, 64]}
    model = build_model("dit", json.loads(json.dumps(config)))
    assert build_model("dit", json.loads(json.dumps(config_of(model)))) == model
    assert model.input_size == (32, 64)


def test_xl2_has_the_published_number_of_values():
    shapes = abstract_params(build_model("dit", published_config("DiT-XL/2")))
    trained = sum(int(np.prod(leaf.shape)) for leaf in shapes.values())
    assert trained == 675_129_632


def test_velocity_returns_the_first_half_of_the_channels():
    config = {"input_size": 8, "hidden_size": 48, "depth": 1, "num_heads": 4, "num_classes": 3}
    full, velocity = (build_model("dit", {**config, "velocity": v}) for v in (False, True))
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    inputs = x, jnp.array([0.25, 0.5]), jnp.array([0, 3])
    params = random_params(full)
    a, b = (output(model, params, *inputs) for model in (full, velocity))
    assert b.shape == (2, 8, 8, 4)
    np.testing.assert_array_equal(a[..., :4], b)


def random_params(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    arrays = [0.1 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, arrays)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("unet", {}, "family='unet' is unknown"),
        ("dit", {"width": 3}, "unknown fields \\['width'\\]"),
    ],
)
def test_unknown_settings_are_named(family, config, message):
    with pytest.raises(ValueError, match=message):
        build_model(family, config)


def test_a_wrong_input_size_is_named():
    model = build_model("dit", {"input_size": 8, "hidden_size": 48, "depth": 1, "num_heads": 4})
    with pytest.raises(ValueError, match=r"takes \[B, 8, 8, 4\]"):
        jax.eval_shape(
            model.init,
            jax.random.key(0),
            jnp.zeros((1, 16, 16, 4)),
            jnp.zeros(1),
            jnp.zeros(1, int),
        )


def test_an_unknown_size_is_named():
    with pytest.raises(ValueError, match="model='DiT-XXL/2' is not a published size"):
        published_config("DiT-XXL/2")
