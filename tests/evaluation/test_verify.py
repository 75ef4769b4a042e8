"""`qdit.verify`: silent no-ops are failures by name, decibels are those of float64, limits count."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_family
import toy_painter
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_models import output, random_params, tiny_checkpoint

import qdit_jax as qdit
from qdit_jax import metrics
from qdit_jax.calibration import collect_items
from qdit_jax.cli import verify_table
from qdit_jax.cli.output import plain
from qdit_jax.evaluation import Layer, Limits, most_bytes
from qdit_jax.evaluation.layer_facts import layer_facts
from qdit_jax.evaluation.layer_powers import call_powers, folded
from qdit_jax.evaluation.limits import outcomes
from qdit_jax.kernels import gpu_reasons, matmul
from qdit_jax.methods import fold_inputs
from qdit_jax.models import FAMILIES, build_model, seen_inputs
from qdit_jax.ptq import schedule_act_bits
from qdit_jax.quant import fake_quantize
from qdit_jax.recipes import OverTime
from qdit_jax.sampling import initial_noise

FAST = {"num_samples": 2, "steps": 2, "batch_size": 2, "timing": False}
LINEARS = ["blocks_0/attn/proj", "blocks_0/attn/qkv", "blocks_0/mlp/fc1", "blocks_0/mlp/fc2"]


@pytest.fixture(scope="module")
def full():
    return tiny_checkpoint()


def rounded(full, name="w8a8", **options):
    recipe = qdit.Recipe.preset(name, full, group_size=16, **options)
    params = qdit.quantize_params(full.params, recipe=recipe)
    return dataclasses.replace(full, params=params, recipe=recipe)


@pytest.fixture(scope="module")
def small(full):
    return rounded(full)


@pytest.fixture(scope="module")
def found(full, small):
    return qdit.verify(small, against=full, **{**FAST, "timing": True})


def changed(checkpoint, **leaves):
    """Returns the checkpoint with leaves replaced by path, or removed where they are None."""
    flat = dict(flatten_dict(checkpoint.params, sep="/"))
    flat |= leaves
    params = unflatten_dict({k: v for k, v in flat.items() if v is not None}, sep="/")
    return dataclasses.replace(checkpoint, params=params)


def layer(found, path):
    return next(row for row in found.layers if row.path == path)


def test_a_good_checkpoint_passes_and_every_row_says_what_is_stored(full, small, found):
    assert found.passed
    assert found.failures == found.notes == found.limits == []
    assert [row.path for row in found.layers] == LINEARS
    for row in found.layers:
        assert row.weights.text == "8b g16"
        assert row.inputs.text == "8b g16"
        assert row.inputs.mode == "dynamic"
        assert (row.implementation, row.numerics) == ("xla_cpu", "simulated")
        kernel = flatten_dict(small.params, sep="/")[f"{row.path}/kernel"]
        assert row.bytes_after == kernel.nbytes
        assert row.bytes_before == kernel.shape[0] * kernel.shape[1] * 4
        assert row.db > 35
    assert found.num_bytes["after"] == sum(leaf.nbytes for leaf in jax.tree.leaves(small.params))
    assert 8 < found.num_bytes["bits_per_weight"] < 10
    assert found.milliseconds["ratio"] > 0
    json.dumps(plain(found.to_json()), allow_nan=False)


def calls(full):
    """Yields the inputs of the single calls: the reference's steps, conditional and null."""
    noise, keys = initial_noise(jax.random.key(0), jnp.arange(2), full.model.sample_shape())
    label = jnp.array([0, 1])
    _, steps = qdit.diffusion.sample_trajectory(
        qdit.denoiser(full.model, full.params, 1.5), qdit.ddim(2), noise, label, keys
    )
    for x, timestep in zip(steps.x, steps.timestep, strict=True):
        for condition in (label, jnp.full(2, full.model.num_classes)):
            yield x, jnp.full(2, timestep, jnp.float32), condition


def decibels(signal, noise):
    return 10 * math.log10(signal / noise)


