"""Small Sana, Z-Image and FLUX.2 go the whole road: calibrated, quantized, sampled and verified."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import quantized_layers, random_params

import qdit_jax as qdit
from qdit_jax.allocation import Rollouts
from qdit_jax.methods import CalibrationData
from qdit_jax.models import build_model, layers_of
from qdit_jax.models.text_to_image_rows import (
    SMALL_FLUX2,
    SMALL_SANA,
    SMALL_Z_IMAGE,
    TEXT_TO_IMAGE_ROWS,
)
from qdit_jax.sampling import checkpoint_sampler

ROWS = {row.name: row for row in TEXT_TO_IMAGE_ROWS}
ONE = {
    "sana": {**SMALL_SANA, "depth": 1},
    "z-image": {**SMALL_Z_IMAGE, "depth": 1},
    "flux2": {**SMALL_FLUX2, "single_depth": 1},
}
STEPS, LENGTH = 2, 5


def prompts(family, count=3):
    rng = np.random.default_rng(4)
    text = rng.standard_normal((count, LENGTH, 12)).astype(np.float32)
    found = {"text": text, "null_text": 0.5 * text[:1]}
    if family != "flux2":
        found["text_mask"] = np.arange(LENGTH) < 2 + np.arange(count)[:, None]
        found["null_text_mask"] = found["text_mask"][:1]
    return found


@pytest.fixture(scope="module", params=list(ONE))
def checkpoint(request):
    model = build_model(request.param, ONE[request.param])
    return qdit.Checkpoint(model, random_params(model))


@pytest.fixture(scope="module")
def family(checkpoint):
    return next(n for n, row in ROWS.items() if row.network_class is type(checkpoint.model))


@pytest.fixture(scope="module")
def items(checkpoint, family):
    return qdit.collect_items(
        checkpoint,
        jax.random.key(0),
        8,
        conditions=prompts(family),
        sampler=checkpoint_sampler(checkpoint, STEPS),
        batch_size=4,
    )


@pytest.fixture(scope="module")
def blocks(checkpoint, family):
    layers = layers_of(flatten_dict(checkpoint.params, sep="/"))
    return {layer for layer in layers if ROWS[family].part_of(layer) == "blocks"}


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


# LLVM's optimizations would take most of the time here.
@jax.jit(static_argnames=("model",), compiler_options={"xla_backend_optimization_level": 0})
def call(params, *args, model):
    return model.apply({"params": params}, *args)


def outputs(checkpoint, items):
    inputs = jax.tree.map(jnp.asarray, items[:3])
    return np.asarray(call(checkpoint.params, *inputs, model=checkpoint.model))


@pytest.mark.parametrize(
    "method",
    [
        "rtn",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("smoothquant", "gptq", "best")),
    ],
)
def test_methods_quantize_it(checkpoint, items, blocks, method):
    recipe = qdit.Recipe.preset("w4a8", checkpoint, group_size=8)
    data = CalibrationData(items=items, batch_size=8)
    result = qdit.quantize(checkpoint, method, recipe, data=data)
    assert quantized_layers(result.params) == blocks
    assert 0 < relative(outputs(result, items), outputs(checkpoint, items)) < 0.4


@pytest.mark.slow
def test_it_is_calibrated_sampled_and_verified(checkpoint, family, blocks):
    given = prompts(family)
    sampler = checkpoint_sampler(checkpoint, STEPS)
    stats = qdit.calibrate(
        checkpoint, jax.random.key(1), 3, conditions=given, sampler=sampler, batch_size=3
    )
    assert set(stats.halves) == {"conditional", "null"}
    assert set(stats.low) >= blocks
    recipe = qdit.Recipe.preset("w8a8", checkpoint, group_size=8)
    params = qdit.quantize_params(checkpoint.params, recipe=recipe)
    small = dataclasses.replace(checkpoint, params=params, recipe=recipe)
    rows, columns, channels = checkpoint.model.sample_shape()
    shape = (rows + 2, columns, channels)
    images = qdit.generate(small, sampler, given, guidance=4.5, shape=shape)
    assert images.shape == (3, *shape)
    assert np.isfinite(images).all()
    found = qdit.verify(
        small,
        against=checkpoint,
        conditions=given,
        num_samples=2,
        steps=STEPS,
        batch_size=2,
        timing=False,
    )
    assert found.passed
    assert len(found.layers) == len(blocks)


@pytest.mark.slow
def test_group_sizes_are_searched(checkpoint, family):
    found = qdit.search(
        checkpoint,
        jax.random.key(0),
        budget="bytes=1.1x-g8",
        objective="predicted",
        space={"weight_bits": 4, "act_bits": 8, "group_sizes": (4, 8)},
        rollouts=Rollouts(
            conditions=prompts(family),
            num_steps=STEPS,
            num_batches=1,
            batch_size=3,
            num_calibration=1,
            num_probes=1,
        ),
    )
    assert found.recipe.resolve(checkpoint.params)
