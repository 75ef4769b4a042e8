"""New coordinates of a layer's input change nothing that a network computes, whatever its family.

All layers of a network are changed at once, and the output stays within 1e-5 of its largest value.
"""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_family
import toy_painter
from example_networks import DENOISING, inputs_of, network, params_of
from flax.traverse_util import flatten_dict, unflatten_dict

import qdit_jax as qdit
from qdit_jax.calibration import LayerInputs
from qdit_jax.methods import CalibrationData, Report
from qdit_jax.methods.bench import Bench
from qdit_jax.methods.input_transforms import (
    Transform,
    matrix_of,
    places,
    transformed,
    with_branch,
)
from qdit_jax.methods.rotating import Rotate
from qdit_jax.models import FAMILIES, abstract_params, layers_of, seen_inputs
from qdit_jax.quant import LowRank, WeightSpec
from qdit_jax.recipes import LayerSpec, Recipe, Rule

TOLERANCE = 1e-5
# A kind of `Bench.rotation` -> that of its leaf. QuaRot's is `hadamard`.
ROTATIONS = {"regular": "regular", "hadamard": "hadamard", "pca": "dense"}
JOINED = (
    ("scale", "shift", "regular", "branch"),
    ("scale", "shift", "hadamard", "subspace"),
    ("scale", "shift", "pca"),
)
ALONE = tuple((part,) for part in ("scale", "shift", *ROTATIONS, "branch", "subspace"))
# Every kind of their layers is in another example of the family too.
SLOW = {
    *("dit-1", "dit-2", "sd3-0", "flux-1", "sana-0", "sana-2", "z-image-1", "flux2-0", "latte-1"),
    *("pixart-0", "lightningdit-1", "wan-0"),
}
QUICK = [e for e in DENOISING if e.id not in SLOW]


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for row in (toy_family.ROW, toy_painter.ROW):
        monkeypatch.setitem(FAMILIES, row.name, row)


# Without LLVM's optimizations and XLA's fused loops, compiling takes a third of the time.
compiled = partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0},
)


@compiled(static_argnames="model")
def watched(model, params, inputs):
    """Returns a network's output, and the rows that each layer sees before its own input leaves."""
    seen = {}

    def look(path, x):
        seen.setdefault(path, []).append(x.reshape(-1, x.shape[-1]))

    with seen_inputs(look):
        output = model.apply({"params": params}, *inputs)
    return output, {path: jnp.concatenate(rows) for path, rows in seen.items()}