def expected_db(full, small, path, scale=1.0, columns=slice(None)):
    """Returns a layer's decibels in float64, its input divided by `scale` in `small`."""
    wide = [flatten_dict(c.params, sep="/") for c in (full, small)]
    exact, bias = (np.asarray(wide[0][f"{path}/{n}"], np.float64) for n in ("kernel", "bias"))
    kernel = np.asarray(qdit.dequantize(wide[1][f"{path}/kernel"]), np.float64)
    spec, inputs, every = wide[1][f"{path}/act_quant"].spec, [], list(calls(full))
    with seen_inputs(lambda name, x: inputs.append(x) if name == path else None):
        for given in every:
            full.model.apply({"params": full.params}, *given)
    signal = noise = 0.0
    for x in inputs:
        seen = np.asarray(fake_quantize(x / scale, spec), np.float64)
        wanted = (np.asarray(x, np.float64) @ exact + bias)[..., columns]
        signal += np.square(wanted).sum()
        noise += np.square((seen @ kernel + bias)[..., columns] - wanted).sum()
    return decibels(signal, noise)


@pytest.mark.parametrize("path", LINEARS)
def test_decibels_of_a_layer_are_those_of_float64(full, small, found, path):
    assert layer(found, path).db == pytest.approx(expected_db(full, small, path), abs=0.02)


def test_decibels_of_calls_and_samples_are_those_of_float64(full, small, found):
    db = []
    for given in calls(full):
        a, b = (
            np.asarray(output(full.model, c.params, *given)[..., :4], np.float64)
            for c in (full, small)
        )
        db.append([decibels(np.square(x).sum(), np.square(x - y).sum()) for x, y in zip(a, b, strict=True)])  # fmt: skip
    means = np.mean(db, axis=1).reshape(2, 2)  # by timestep, conditional and null
    np.testing.assert_allclose(found.output_db["conditional"], means[:, 0], atol=0.05)
    np.testing.assert_allclose(found.output_db["null"], means[:, 1], atol=0.05)
    a, b = (qdit.generate(c, qdit.ddim(2), [0, 1]) for c in (full, small))
    expected = metrics.signal_to_noise_db(a, b).mean()
    assert found.final_db["estimate"] == pytest.approx(expected, abs=0.05)
    assert found.final_db["low"] <= expected <= found.final_db["high"]


def test_a_folded_input_is_measured_in_its_own_coordinates(full):
    rng = np.random.default_rng(0)
    scale = {p: np.exp(rng.standard_normal(32)).astype(np.float32) for p in LINEARS[:3]}
    moved = dataclasses.replace(full, params=fold_inputs(full.params, scale=scale))
    small = dataclasses.replace(rounded(moved))
    found = qdit.verify(small, against=full, **FAST)
    assert found.passed
    assert found.notes == []
    fc1 = expected_db(full, small, "blocks_0/mlp/fc1", scale["blocks_0/mlp/fc1"])
    assert layer(found, "blocks_0/mlp/fc1").db == pytest.approx(fc1, abs=0.02)
    assert layer(found, "blocks_0/mlp/fc1").note is None
    qkv = expected_db(full, small, LINEARS[1], scale[LINEARS[1]], slice(0, 64))
    assert layer(found, LINEARS[1]).db == pytest.approx(qkv, abs=0.02)
    assert layer(found, LINEARS[1]).note == "without folded columns: v"
    assert layer(found, LINEARS[0]).note == f"with the folded columns of {LINEARS[1]}"
    # The error of v counts in proj, so that it is somewhat below its own.
    assert 25 < layer(found, LINEARS[0]).db < 50


def test_outputs_that_are_wholly_folded_are_not_given_a_number(full):
    scale = {"final_layer/linear": np.linspace(0.5, 2, 32, dtype=np.float32)}
    moved = dataclasses.replace(full, params=fold_inputs(full.params, scale=scale))
    recipe = qdit.Recipe.preset("w8a8-all", moved, group_size=16)
    params = qdit.quantize_params(moved.params, recipe=recipe)
    small = dataclasses.replace(moved, params=params, recipe=recipe)
    found = qdit.verify(small, against=full, min_layer_db=20, **FAST)
    assert found.passed
    row = layer(found, "final_layer/adaLN_modulation")
    assert (row.db, row.note) == (None, "folded, compared at the end")
    assert "1 cannot be compared" in found.limits[0].text
    others = [row for row in found.layers if row.path != "final_layer/adaLN_modulation"]
    assert min(row.db for row in others) > 30
    table = layer(found, "y_embedder")
    exact = np.asarray(full.params["y_embedder"]["embedding_table"], np.float64)
    error = np.asarray(qdit.dequantize(params["y_embedder"]["embedding_table"]).T) - exact
    assert table.db == pytest.approx(decibels(np.square(exact).sum(), np.square(error).sum()))


