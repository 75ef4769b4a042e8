"""Small Sana, Z-Image and FLUX.2 go the whole road: calibrated, quantized, sampled and verified."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from roads import STEPS, calibrated, check_files, check_method, check_verified, collected, rounded
from tiny_models import random_params

import qdit_jax as qdit
from qdit_jax.allocation import Rollouts
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
LENGTH = 5


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
    return collected(checkpoint, prompts(family))


@pytest.fixture(scope="module")
def blocks(checkpoint, family):
    layers = layers_of(flatten_dict(checkpoint.params, sep="/"))
    return {layer for layer in layers if ROWS[family].part_of(layer) == "blocks"}


@pytest.mark.parametrize(
    "method",
    [
        "rtn",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("smoothquant", "gptq", "best")),
    ],
)
def test_methods_quantize_it(checkpoint, items, blocks, method):
    check_method(checkpoint, items, method, blocks, most=0.4)


def test_what_is_saved_and_exported_is_the_same(checkpoint, items, tmp_path):
    check_files(rounded(checkpoint), items, tmp_path)


@pytest.mark.slow
def test_it_is_calibrated_sampled_and_verified(checkpoint, family, blocks):
    given = prompts(family)
    assert set(calibrated(checkpoint, given).low) >= blocks
    small = rounded(checkpoint, "w8a8")
    rows, columns, channels = checkpoint.model.sample_shape()
    shape = (rows + 2, columns, channels)
    sampler = checkpoint_sampler(checkpoint, STEPS)
    images = qdit.generate(small, sampler, given, guidance=4.5, shape=shape)
    assert images.shape == (3, *shape)
    assert np.isfinite(images).all()
    check_verified(small, checkpoint, given, len(blocks))


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
