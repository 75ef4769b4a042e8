"""New input coordinates change what a quantizer sees and nothing that the network computes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_family
import toy_painter
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_models import random_params, tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.methods.branches import input_branch, published_rank, weight_branch
from qdit_jax.methods.input_transforms import (
    Place,
    Transform,
    matrix_of,
    places,
    sixteen_bits,
    transformed,
    with_branch,
)
from qdit_jax.methods.rotating import rotation_of
from qdit_jax.models import FAMILIES, Fold, Producer, build_model, rows_per_sample
from qdit_jax.quant import ActSpec, InputMap, LowRank, Rotation, WeightSpec
from qdit_jax.recipes import LayerSpec

NETWORKS = [
    pytest.param(row, config, id=f"{row.name}-{i}")
    for row in (FAMILIES["dit"], toy_family.ROW, toy_painter.ROW)
    for i, config in enumerate(row.examples)
]
SPEC = LayerSpec(WeightSpec(4, 8), ActSpec(8, 8))


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for row in (toy_family.ROW, toy_painter.ROW):
        monkeypatch.setitem(FAMILIES, row.name, row)


def network(row, config):
    model = build_model(row.name, config)
    params = random_params(model)
    rng = np.random.default_rng(0)

    def value(leaf):
        if leaf.dtype == bool:
            return jnp.ones(leaf.shape, bool)
        whole = jnp.issubdtype(leaf.dtype, jnp.integer)
        return (
            jnp.zeros(leaf.shape, leaf.dtype)
            if whole
            else jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32)
        )

    inputs = jax.tree.map(value, model.example_inputs(2))
    apply = jax.jit(lambda params: model.apply({"params": params}, *inputs))
    return params, apply


def relative_error(found, wanted):
    return float(jnp.abs(found - wanted).max() / jnp.abs(wanted).max())


def drawn(params, place, kinds, seed):
    rng = np.random.default_rng(seed)
    width = len(matrix_of(params, place.layers[:1]))
    flat = flatten_dict(params, sep="/")
    has_bias = all(f"{path}/bias" in flat for path in place.layers)
    scale = np.exp(rng.uniform(-1, 1, width)).astype(np.float32) if "scale" in kinds else None
    shift = rng.normal(0, 1, width).astype(np.float32) if "shift" in kinds and has_bias else None
    rotation = next(
        (rotation_of(k, width, seed) for k in ("regular", "hadamard") if k in kinds), None
    )
    return Transform(scale, shift, rotation)


@pytest.mark.parametrize(("row", "config"), NETWORKS)
@pytest.mark.parametrize(
    "kinds", [("scale", "shift"), ("hadamard",), ("scale", "shift", "regular")]
)
def test_the_output_of_every_family_is_unchanged_at_every_layer(row, config, kinds):
    params, apply = network(row, config)
    paths = list(rows_per_sample(build_model(row.name, config)))
    every = places(params, paths)
    assert sorted(path for place in every for path in place.layers) == sorted(paths)
    changed = params
    for i, place in enumerate(every):
        changed = transformed(changed, place, drawn(params, place, kinds, i))
    leaves = {type(leaf) for leaf in flatten_dict(changed).values()}
    assert (InputMap in leaves) == ("scale" in kinds)
    assert (Rotation in leaves) == bool({"regular", "hadamard"} & set(kinds))
    assert relative_error(apply(changed), apply(params)) < 1e-5


@pytest.mark.parametrize("subspace", [False, True])
def test_a_branch_leaves_the_output_as_it_is(subspace):
    params, apply = network(FAMILIES["dit"], {**FAMILIES["dit"].examples[0], "hidden_size": 32})
    for path in ("blocks_0/attn/qkv", "blocks_1/mlp/fc2"):
        kernel = matrix_of(params, [path])
        down, up = np.linalg.qr(np.random.default_rng(0).standard_normal((len(kernel), 4)))[0], None
        down = down.astype(np.float32)
        if subspace:  # in float32: a subspace in 16 bits carries its own rounding
            branch = LowRank(jnp.asarray(down), jnp.asarray(down.T @ kernel), subspace=True)
        else:
            up = np.random.default_rng(1).standard_normal((4, kernel.shape[1]))
            branch = LowRank(sixteen_bits(down), sixteen_bits(up))
        changed = with_branch(params, path, branch)
        assert np.abs(matrix_of(changed, [path]) - kernel).max() > 0.01
        assert relative_error(apply(changed), apply(params)) < 1e-5


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


def test_a_branch_is_as_thin_in_small_kernels_as_the_published_one_in_large_ones():
    ranks = {(1152, 4608): 32, (4608, 1152): 32, (512, 128): 4, (16, 8): 1}
    assert {shape: published_rank(shape) for shape in ranks} == ranks


def test_sixteen_bits_hold_what_float16_cannot():
    assert sixteen_bits(np.ones(3)).dtype == jnp.float16
    assert sixteen_bits(np.full(3, 1e5)).dtype == jnp.bfloat16