def test_columns_without_bias_are_compared_unless_more_than_rounding_changed_them():
    params = random_params(build_model("z-image", {**FAMILIES["z-image"].examples[0]}))
    flat = flatten_dict(params, sep="/")
    zero = {p: jnp.zeros_like(a) if p.endswith("/bias") else a for p, a in flat.items()}
    reference = unflatten_dict(zero, sep="/")
    recipe = qdit.Recipe.preset("w8a8", group_size=8)
    assert not folded(qdit.quantize_params(reference, recipe=recipe), reference).comparable
    scale = {"layers_0/feed_forward/w2": np.linspace(0.5, 2, 32, dtype=np.float32)}
    moved = qdit.quantize_params(fold_inputs(reference, scale=scale), recipe=recipe)
    [(layer, comparable)] = folded(moved, reference).comparable.items()
    assert layer == "layers_0/feed_forward/w3"
    assert not comparable.any()


@pytest.mark.parametrize(
    ("leaves", "reason"),
    [
        ({"kernel": "full", "act_quant": None}, "not quantized"),
        ({"kernel": "full"}, "not quantized: its weights stay in full precision"),
        ({"act_quant": None}, "not quantized: its input stays in full precision"),
        ({"kernel": "other"}, "weights stored as 4b g16 where the recipe says 8b g16"),
    ],
)
def test_what_the_recipe_names_and_is_not_there_fails_by_name(full, small, leaves, reason):
    path = "blocks_0/mlp/fc2"
    kernel = full.params["blocks_0"]["mlp"]["fc2"]["kernel"]
    kinds = {"full": kernel, "other": qdit.quantize_array(kernel, qdit.WeightSpec(4, 16)), None: None}  # fmt: skip
    broken = changed(small, **{f"{path}/{name}": kinds[kind] for name, kind in leaves.items()})
    rows = layer_facts(broken, full, numerics="simulated", batch_size=2)
    assert {row.path: row.problem for row in rows} == {**dict.fromkeys(LINEARS), path: reason}


def test_a_layer_that_falls_to_xla_says_why(full, small, monkeypatch):
    monkeypatch.setattr(matmul, "default_platform", lambda: "cuda")
    monkeypatch.setattr(gpu_reasons, "machine_reason", lambda check: None)
    rows = layer_facts(small, full, numerics="integer", batch_size=2)
    told = "gpu_groups: it takes inputs in groups that are multiples of 32, not of 16."
    assert [(row.implementation, row.passed_over) for row in rows] == [("xla", told)] * 4
    assert verify_table.row(Layer(**vars(rows[0])))[-1] == f"not {told[:-1]}"
    asked = dataclasses.replace(small, model=small.model.clone(implementation="xla"))
    rows = layer_facts(asked, full, numerics="integer", batch_size=2)
    assert {row.passed_over for row in rows} == {None}


def test_a_silent_no_op_fails_without_any_limit(full, small):
    path = "blocks_0/mlp/fc2"
    kernel = full.params["blocks_0"]["mlp"]["fc2"]["kernel"]
    broken = changed(small, **{f"{path}/kernel": kernel, f"{path}/act_quant": None})
    found = qdit.verify(broken, against=full, **FAST)
    assert not found.passed
    assert found.failures == [f"{path}: not quantized"]
    assert found.limits == []
    assert (layer(found, path).db, layer(found, path).numerics) == (200.0, "full precision")


