"""What every method of the table keeps, whatever it does."""

from __future__ import annotations

import dataclasses
import inspect
import json
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_models import output, tiny_checkpoint
from told import Told

import qdit_jax as qdit
from qdit_jax import methods
from qdit_jax.calibration import Stats, collect_items
from qdit_jax.checkpoint import load
from qdit_jax.diffusion import ddim
from qdit_jax.methods import METHODS, CalibrationData, Method, method_named
from qdit_jax.models import Linear
from qdit_jax.quant import ActSpec, QTensor, ranges, slots
from qdit_jax.recipes import LayerSpec, Recipe, Rule
from qdit_jax.recipes.presets import preset_spec

LAYERS = "blocks_0/(attn/qkv|mlp/fc2)"
BITS = {name: 4 if method_named(name).settings.get("weight_format") else 3 for name in METHODS}
STATIC = {n for n in METHODS if method_named(n).settings.get("act_mode") == "static"}
# It rotates without asking whether that helps, which it does not where nothing lies out.
LOSES = {"vidit_q"}
LEARNING = [n for n in METHODS if method_named(n).needs and n not in STATIC | LOSES]
# Entries that a method may put beside the kernel of a layer, and what it then has changed elsewhere.
BESIDE = tuple(f"/{slot}" for role in ("input", "output") for slot in slots(role))
every_method = pytest.mark.parametrize("name", METHODS)
method_and_bits = pytest.mark.parametrize(
    ("name", "bits"), [*BITS.items(), ("rtn", 8), ("gptq", 8), ("best", 8), ("svdquant", 8)]
)


@cache
def checkpoint():
    return tiny_checkpoint(hidden_size=16)


@cache
def items(seed):
    sampler = ddim(steps=4)
    return collect_items(checkpoint(), jax.random.key(seed), 16, sampler=sampler, batch_size=16)


def recipe_for(name, bits):
    return method_named(name).preset(f"w{bits}a8", group_size=8, layers=LAYERS)


@cache
def quantized(name, bits):
    """Returns the result of a method on 128 items, and what it said on the way."""
    told = Told()
    result = qdit.quantize(
        checkpoint(),
        name,
        recipe_for(name, bits),
        data=CalibrationData(items=items(0), batch_size=32),
        progress_fn=told.tell,
    )
    return result, told


def outputs(params):
    return np.asarray(output(checkpoint().model, params, *items(1)[:3]))


@method_and_bits
def test_exactly_what_the_recipe_names_is_quantized(name, bits):
    specs = recipe_for(name, bits).resolve(checkpoint().params)
    found = flatten_dict(quantized(name, bits)[0].params, sep="/")
    before = flatten_dict(checkpoint().params, sep="/")
    beside = {path for path in found if path.endswith(BESIDE)}
    assert {path.rpartition("/")[0] for path in beside} <= set(specs)
    assert set(found) - beside == set(before) | {f"{path}/act_quant" for path in specs}
    for path, spec in specs.items():
        kernel, quantizer = found[f"{path}/kernel"], found[f"{path}/act_quant"]
        assert (kernel.bits, kernel.group_size, kernel.fmt, kernel.shape) == (
            spec.weight.bits,
            spec.weight.group_size,
            spec.weight.fmt,
            before[f"{path}/kernel"].shape,
        )
        assert quantizer.spec == spec.act
        assert (quantizer.scale is not None) == (spec.act.mode == "static")
    others = {path for path in before if path.removesuffix("/kernel") not in specs}
    assert not [path for path in others if isinstance(found[path], QTensor)]
    changed = {path.rpartition("/")[0] for path in others if found[path] is not before[path]}
    if not method_named(name).prepare:
        assert not changed
    # What makes a folded input changes too, and the bias of a layer whose input was shifted.
    assert changed <= {*specs, "blocks_0/adaLN_modulation"}


