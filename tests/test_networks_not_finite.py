"""A network that holds or yields NaN goes through no step: every one names the layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import qdit_jax as qdit
from qdit_jax.calibration import Items, collect_items
from qdit_jax.cli import main
from qdit_jax.errors import UserError
from qdit_jax.models import family_of
from qdit_jax.ptq import (
    by_block,
    quantize_checkpoint,
    quantize_in_order,
    quantize_params,
    round_params,
)
from qdit_jax.quant import ranges
from qdit_jax.recipes import Recipe
from qdit_jax.testing import realistic_dit

LAYER = "blocks_0/mlp/fc1"


@pytest.fixture(scope="module")
def network():
    return realistic_dit(0, hidden_size=32, depth=1, num_heads=2)


def spoiled(params, path, value=np.nan, place=7):
    flat = flatten_dict(params, sep="/")
    leaf = np.array(flat[path])
    leaf.reshape(-1)[place] = value
    return unflatten_dict({**flat, path: leaf}, sep="/")


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_spoiled_kernel_is_refused_by_its_layer(network, value, tmp_path, capsys):
    model, params = network
    recipe = Recipe.preset("w4a8", params, group_size=16)
    bad = spoiled(params, f"{LAYER}/kernel", value)
    message = rf"{LAYER} holds 1 of 4,096 values .* at \(0, 7\)"
    with pytest.raises(ValueError, match=message):
        quantize_params(bad, recipe=recipe)
    qdit.save(tmp_path / "ckpt", qdit.Checkpoint(model, bad))
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(tmp_path / "ckpt", tmp_path / "out", recipe=recipe)
    command = ["quantize", str(tmp_path / "ckpt"), str(tmp_path / "out"), "--recipe", "w4a8"]
    assert main([*command, "--group-size", "16"]) == 2
    assert f"{LAYER} holds 1 of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_spoiled_label_table_is_refused_too(network):
    _, params = network
    recipe = Recipe.preset("w8a16", params, group_size=16, layers="y_embedder")
    with pytest.raises(ValueError, match="y_embedder holds 1 of"):
        quantize_params(spoiled(params, "y_embedder/embedding_table"), recipe=recipe)


@pytest.mark.parametrize("name", [f"{LAYER}/bias", "y_embedder/embedding_table"])
def test_leaves_that_stay_in_full_precision_are_refused_too(network, tmp_path, name, capsys):
    model, params = network
    bad = spoiled(params, name)
    recipe = Recipe.preset("w4a8", params, group_size=16)
    with pytest.raises(ValueError, match=f"{name} holds 1 of"):
        quantize_params(bad, recipe=recipe)
    qdit.save(tmp_path / "bad", qdit.Checkpoint(model, bad))
    options = ["--recipe", "w4a8", "--group-size", "16"]
    assert main(["quantize", str(tmp_path / "bad"), str(tmp_path / "out"), *options]) == 2
    assert f"{name} holds 1 of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", ["1.5", True, np.nan, np.array([1.0, np.inf]), jnp.array(np.nan)])
def test_guidance_is_a_finite_number(network, bad):
    with pytest.raises((TypeError, ValueError), match=r"is not supported; use a|Type-check error"):
        qdit.denoiser(*network, guidance=bad)


def test_rounding_in_order_names_the_layer_of_a_kernel_and_of_a_hessian(network):
    model, params = network
    recipe = Recipe.preset("w4a16", params, group_size=16, layers=f"{LAYER}|blocks_0/mlp/fc2")
    stages = by_block([LAYER, "blocks_0/mlp/fc2"], family_of(model))

    def hessians_fn(spoil_first, spoil_second):
        def hessians(params, paths):
            sizes = {
                path: flatten_dict(params, sep="/")[f"{path}/kernel"].shape[0] for path in paths
            }
            found = {path: jnp.eye(size) for path, size in sizes.items()}
            held = dict(found)
            if spoil_first:
                found[LAYER] = found[LAYER].at[2, 3].set(jnp.inf)
            if spoil_second:
                held["blocks_0/mlp/fc2"] = held["blocks_0/mlp/fc2"].at[2, 3].set(jnp.nan)
            return found, held

        return hessians

    def rounded(params, *spoil):
        from qdit_jax.quant import gptq

        return quantize_in_order(
            params, recipe=recipe, hessians_fn=hessians_fn(*spoil), round_fn=gptq, stages=stages
        )

    with pytest.raises(ValueError, match=f"the Hessian of the inputs of {LAYER} holds 1 of"):
        rounded(params, True, False)
    with pytest.raises(ValueError, match="the Hessian of the inputs of blocks_0/mlp/fc2 holds 1"):
        rounded(params, False, True)
    with pytest.raises(ValueError, match=f"{LAYER} holds 1 of 4,096"):
        rounded(spoiled(params, f"{LAYER}/kernel"), False, False)


@pytest.mark.parametrize("path", [f"{LAYER}/bias", "final_layer/linear/bias"])
def test_a_network_that_yields_nan_is_not_calibrated(network, path):
    model, params = network
    checkpoint = qdit.Checkpoint(model, spoiled(params, path, place=1))
    with pytest.raises(ValueError, match=r"the samples of the network .* not finite"):
        qdit.calibrate(checkpoint, jax.random.key(0), 1, sampler=qdit.ddim(steps=1))
    with pytest.raises(ValueError, match=r"the samples of the network .* not finite"):
        collect_items(checkpoint, jax.random.key(0), 2, sampler=qdit.ddim(steps=1))


def test_an_input_of_a_layer_is_named_by_layer_and_step():
    from qdit_jax.calibration.collect import add_call, empty_state

    found = {f"low/{LAYER}": np.array([0.0, np.nan]), f"high/{LAYER}": np.array([1.0, 1.0])}
    with pytest.raises(ValueError, match=f"input of {LAYER} is NaN or infinite at step 2 of 5"):
        add_call(empty_state({}), found, "conditional", 1, 5, 0)


def items(**changes) -> Items:
    arrays = {
        "x": np.zeros((8, 8, 8, 4), np.float32),
        "timestep": np.arange(8, dtype=np.float32),
        "condition": np.zeros(8, np.int32),
        "sample": np.arange(8),
    }
    return Items(**{**arrays, **changes})


NOT_ITEMS = {
    "nan": ({"x": np.full((8, 8, 8, 4), np.nan, np.float32)}, "inputs: x holds 2,048 of 2,048"),
    "timestep": ({"timestep": np.full(8, np.inf, np.float32)}, "timestep holds 8 of 8"),
    "lengths": ({"condition": np.zeros(7, np.int32)}, r"equal number; .*condition \(7,\)"),
    "none": ({k: np.zeros(0) for k in ("timestep", "condition", "sample", "x")}, "one or more"),
}


@pytest.mark.parametrize("name", NOT_ITEMS)
def test_items_that_cannot_be_used_are_refused(network, name, tmp_path):
    model, params = network
    changes, message = NOT_ITEMS[name]
    if name != "none":
        recipe = Recipe.preset("w4a8", params, group_size=16)
        with pytest.raises(ValueError, match=message):
            round_params(model, params, items(**changes), recipe=recipe)
    file = tmp_path / "items.npz"
    np.savez(file, **{**items()._asdict(), **changes})
    with pytest.raises(UserError, match=message):
        Items.load(file)


def test_a_layer_that_lost_itself_is_marked_in_the_table(network, tmp_path, capsys):
    model, params = network
    flat = flatten_dict(params, sep="/")
    flat[f"{LAYER}/kernel"] = flat[f"{LAYER}/kernel"] * np.float32(1e-8)
    qdit.save(tmp_path / "ckpt", qdit.Checkpoint(model, unflatten_dict(flat, sep="/")))
    command = [
        "quantize",
        str(tmp_path / "ckpt"),
        str(tmp_path / "out"),
        "--method",
        "rtn",
        "--group-size",
        "16",
    ]
    assert main([*command, "--recipe", "w8a8", "--range", "qdit-release"]) == 0
    marked = [line for line in capsys.readouterr().out.splitlines() if "  ! " in line]
    assert len(marked) == 1
    assert LAYER in marked[0]
    assert "dB where 8 bits promise" in marked[0]
    assert main([*command, "--recipe", "w8a8", "--force"]) == 0
    assert "  ! " not in capsys.readouterr().out
    kept = qdit.load(tmp_path / "out")
    assert kept.recipe.rules[0].spec.weight.range_fn == ranges.minmax