def relative_error(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def transform_of(rows, parts, seed):
    """Returns a transform with `parts`, drawn or made from the rows of an input."""
    rng = np.random.default_rng(seed)
    width = rows.shape[1]
    scale = np.exp(rng.uniform(-1, 1, width)).astype(np.float32) if "scale" in parts else None
    shift = rng.normal(0, 1, width).astype(np.float32) if "shift" in parts else None
    plain = Transform(scale, shift)
    kind = next((part for part in parts if part in ROTATIONS), None)
    if kind is None:
        return plain
    inputs = LayerInputs(rows.min(0), rows.max(0), np.abs(rows).mean(0), rows)
    return Transform(scale, shift, Bench(inputs, rows, {}, {}).rotation(kind, plain, seed))


def branch_of(kernel, parts, seed):
    """Returns a branch of what a kernel does to a quarter of its input's directions, drawn at random."""
    rank = max(1, min(kernel.shape) // 4)
    drawn = np.random.default_rng(seed).standard_normal((len(kernel), rank))
    down = np.linalg.qr(drawn)[0].astype(np.float32)
    up = jnp.matmul(down.T, kernel, precision="highest")
    if "subspace" in parts:  # in float32: a subspace in 16 bits carries its own rounding
        return LowRank(down, up, subspace=True)
    return LowRank(down.astype(np.float16), up.astype(np.float16))


def in_new_coordinates(params, seen, parts):
    """Returns `params` with `parts` at every layer, and the places that share a transform."""
    every = places(params, seen)
    rows = [np.concatenate([seen[path] for path in place.layers]) for place in every]
    transforms = [transform_of(rows[i], parts, i) for i in range(len(every))]

    @compiled
    def change(params):
        for place, transform in zip(every, transforms, strict=True):
            params = transformed(params, place, transform)
        for number, path in enumerate(seen if {"branch", "subspace"} & set(parts) else ()):
            kernel = flatten_dict(params, sep="/")[f"{path}/kernel"]
            kernel = kernel.reshape(-1, kernel.shape[-1])
            params = with_branch(params, path, branch_of(kernel, parts, number))
        return params

    return change(params), every


def check_leaves(params, seen, every, parts):
    """Asserts that every layer has what `parts` ask for beside its kernel, and nothing else."""
    flat = flatten_dict(params, sep="/")
    assert sorted(path for place in every for path in place.layers) == sorted(seen)
    kind = next((ROTATIONS[part] for part in parts if part in ROTATIONS), None)
    for place in every:
        for path in place.layers:
            width = len(matrix_of(params, [path]))
            rotates = width % (2 if kind == "hadamard" else 4) == 0 and kind is not None
            rotation = flat.get(f"{path}/rotation")
            assert getattr(rotation, "kind", None) == (kind if rotates else None), path
            vectors = {"scale", "shift"} & set(parts)
            taken = place.folded and not (place.scale_only and "shift" in vectors)
            mapped = bool(vectors) and not taken
            assert (f"{path}/input_map" in flat) == mapped, path
            assert (f"{path}/low_rank" in flat) == bool({"branch", "subspace"} & set(parts)), path


@pytest.mark.parametrize(
    ("row", "config", "every"),
    [
        pytest.param(*e.values, every, id=f"{e.id}-{name}", marks=() if quick else pytest.mark.slow)
        for e in DENOISING
        for name, every in (("joined", JOINED), ("alone", ALONE))
        for quick in [e in QUICK and every is JOINED]
    ],
)
def test_the_output_is_unchanged_by_every_transform_of_all_layers(row, config, every):
    model = network(row, config)
    params, inputs = params_of(model), inputs_of(model)
    expected, seen = jax.tree.map(np.asarray, watched(model, params, inputs))
    for parts in every:
        changed, shared = in_new_coordinates(params, seen, parts)
        check_leaves(changed, seen, shared, parts)
        found = np.asarray(watched(model, changed, inputs)[0])
        assert relative_error(found, expected) < TOLERANCE, parts
    # The law could not fail for a layer whose product did not count.
    flat = flatten_dict(params, sep="/")
    for path in seen:
        wrong = unflatten_dict({**flat, f"{path}/kernel": -flat[f"{path}/kernel"]}, sep="/")
        found = np.asarray(watched(model, wrong, inputs)[0])
        assert relative_error(found, expected) > 10 * TOLERANCE, path


@pytest.mark.parametrize(("row", "config"), QUICK)
def test_a_layer_that_a_transform_does_not_fit_is_refused_by_name(row, config):
    model = network(row, config)
    checkpoint = qdit.Checkpoint(model, params_of(model))
    flat = flatten_dict(checkpoint.params, sep="/")
    for path in layers_of(flat):
        width = len(matrix_of(checkpoint.params, [path]))
        unfit = {"hadamard64": 64} if width % 64 else {}
        unfit |= {"hadamard": 4, "smooth+pca": 4} if width % 4 else {}
        for name, size in unfit.items():
            spec = LayerSpec(WeightSpec(4, 0), transform=name)
            message = f"of {path}, but {size} does not divide its {width} input channels"
            with pytest.raises(ValueError, match=re.escape(message)):
                qdit.quantize(checkpoint, "best", Recipe((Rule(re.escape(path), spec),)))


def test_a_convolution_is_refused_by_name():
    model = toy_painter.ToyPainter()
    recipe = Recipe((Rule("down/spread", LayerSpec(WeightSpec(4, 0))),))
    given = {"model": model, "recipe": recipe, "data": CalibrationData(), "report": Report()}
    with pytest.raises(ValueError, match="down/spread is not a linear layer of this network's"):
        Rotate("regular")(params_of(model), **given)


@pytest.mark.slow
def test_examples_that_are_left_to_slow_tests_have_no_kind_of_layers_of_their_own():
    def kinds_of(examples):
        shapes = ((e.values[0], abstract_params(network(*e.values))) for e in examples)
        found = {(row.name, row.kind_of(path)) for row, flat in shapes for path in layers_of(flat)}
        # An expert of Wan's A14B has the layers of a Wan of one network.
        return {(name, re.sub("^(high|low)/", "", kind)) for name, kind in found}

    assert {e.id for e in DENOISING} >= SLOW
    assert kinds_of(QUICK) == kinds_of(DENOISING)