@pytest.mark.parametrize(
    ("name", "bits"),
    [(n, b) for n, b in BITS.items() if n in LEARNING] + [("gptq", 8), ("best", 8)],
)
def test_a_method_that_learns_is_no_worse_than_nearest_on_other_inputs(name, bits):
    nearest = qdit.quantize_params(checkpoint().params, recipe=recipe_for(name, bits))
    full = outputs(checkpoint().params)
    ours, plain = (
        float(np.linalg.norm(outputs(params) - full))
        for params in (quantized(name, bits)[0].params, nearest)
    )
    assert ours < (1.0 if bits == 3 else 1.1) * plain


@every_method
def test_each_layer_is_reported_and_every_batch_counted(name):
    result, told = quantized(name, BITS[name])
    layers, totals = told.layers, told.of("total")
    recipe = recipe_for(name, BITS[name])
    assert sorted(layer.path for layer in layers) == sorted(recipe.resolve(checkpoint().params))
    assert totals[-1:] == ([sum(told.counts)] if method_named(name).needs else [])
    assert totals == sorted(totals)
    for layer in layers:
        assert 0 < layer.error_db < 60
        assert (layer.nearest_db is None) == (layer.measured_on == "weights")
    done = result.metadata["quantization"]
    assert done["method"] == name
    assert done["recipe"] == recipe.name
    assert set(done["layers"]) == {layer.path for layer in layers}
    assert set(done["versions"]) == {"qdit_jax", "jax"}
    assert json.loads(json.dumps(done)) == done
    fitted = {"batch_size": 32, "num_items": 128} if method_named(name).needs else {}
    assert done["data"] == {**fitted, "sampled": False, "stats": name in STATIC}


