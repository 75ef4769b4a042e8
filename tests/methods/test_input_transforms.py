"""New input coordinates change what a quantizer sees and nothing that the network computes."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_models import tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.methods.branches import (
    input_branch,
    leading_directions,
    published_rank,
    weight_branch,
)
from qdit_jax.methods.input_transforms import (
    Place,
    Transform,
    matrix_of,
    places,
    sixteen_bits,
    transformed,
)
from qdit_jax.methods.rotating import rotation_of
from qdit_jax.models import FAMILIES, Fold, Producer
from qdit_jax.quant import ActSpec, WeightSpec
from qdit_jax.recipes import LayerSpec

SPEC = LayerSpec(WeightSpec(4, 8), ActSpec(8, 8))


def test_a_fold_costs_nothing_at_run_time_and_other_places_get_a_leaf():
    params = tiny_checkpoint(depth=2).params
    paths = ["blocks_0/attn/qkv", "blocks_0/mlp/fc1", "blocks_0/attn/proj", "blocks_0/mlp/fc2"]
    found = places(params, paths)
    assert [place.folded for place in found] == [True, True, True, False]
    for place in found:
        width = len(matrix_of(params, place.layers))
        changed = flatten_dict(transformed(params, place, Transform(np.full(width, 2.0, np.float32))), sep="/")  # fmt: skip
        assert (f"{place.layers[0]}/input_map" in changed) == (not place.folded)


def test_readers_of_one_fold_share_a_place_and_unknown_layers_have_their_own(monkeypatch):
    row = FAMILIES["dit"]
    shared = dataclasses.replace(
        row,
        folds=(Fold(r"(blocks_\d+)/mlp/fc[12]", (Producer(r"\1/adaLN_modulation", "shift_mlp"),)),),
    )
    params = tiny_checkpoint().params
    monkeypatch.setitem(FAMILIES, "dit", shared)
    readers = ("blocks_0/mlp/fc1", "blocks_0/mlp/fc2")
    assert places(params, readers) == [Place(readers, True)]
    assert places({"a": {"kernel": np.ones((2, 2))}}, ["a"]) == [Place(("a",), False)]


def test_coordinates_are_given_once_and_before_quantizing():
    checkpoint = tiny_checkpoint()
    place = Place(("blocks_0/mlp/fc2",), False)
    width = len(matrix_of(checkpoint.params, place.layers))
    scaled = transformed(checkpoint.params, place, Transform(np.full(width, 2.0, np.float32)))
    with pytest.raises(ValueError, match="has an entry 'input_map' already"):
        transformed(scaled, place, Transform(np.full(width, 2.0, np.float32)))
    turned = transformed(scaled, place, Transform(rotation=rotation_of("regular", width)))
    for again in (Transform(rotation=rotation_of("regular", width)), Transform(np.ones(width))):
        with pytest.raises(ValueError, match=r"has an entry '(rotation|input_map)' already"):
            transformed(turned, place, again)
    quantized = qdit.quantize_params(checkpoint.params, recipe=qdit.Recipe.preset("w4a8"))
    with pytest.raises(ValueError, match="fc2 is quantized already"):
        transformed(quantized, place, Transform(np.ones(width)))
    flat = flatten_dict(checkpoint.params)
    bare = {k: v for k, v in flat.items() if k[-2:] != ("fc2", "bias")}
    with pytest.raises(ValueError, match="fc2 has no bias"):
        transformed(unflatten_dict(bare), place, Transform(shift=np.ones(width)))


def outlying(seed, m=64, k=32, n=16):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((m, k)).astype(np.float32)
    rows[:, :2] *= 30
    return rows, rng.standard_normal((k, n)).astype(np.float32)


def test_a_branch_of_the_weights_holds_their_largest_directions():
    rows, kernel = outlying(0)
    kernel += 20 * np.outer(np.ones(32), np.ones(16)).astype(np.float32)
    branch = weight_branch(lambda shape: 2)(kernel, rows, rows, SPEC)
    rest = kernel - np.asarray(branch.down, np.float32) @ np.asarray(branch.up, np.float32)
    assert np.linalg.norm(rest) < 0.1 * np.linalg.norm(kernel)
    assert branch.down.dtype == branch.up.dtype == jnp.float16


def test_a_branch_of_the_inputs_takes_their_largest_directions_off():
    rows, kernel = outlying(1)
    branch = input_branch(lambda shape: 2)(kernel, rows, rows, SPEC)
    assert branch.subspace
    assert np.abs(branch.rest(jnp.asarray(rows))).max() < 0.2 * np.abs(rows).max()


def test_the_largest_directions_of_many_channels_are_those_of_a_whole_decomposition():
    rows = np.random.default_rng(0).standard_normal((200, 600)) * np.exp(-np.arange(600) / 40)
    covariance = rows.T @ rows
    found = leading_directions(covariance, 5)
    whole = np.linalg.eigh(covariance)[1][:, ::-1][:, :5]
    np.testing.assert_allclose(np.abs(np.sum(found * whole, axis=0)), 1, atol=1e-5)


def test_a_branch_is_as_thin_in_small_kernels_as_the_published_one_in_large_ones():
    ranks = {(1152, 4608): 32, (4608, 1152): 32, (512, 128): 4, (16, 8): 1}
    assert {shape: published_rank(shape) for shape in ranks} == ranks


def test_sixteen_bits_hold_what_float16_cannot():
    assert sixteen_bits(np.ones(3)).dtype == jnp.float16
    assert sixteen_bits(np.full(3, 1e5)).dtype == jnp.bfloat16
