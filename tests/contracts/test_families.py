"""The contract of every family in the table, and of two that are as unlike DiT as it allows."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_family
import toy_painter
from example_networks import DENOISING, EXAMPLES, conditions, inputs_of, network, params_of
from flax.traverse_util import flatten_dict
from tiny_models import output

import qdit_jax as qdit
from qdit_jax.allocation import BitOps, cost_table, search_space
from qdit_jax.diffusion import SAMPLERS
from qdit_jax.methods import fold_inputs
from qdit_jax.methods.input_transforms import Transform, places, transformed
from qdit_jax.models import (
    FAMILIES,
    Network,
    abstract_params,
    build_model,
    config_of,
    example_inputs,
    family_of,
    family_of_params,
    layers_in_order,
    layers_of,
    rows_per_sample,
    seen_inputs,
)
from qdit_jax.quant import QTensor
from qdit_jax.sampling import checkpoint_sampler

LARGE = ("inception",)  # families of one size: their files take many seconds
SAVED = [
    pytest.param(*e.values, id=e.id, marks=pytest.mark.slow if e.values[0].name in LARGE else ())
    for e in EXAMPLES
]
every_family = pytest.mark.parametrize(("row", "config"), EXAMPLES)
every_denoiser = pytest.mark.parametrize(("row", "config"), DENOISING)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for row in (toy_family.ROW, toy_painter.ROW):
        monkeypatch.setitem(FAMILIES, row.name, row)


def call(model, params, inputs):
    return np.asarray(output(model, params, *inputs))


def relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@every_family
def test_a_network_is_built_from_its_stored_configuration(row, config):
    model = network(row, config)
    assert family_of(model) is row
    stored = json.loads(json.dumps(config_of(model)))
    assert set(config) <= set(stored)
    again = build_model(row.name, stored)
    assert again == model
    assert hash(again) == hash(model)
    with pytest.raises(ValueError, match=re.escape("unknown fields ['colour']")):
        build_model(row.name, {**config, "colour": 1})


@every_family
def test_parameters_are_known_without_computing_any(row, config):
    shapes = abstract_params(network(row, config))
    assert shapes
    for leaf in shapes.values():
        assert isinstance(leaf, jax.ShapeDtypeStruct)
        assert leaf.dtype == jnp.float32


@pytest.mark.parametrize(("row", "config"), SAVED)
@pytest.mark.parametrize("file", ["folder", "file.safetensors"])
def test_what_is_saved_is_loaded_bit_for_bit(row, config, file, tmp_path):
    model = network(row, config)
    qdit.save(tmp_path / file, qdit.Checkpoint(model, params_of(model)))
    read = qdit.load(tmp_path / file)
    assert read.model == model
    assert jax.tree.structure(read.params) == jax.tree.structure(params_of(model))
    jax.tree.map(np.testing.assert_array_equal, read.params, params_of(model))


@every_denoiser
def test_a_network_answers_what_the_rest_asks(row, config):
    model = network(row, config)
    assert isinstance(model, Network)
    assert model.prediction in SAMPLERS[model.default_sampler].predictions
    assert model.guided_channels is None or 0 < model.guided_channels <= model.sample_shape()[-1]
    assert all(type(n) is int and n > 0 for n in model.sample_shape())
    for batch in (1, 3):
        for leaf in jax.tree.leaves(model.example_condition(batch)):
            assert isinstance(leaf, jax.ShapeDtypeStruct)
            assert leaf.shape[0] == batch
    given, expected = conditions(model, 3), model.example_condition(3)
    shapes = jax.eval_shape(lambda: given)
    assert shapes == expected
    model.check_condition(given)
    null = model.null_condition(given, params_of(model))
    assert null is None or model.has_null  # None with guidance: the caller brings one
    if null is not None:
        assert jax.eval_shape(lambda: null) == expected
        model.check_condition(null)
    every = model.all_conditions()
    if every is not None:
        model.check_condition(every)


@every_denoiser
def test_conditions_that_do_not_fit_are_refused(row, config):
    model = network(row, config)
    given = conditions(model, 3)
    if given is None:
        wrong = [jnp.zeros(3, jnp.int32), {"text": jnp.zeros((3, 2))}]
    elif isinstance(given, dict):
        wrong = [{k: v for k, v in given.items() if k != name} for name in given]
        wrong.append({**given, "colour": jnp.zeros(3)})
    else:
        wrong = [given - 1, given + 100, given.astype(float), given[:, None]]
    for condition in wrong:
        with pytest.raises(ValueError, match=r"\w+"):
            model.check_condition(condition)


@every_denoiser
def test_a_call_is_a_function_of_each_sample_alone(row, config):
    model = network(row, config)
    params, inputs = params_of(model), inputs_of(model)
    out = call(model, params, inputs)
    *leading, channels = model.sample_shape()
    assert out.shape == (3, *leading, channels * (1 + model.learned_variance))
    assert np.isfinite(out).all()
    alone = call(model, params, jax.tree.map(lambda leaf: leaf[1:2], inputs))
    np.testing.assert_allclose(alone, out[1:2], atol=1e-4)
    x, timestep, condition = inputs
    assert relative(call(model, params, (x, timestep[::-1], condition)), out) > 1e-3
    for i, leaf in enumerate(jax.tree.leaves(condition)):
        leaves, tree = jax.tree.flatten(condition)
        is_one_for_all = (leaf == leaf[:1]).all()
        leaves[i] = leaf * 0.8 if is_one_for_all else leaf[::-1]
        changed = call(model, params, (x, timestep, jax.tree.unflatten(tree, leaves)))
        assert relative(changed, out) > 1e-4


@every_denoiser
def test_every_layer_belongs_to_one_part_and_every_pattern_to_a_layer(row, config):
    params = params_of(network(row, config))
    layers = layers_of(flatten_dict(params, sep="/"))
    parts = {layer: row.part_of(layer) for layer in layers}
    assert None not in parts.values(), parts
    assert set(parts.values()) == set(row.parts)
    assert "blocks" in row.parts
    for layer, part in parts.items():
        assert part != "blocks" or row.block_of(layer)
    assert row.rounded_first in ("", *row.parts)
    # A family has several kinds of networks, and some layers are of one kind only.
    abstract = [abstract_params(network(row, c)) for c in row.examples]
    every = {p for a in abstract for p in (*layers_of(a), *(n.rpartition("/")[0] for n in a))}
    patterns = [*row.outputs, *row.inputs, row.gelu_inputs, *(fold.layers for fold in row.folds)]
    for pattern in patterns:
        assert pattern == "(?!)" or any(re.fullmatch(pattern, layer) for layer in every), pattern
    assert len(row.operands(layers)) >= 4 * len(row.attention)
    assert row.claims(params)
    assert family_of_params(params) is row


@every_denoiser
def test_taps_see_every_linear_layer_and_operand(row, config):
    model = network(row, config)
    flat = flatten_dict(params_of(model), sep="/")
    kernels, inputs, operands = {}, {}, set()
    for path in layers_of(flat):
        kernels[path] = flat[f"{path}/kernel"].shape
    with seen_inputs(
        lambda path, x: inputs.setdefault(path, x.shape),
        operand_fn=lambda path, x: operands.add(path),
    ):
        jax.eval_shape(model.init, jax.random.key(0), *example_inputs(model))
    # Convolutions of a network's own are layers, and no linear ones.
    convolutions = {p for p in kernels if row.part_of(p) == "convolutions"}
    assert set(inputs) == set(kernels) - convolutions
    for path, shape in inputs.items():
        assert shape[-1] == math.prod(kernels[path][:-1]), path
    assert operands == set(row.operands(kernels))
    order = layers_in_order(model.init, jax.random.key(0), *example_inputs(model))
    assert sorted(order) == sorted(inputs)
    rows = rows_per_sample(model)
    assert set(rows) == set(inputs)
    assert all(count >= 1 for count in rows.values())


@every_denoiser
def test_folds_leave_the_function_as_it_is(row, config):
    model = network(row, config)
    params, inputs = params_of(model), inputs_of(model)
    flat = flatten_dict(params, sep="/")
    rng = np.random.default_rng(2)
    reached = [layer for layer in layers_of(flat) if row.fold_of(layer, flat)]
    assert bool(reached) == bool(row.folds)
    for layer in reached:
        covered = row.covered(layer, flat)
        width = len(covered.scale)
        scale = {layer: np.exp(0.5 * covered.scale * rng.standard_normal(width))}
        shift = {layer: covered.shift * rng.standard_normal(width)}
        folded = fold_inputs(params, scale=scale, shift=shift)
        assert relative(call(model, folded, inputs), call(model, params, inputs)) < 1e-5, layer
        assert bool(row.producers(layer, flat)) == covered.scale.all()
        assert covered.scale.any()
        for name, taken, vector in (
            ("scale", covered.scale, np.full(width, 2.0)),
            ("shift", covered.shift, np.ones(width)),
        ):
            if not taken.all():
                ends = np.flatnonzero(taken)[[0, -1]] if taken.any() else ()
                told = (
                    f"{name} of input channels {ends[0]} to {ends[1]} only"
                    if len(ends)
                    else "no shift"
                )
                with pytest.raises(ValueError, match=told):
                    fold_inputs(params, **{name: {layer: vector}})
        changed = flatten_dict(folded, sep="/")[f"{layer}/kernel"]
        assert relative(np.asarray(changed), np.asarray(flat[f"{layer}/kernel"])) > 0.1


@every_denoiser
def test_a_shift_that_no_fold_takes_stays_at_run_time(row, config):
    model = network(row, config)
    params, inputs = params_of(model), inputs_of(model)
    flat = flatten_dict(params, sep="/")
    rng = np.random.default_rng(3)
    for place in places(params, layers_of(flat)):
        assert not (place.scale_only and not place.folded)
        if not place.scale_only:
            continue
        width = len(row.covered(place.layers[0], flat).scale)
        scale = np.exp(0.5 * rng.standard_normal(width)).astype(np.float32)
        shift = rng.standard_normal(width).astype(np.float32)
        changed = transformed(params, place, Transform(scale, shift))
        assert relative(call(model, changed, inputs), call(model, params, inputs)) < 1e-5, place
        scaled = transformed(params, place, Transform(scale))
        for tree, is_mapped in ((changed, True), (scaled, False)):
            found = flatten_dict(tree, sep="/")
            assert all((f"{layer}/input_map" in found) == is_mapped for layer in place.layers)


@every_denoiser
def test_a_preset_takes_the_blocks_and_every_cost_counts_their_rows(row, config):
    model = network(row, config)
    params = params_of(model)
    checkpoint = qdit.Checkpoint(model, params)
    recipe = qdit.Recipe.preset("w8a8", checkpoint, group_size=8)
    blocks = {p for p in layers_of(flatten_dict(params, sep="/")) if row.part_of(p) == "blocks"}
    assert set(recipe.resolve(params)) == blocks
    rows = rows_per_sample(model)
    once, twice = (
        search_space(params, rows={p: n * count for p, count in rows.items()}, group_sizes=(4, 8))
        for n in (1, 2)
    )
    assert {layer.path for layer in once.layers} == blocks
    for one, two in zip(cost_table(once, BitOps()), cost_table(twice, BitOps()), strict=True):
        assert (one > 0).all()
        np.testing.assert_allclose(two, 2 * one)


@every_denoiser
def test_a_quantized_network_is_close_saved_and_sampled(row, config, tmp_path):
    model = network(row, config)
    full = qdit.Checkpoint(model, params_of(model))
    recipe = qdit.Recipe.preset("w8a8", full, group_size=8)
    params = qdit.quantize_params(full.params, recipe=recipe)
    inputs = inputs_of(model)
    exact, coarse = (call(model, p, inputs) for p in (full.params, params))
    assert 0 < relative(coarse, exact) < 0.1
    qdit.save(tmp_path / "q", dataclasses.replace(full, params=params, recipe=recipe))
    read = qdit.load(tmp_path / "q")
    jax.tree.map(np.testing.assert_array_equal, read.params, params)
    assert read.recipe == recipe
    np.testing.assert_array_equal(call(model, read.params, inputs), coarse)
    kernels = jax.tree.leaves(read.params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    assert sum(isinstance(leaf, QTensor) for leaf in kernels) == len(recipe.resolve(full.params))
    condition = inputs[2]
    if condition is not None:
        guidance = 1.5 if model.has_null else None
        sampler = checkpoint_sampler(full, 2)
        if model.has_null and model.null_condition(condition, full.params) is None:
            condition |= {f"null_{name}": 0.5 * entry[:1] for name, entry in condition.items()}
        images = qdit.generate(full, sampler, condition, guidance=guidance, batch_size=3)
        assert images.shape == (3, *model.sample_shape())
        assert np.isfinite(images).all()


HOISTED = (
    "dit-0",
    "pixart-0",
    "sd3-0",
    "flux-0",
    "stdit3-0",
    "wan-1",
)  # unlike each other; rest slow


@pytest.mark.parametrize(
    ("row", "config"),
    [
        pytest.param(*e.values, id=e.id, marks=() if e.id in HOISTED else pytest.mark.slow)
        for e in DENOISING
    ],
)
def test_modulation_before_the_loop_gives_the_same_samples(row, config):
    model = network(row, config)
    full = qdit.Checkpoint(model, params_of(model))
    condition = inputs_of(model)[2]
    settings = {"guidance": 1.5 if model.has_null else None, "batch_size": 2, "decode_fn": None}
    settings["num_samples"] = 3
    if model.has_null and model.null_condition(condition, full.params) is None:
        condition |= {f"null_{name}": 0.5 * entry[:1] for name, entry in condition.items()}
    sampler = checkpoint_sampler(full, 2)
    if not row.rounded_first:
        with pytest.raises(ValueError, match="no layers that see the condition only"):
            qdit.generate(full, sampler, condition, hoist=True, **settings)
        return
    found = qdit.generate(full, sampler, condition, hoist=True, **settings)
    expected = qdit.generate(full, sampler, condition, **settings)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
