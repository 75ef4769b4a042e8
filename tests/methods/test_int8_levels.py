"""Methods round to two levels of scales, and both numerics compute the same with them."""

from __future__ import annotations

from functools import cache

import jax
import numpy as np
import pytest
from tiny_models import tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.calibration import collect_items
from qdit_jax.diffusion import ddim
from qdit_jax.methods import CalibrationData, method_named

LAYERS = "blocks_0/(attn/qkv|mlp/fc2)"


@cache
def checkpoint():
    return tiny_checkpoint(hidden_size=16)


@cache
def items():
    sampler = ddim(steps=4)
    return collect_items(checkpoint(), jax.random.key(0), 16, sampler=sampler, batch_size=16)


def recipe_for(name, **settings):
    return method_named(name).preset(
        "w4a8-fast", checkpoint().params, layers=LAYERS, **{"group_size": 8, **settings}
    )


@pytest.mark.parametrize("name", ["gptq", pytest.param("brecq", marks=pytest.mark.slow)])
def test_a_method_rounds_to_levels_and_integers_compute_them(name):
    data = CalibrationData(items=items(), batch_size=32)
    small = qdit.quantize(checkpoint(), name, recipe_for(name), data=data)
    for layer in (small.params["blocks_0"]["attn"]["qkv"], small.params["blocks_0"]["mlp"]["fc2"]):
        assert layer["kernel"].has_levels
        assert layer["act_quant"].spec.group_size == 0
    x, timestep, condition = items()[:3]

    def output(params, numerics="simulated"):
        model = checkpoint().model.clone(numerics=numerics)
        return np.asarray(jax.jit(model.apply)({"params": params}, x, timestep, condition))

    full, simulated = output(checkpoint().params), output(small.params)
    assert np.linalg.norm(simulated - full) < 0.2 * np.linalg.norm(full)
    np.testing.assert_allclose(output(small.params, "integer"), simulated, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["qdit_release_gptq", "qdit_release"])
def test_the_release_knows_no_levels(name):
    with pytest.raises(ValueError, match=r"blocks_0/.* has two levels of scales, which the Q-DiT"):
        qdit.quantize(checkpoint(), name, recipe_for(name))