def test_operands_that_the_recipe_names_are_checked_and_measured(full):
    recipe = qdit.Recipe.preset("w8a8", full, group_size=16).with_part("attention", "w16a8")
    params = qdit.quantize_params(full.params, recipe=recipe)
    small = changed(dataclasses.replace(full, params=params, recipe=recipe),
                    **{"blocks_0/attn/k_quant": None})  # fmt: skip
    found = qdit.verify(small, against=full, **FAST)
    assert found.failures == ["blocks_0/attn/operands/k: not quantized"]
    for name in ("q", "v", "softmax"):
        assert 35 < layer(found, f"blocks_0/attn/operands/{name}").db < 80
    # Without the operands' own errors.
    alone = qdit.verify(rounded(full), against=full, **FAST)
    assert layer(found, LINEARS[0]).db == pytest.approx(layer(alone, LINEARS[0]).db, abs=0.02)


def test_nothing_is_compiled_for_a_layer_or_a_second_time(full, small, found):
    before = call_powers._cache_size()
    qdit.verify(small, against=full, **FAST)
    assert call_powers._cache_size() == before


@pytest.mark.parametrize(
    ("limit", "passed"),
    [
        ({"min_db": 20}, True),
        ({"min_db": 90}, False),
        ({"min_layer_db": 30}, True),
        ({"min_layer_db": 60}, False),
        ({"max_bytes": 10**6}, True),
        ({"max_bytes": "1MB"}, True),
        ({"max_bytes": "1KB"}, False),
        ({"max_bytes": "0.99x"}, True),
        ({"max_bytes": "0.1x"}, False),
        ({"max_ms_ratio": 1e6}, True),
        ({"max_ms_ratio": 1e-6}, False),
        ({"implementation": "xla_cpu"}, True),
        ({"implementation": "xla"}, False),
    ],
)
def test_every_limit_passes_and_fails(found, limit, passed):
    (outcome,) = outcomes(
        Limits(**limit),
        found.layers,
        final_db=found.final_db["estimate"],
        num_bytes=(found.num_bytes["before"], found.num_bytes["after"]),
        ms_ratio=found.milliseconds["ratio"],
    )
    assert outcome.passed == passed
    assert {outcome.name: outcome.limit} == limit
    if not passed and limit.keys() & {"min_layer_db", "implementation"}:
        assert LINEARS[0] in outcome.text
        assert "and 1 more" in outcome.text


def test_samples_that_are_not_finite_fail(full, small):
    bias = full.params["final_layer"]["linear"]["bias"].at[0].set(jnp.inf)
    found = qdit.verify(
        changed(small, **{"final_layer/linear/bias": bias}), against=full, min_db=-500, **FAST
    )
    assert "2 of 2 samples are not finite" in found.failures
    assert not found.limits[0].passed


def test_another_reference_is_told(full, small):
    other = dataclasses.replace(full, params=random_params(full.model, seed=1))
    found = qdit.verify(small, against=other, **FAST)
    assert "layers in full precision differ from the reference's" in found.notes[0]


@pytest.mark.parametrize("limit", ["5 apples", "0x", "-1", "1.2iB", "0"])
def test_a_size_that_is_none_is_refused(limit):
    with pytest.raises(qdit.UserError, match=f"max_bytes={limit} is not a size; use a number of"):
        most_bytes(limit, 100)


def test_sizes_are_read():
    assert most_bytes("500MB", 1) == 500 * 10**6
    assert most_bytes("1.5 GiB", 1) == 3 * 2**29
    assert most_bytes("2kb", 1) == 2000
    assert most_bytes("0.5x", 101) == 50
    assert most_bytes(7, 1) == 7


def test_what_cannot_be_verified_is_refused_by_name(full, small):
    with pytest.raises(qdit.UserError, match="nothing in it is quantized; give the output of"):
        qdit.verify(full, against=full, **FAST)
    with pytest.raises(qdit.UserError, match=r"against=the reference is quantized \(w8a8-g16\)"):
        qdit.verify(small, against=small, **FAST)
    deeper = tiny_checkpoint(depth=2)
    with pytest.raises(
        qdit.UserError, match="checkpoint has depth=1 and the reference has depth=2"
    ):
        qdit.verify(small, against=deeper, **FAST)
    toy = qdit.Checkpoint(toy_family.ToyVideo(), {})
    with pytest.raises(qdit.UserError, match="is of family dit and the reference of family ToyVi"):
        qdit.verify(small, against=toy, **FAST)
    with pytest.raises(qdit.UserError, match="implementation='fast' is not known; use one of xla"):
        qdit.verify(small, against=full, implementation="fast")
    with pytest.raises(qdit.UserError, match="max_ms_ratio=2 needs the time of a call"):
        qdit.verify(small, against=full, max_ms_ratio=2, **FAST)
    with pytest.raises(ValueError, match="num_samples=1 is not supported"):
        qdit.verify(small, against=full, num_samples=1)
    weights = rounded(full, "w4a16")
    with pytest.raises(ValueError, match="no layer quantizes its inputs as well"):
        qdit.verify(weights, against=full, numerics="integer")