@every_method
def test_the_same_seed_samples_and_rounds_the_same(name):
    recipe = method_named(name).preset("w4a8", group_size=8, layers="final_layer/linear")
    data = CalibrationData(seed=3, num_samples=4, num_steps=3)
    first, again = (qdit.quantize(checkpoint(), name, recipe, data=data) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert first.metadata == again.metadata
    sampled = {"num_samples": 4, "num_steps": 3, "seed": 3, "guidance": "1.5", "sampled": True}
    if method_named(name).needs:
        assert sampled.items() <= first.metadata["quantization"]["data"].items()


@pytest.mark.parametrize(
    ("name", "out"), [*((n, "folder") for n in METHODS), ("best", "file.safetensors")]
)
def test_what_is_written_is_what_is_returned(name, out, tmp_path):
    data = CalibrationData(items=items(0), batch_size=32)
    recipe = method_named(name).preset("w4a8", group_size=8, layers="final_layer/linear")
    result = qdit.quantize(checkpoint(), name, recipe, data=data, out=tmp_path / out)
    read = load(tmp_path / out)
    assert jax.tree.structure(read.params) == jax.tree.structure(result.params)
    jax.tree.map(np.testing.assert_array_equal, read.params, result.params)
    assert read.metadata == result.metadata
    assert read.recipe == recipe
    assert list(read.metadata["quantization"]["layers"]) == ["final_layer/linear"]
    with pytest.raises(qdit.UserError, match="exists already"):
        qdit.quantize(checkpoint(), name, recipe, data=data, out=tmp_path / out)


def test_from_disk_to_disk_is_what_memory_makes(tmp_path):
    qdit.save(tmp_path / "full", checkpoint())
    recipe = recipe_for("rtn", 4)
    written = qdit.quantize(str(tmp_path / "full"), "rtn", recipe, out=tmp_path / "out")
    kept = qdit.quantize(tmp_path / "full", "rtn", recipe)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out").params, kept.params)
    assert written.metadata == kept.metadata == load(tmp_path / "out").metadata
    assert kept.metadata["quantized_from"] == str(tmp_path / "full")


@every_method
def test_a_row_is_complete_and_can_be_written_down(name):
    method = method_named(name)
    described = method.to_json()
    assert json.loads(json.dumps(described)) == described
    assert described["name"] == method.name == name
    assert described["idea"].endswith(".")
    assert described["runtime_cost"].endswith(".")
    assert method.paper == "" or "arXiv:" in method.paper
    fields = {field.name for field in dataclasses.fields(CalibrationData)}
    assert set(method.needs) <= fields


@every_method
def test_the_hardware_is_that_of_its_own_settings(name):
    method = method_named(name)
    if name in STATIC:
        assert "static range per input" in method.hardware
    if method.settings.get("group_size") == 0:
        assert "per output channel" in method.hardware
        assert "per group" not in method.hardware
    if method.settings.get("act_group_size") == 0 and name not in STATIC:
        assert "per token" in method.hardware


def test_every_file_with_a_method_is_in_the_table():
    folder = Path(methods.__file__).parent
    files = (file.stem for file in folder.glob("*.py") if file.stem != "__init__")
    found = {n for n in files if hasattr(import_module(f"qdit_jax.methods.{n}"), "METHOD")}
    assert found == set(METHODS)


@every_method
def test_a_preset_gets_the_settings_of_the_method(name):
    method = method_named(name)
    assert set(method.settings) <= set(inspect.signature(preset_spec).parameters)
    (spec,) = {rule.spec for rule in method.preset("w4a8", checkpoint().params).rules}
    wanted = {
        "qdit_release_gptq": (128, 128, ranges.qdit_release_gptq, ranges.minmax, "dynamic"),
        "qdit_release": (128, 128, ranges.qdit_release_gptq, ranges.qdit_release, "dynamic"),
        "best": (128, 128, ranges.minmax, ranges.minmax, "dynamic"),
        "ptq4dm": (0, 0, ranges.mse(), ranges.mse(), "static"),
        "g4w_p4a": (128, 0, ranges.minmax, ranges.mse(), "static"),
        "svdquant": (64, 64, ranges.minmax, ranges.minmax, "dynamic"),
    }
    found = (
        spec.weight.group_size,
        spec.act.group_size,
        spec.weight.range_fn,
        spec.act.range_fn,
        spec.act.mode,
    )
    if name in wanted or not method.settings:
        assert found == wanted.get(name, (128, 128, ranges.minmax, ranges.minmax, "dynamic"))
    own = method.preset("w4a8", range_fn=ranges.absmax, group_size=16).rules[0].spec.weight
    assert (own.range_fn, own.group_size) == (ranges.absmax, 16)


def static_recipe():
    return Recipe.preset("w4a8", group_size=8, layers=LAYERS, act_mode="static")


@every_method
@pytest.mark.parametrize(
    ("recipe", "data", "error", "message"),
    [
        ("w4", None, ValueError, "recipe='w4' is not a preset"),
        ("none.json", None, ValueError, "recipe file none.json does not exist"),
        (4, None, TypeError, "recipe=4 is a int"),
        (Recipe((Rule("nothing", LayerSpec(None, ActSpec(8))),)), None, ValueError, "'nothing' matches no layer"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_sampled(name, recipe, data, error, message):
    full = dataclasses.replace(checkpoint(), model=Linear(8))  # which cannot sample
    with pytest.raises(error, match=message):
        qdit.quantize(full, name, recipe, data=data)


@every_method
def test_static_ranges_come_from_statistics_or_from_the_method_s_own_inputs(name):
    method = method_named(name)
    if not method.takes_own_ranges:
        with pytest.raises(ValueError, match="mode='static'"):
            qdit.quantize(checkpoint(), name, static_recipe())
        return
    stats = Stats(np.zeros(1), {}, {})
    with pytest.raises(ValueError, match=rf"method '{name}' takes the ranges .* leave stats"):
        qdit.quantize(checkpoint(), name, static_recipe(), data=CalibrationData(stats=stats))
    if name in STATIC:
        return  # tested above
    data = CalibrationData(items=items(0), batch_size=32)
    result = qdit.quantize(checkpoint(), name, static_recipe(), data=data).params
    quantizer = flatten_dict(result, sep="/")["blocks_0/mlp/fc2/act_quant"]
    assert quantizer.scale.shape == (8,)
    assert np.isfinite(outputs(result)).all()


def test_names_settings_and_data_are_refused_by_name():
    with pytest.raises(ValueError, match="method='nearest' is not known; use one of rtn, gptq"):
        qdit.quantize(checkpoint(), "nearest")
    with pytest.raises(ValueError, match="is quantized already"):
        qdit.quantize(quantized("rtn", 8)[0], "rtn", recipe_for("rtn", 8))
    with pytest.raises(TypeError, match=r"quantize_params\(params, recipe=recipe\)"):
        qdit.quantize(checkpoint().params)
    for options in ({"num_samples": 0}, {"batch_size": 0}, {"holdout": 1.0}, {"stages": "row"}):
        (setting,) = options
        with pytest.raises(ValueError, match=f"{setting}="):
            CalibrationData(**options)
    wide = items(0)._replace(x=np.zeros((128, 8, 8, 4), np.float32))
    with pytest.raises(
        ValueError, match=r"holds inputs \[8, 8, 4\], but the network takes \[4, 4, 4\]"
    ):
        qdit.quantize(checkpoint(), "gptq", data=CalibrationData(items=wide))
    with pytest.raises(ValueError, match="'qdit_release' has the release's own stages"):
        qdit.quantize(checkpoint(), "qdit_release", data=CalibrationData(stages="layer"))
    whole = Recipe.preset("w4a8", group_size=0)
    with pytest.raises(ValueError, match=r"'qdit': .* has group_size=0"):
        qdit.quantize(checkpoint(), "qdit", whole)


@pytest.mark.parametrize("name", ["best", "gptq", "svdquant", "adaround", "brecq"])
def test_methods_that_learn_a_rounding_refuse_number_formats_before_they_sample(name):
    recipe = Recipe.preset("nvfp4", layers="blocks_0/mlp/fc1")
    with pytest.raises(
        ValueError, match=r"gives blocks_0/mlp/fc1 weights of the format 'nvfp4'; use"
    ):
        qdit.quantize(checkpoint(), name, recipe, data=CalibrationData(num_samples=10**9))


def test_a_method_of_ones_own_says_what_it_lacks():
    own = dataclasses.replace(method_named("rtn"), name="own", stream=None, needs={"stats": None})
    with pytest.raises(ValueError, match=r"'own' needs stats.*stats=qdit.calibrate"):
        qdit.quantize(checkpoint(), own)
    seen, stats = [], Stats(np.zeros(1), {}, {})

    def collect(checkpoint, data):
        seen.append(data.num_samples)
        return stats

    def apply(params, *, model, recipe, data, report):
        assert data.stats is stats
        return params

    collecting = Method("own", "", "An idea.", "None.", partial(apply), needs={"stats": collect})
    full = qdit.quantize(checkpoint(), collecting, data=CalibrationData(num_samples=7))
    assert seen == [7]
    jax.tree.map(np.testing.assert_array_equal, full.params, checkpoint().params)


def test_arrays_are_still_quantized_by_the_same_name():
    w = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    spec = qdit.WeightSpec(4, 8)
    expected = qdit.quantize_array(w, spec)
    for found in (qdit.quantize(w, spec), qdit.quantize(jax.numpy.asarray(w), spec=spec)):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.eval_shape(lambda w: qdit.quantize(w, spec), w).shape == (16, 4)


def test_few_inputs_and_uniform_groups_are_said():
    told = Told()
    recipe = method_named("qdit").preset("w4a8", group_size=8, layers="blocks_0/mlp/fc2")
    few = jax.tree.map(lambda array: array[:8], items(0))
    data = CalibrationData(items=few, holdout=0)
    result = qdit.quantize(checkpoint(), "qdit", recipe, data=data, progress_fn=told.tell)
    notes = told.texts
    assert "all layers have one group size" in notes[0]
    assert "32 inputs for the 64 channels of blocks_0/mlp/fc2" in notes[1]
    assert "nothing was held out" in notes[2]
    assert result.metadata["quantization"]["notes"] == notes


def test_what_was_done_before_is_kept():
    first = quantized("rtn", 8)[0]
    more = Recipe.preset("w8a16", group_size=8, layers="final_layer/linear")
    second = qdit.quantize(first, "rtn", more)
    assert second.metadata["quantization"]["earlier"] == first.metadata["quantization"]