@pytest.fixture(scope="module")
def items(full):
    return collect_items(full, jax.random.key(0), 2, sampler=qdit.ddim(2), batch_size=2)


@pytest.mark.parametrize("method", ["smoothquant", "quarot", "svdquant"])
def test_methods_with_transforms_pass(full, items, method):
    recipe = qdit.Recipe.preset("w6a8", full, layers="blocks_0/attn/(qkv|proj)", group_size=16)
    data = qdit.CalibrationData(items=items, batch_size=8, holdout=0.5)
    small = qdit.quantize(full, method, recipe, data=data)
    found = qdit.verify(small, against=full, numerics="integer", min_layer_db=18, **FAST)
    assert found.passed, (found.failures, found.limits)
    assert found.notes == []
    assert {row.numerics for row in found.layers} == {"integer"}
    flat = flatten_dict(small.params, sep="/")
    for row in found.layers:
        slots = ("input_map", "rotation", "low_rank")
        assert row.leaves == tuple(s for s in slots if f"{row.path}/{s}" in flat)
    if method != "smoothquant":
        assert all(row.leaves for row in found.layers)


def test_text_conditions_and_cross_attention(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", toy_family.ROW)
    model = toy_family.ToyVideo(depth=1)
    full = qdit.Checkpoint(model, random_params(model))
    recipe = qdit.Recipe.preset("w8a8", full, group_size=16).with_part("cross_attention", "w16a8")
    params = qdit.quantize_params(full.params, recipe=recipe)
    small = dataclasses.replace(full, params=params, recipe=recipe)
    conditions = toy_family.prompts(model=model)
    found = qdit.verify(small, against=full, conditions=conditions, **FAST)
    assert found.passed
    paths = {row.path for row in found.layers if row.kind == "linear"}
    assert {f"layers_0/cross/{name}" for name in ("q", "kv", "proj")} < paths
    assert min(row.db for row in found.layers) > 30
    assert len(found.output_db["null"]) == len(found.output_db["conditional"]) == 2
    with pytest.raises(ValueError, match="this model takes prompts"):
        qdit.verify(small, against=full, **FAST)


def test_a_network_without_conditions(monkeypatch):
    monkeypatch.setitem(FAMILIES, toy_painter.ROW.name, toy_painter.ROW)
    model = toy_painter.ToyPainter()
    full = qdit.Checkpoint(model, random_params(model))
    small = qdit.quantize(full, "rtn", qdit.Recipe.preset("w8a8", full, group_size=16))
    found = qdit.verify(small, against=full, **FAST)
    assert found.passed
    assert "null" not in found.output_db
    assert found.settings["guidance"] == 1.0


def test_activation_bits_over_time_are_those_of_the_recipe(full, small):
    over_time = OverTime((999.0, 0.0), (8, 4))
    scheduled = schedule_act_bits(small, over_time)
    found = qdit.verify(scheduled, against=full, **FAST)
    assert found.passed
    assert any("bits change over time" in note for note in found.notes)
    lacking = dataclasses.replace(scheduled, params=small.params)
    found = qdit.verify(lacking, against=full, **FAST)
    assert found.failures == ["the recipe changes bits over time, and the checkpoint does not"]
    other = schedule_act_bits(small, OverTime((999.0, 0.0), (4, 8)))
    found = qdit.verify(dataclasses.replace(other, recipe=scheduled.recipe), against=full, **FAST)
    assert not found.passed
    assert "otherwise than the recipe says" in found.failures[0]
