"""Measured times as a cost: reading, what is missing, budgets of them."""

import dataclasses
import json

import numpy as np
import pytest
from search_models import small_model, small_space

from qdit_jax import UserError
from qdit_jax.allocation import (
    Latency,
    LayerTime,
    SearchLayer,
    choice_name,
    cost_table,
    named_costs,
    parse_budget,
)
from qdit_jax.allocation.latency import this_device, timed_name
from qdit_jax.quant import ActSpec, WeightSpec, formats, ranges
from qdit_jax.recipes import LayerSpec

MADE = {"device": f"1 x {this_device()}"}


@pytest.fixture(scope="module")
def space():
    return small_space(small_model()[1])


def table_of(space, ms_fn, **changes):
    """Returns a table with `ms_fn(K, N, rows, spec)` for all choices of a space, at batch 2."""
    found = {}
    for layer in space.layers:
        k, n = layer.shape
        specs = (LayerSpec(), *layer.choices, LayerSpec(WeightSpec(4, 0), ActSpec(8, 0)))
        for spec in specs:
            ms = ms_fn(k, n, layer.rows * 4, spec)
            time = LayerTime(k, n, layer.rows * 4, choice_name(spec, k), ms, ms, ms, 0.5)
            found[time.key] = time
    return Latency(2, 4, "simulated", 100.0, tuple(found.values()), MADE, **changes)


def by_segments(k, n, rows, spec):
    size = spec.weight.group_size or k if spec.weight else k
    return 1.5 + k * n * rows / 1e6 * (1 + 8 / size)


def test_a_cost_is_the_time_without_that_of_a_call(space):
    times = table_of(space, by_segments)
    for layer, row in zip(space.layers, cost_table(space, times), strict=True):
        wanted = [by_segments(*layer.shape, layer.rows * 4, c) - 0.5 for c in layer.choices]
        np.testing.assert_allclose(row, wanted)
    full = sum(times(layer, LayerSpec()) for layer in space.layers)
    assert times.remainder(space) == pytest.approx(100 - full)


def test_a_file_gives_the_same_table_back(space, tmp_path):
    times = table_of(space, by_segments)
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(times.to_json()))
    again = Latency.read(path)
    assert again.layers == times.layers
    assert again.source == "latency.json"
    assert again.facts(space)["remainder_ms"] == times.remainder(space)


def test_a_budget_may_be_the_speed_of_a_uniform_recipe(space):
    costs = {**named_costs(), "latency": table_of(space, by_segments)}
    budget = parse_budget("latency=1.1x-w4a8-g0", space, costs)
    spec = LayerSpec(WeightSpec(4, 0), ActSpec(8, 0))
    whole = sum(costs["latency"](x, spec) for x in space.layers)
    assert budget.limit == pytest.approx(1.1 * whole)
    assert parse_budget("latency=30", space, costs).limit == 30


def test_what_was_not_measured_is_named_with_the_command_that_measures_it(space):
    times = table_of(space, by_segments)
    layer = space.layers[0]
    k, n = layer.shape
    spec = LayerSpec(WeightSpec(3, 16), ActSpec(8, 32))
    with pytest.raises(UserError) as error:
        times(layer, spec)
    assert str(error.value) == (
        f"the latency table has no time for K={k} N={n} rows={layer.rows * 4} w3 g16 a8 g32, of "
        f"{layer.path}; measure it: qdit bench CKPT OUT --table --batch 2 --numerics simulated "
        "--weight-bits 3 4 --act-bits 8 --group-sizes 8 16 32 64 --sides separate"
    )
    moved = dataclasses.replace(layer, rows=layer.rows + 1)
    text = f"rows={layer.rows * 4 + 4} w4 g8 a8 g8.*64 with the --layers and --embeds of the search"
    with pytest.raises(UserError, match=text):
        times(moved, layer.choices[0])


def test_a_space_is_refused_with_the_command_that_measures_all_of_it(space):
    times = table_of(space, by_segments)
    times.check(space)
    beside = {"transforms": ("none", "smooth"), "ranks": (0, 2), "formats": ("int", "nf4")}
    wider = small_space(small_model()[1], **beside)
    with pytest.raises(UserError) as error:
        times.check(wider)
    layer = wider.layers[0]
    assert str(error.value) == (
        f"the latency table has no time for K=64 N=64 rows={layer.rows * 4} w4 g8 a8 g8 rank=2, of "
        f"{layer.path}; measure it: qdit bench CKPT OUT --table --batch 2 --numerics simulated "
        "--weight-bits 4 --act-bits 8 --group-sizes 8 16 32 64 --formats int nf4 "
        "--transforms none smooth --ranks 0 2"
    )


def test_what_is_folded_takes_no_time():
    sides = (WeightSpec(4, 32), ActSpec(8, 32))
    layer = SearchLayer("x", (64, 100), ())
    folded = dataclasses.replace(layer, folded=True)

    def names(transform, rank=0):
        spec = LayerSpec(*sides, transform, rank)
        return [timed_name(one, spec).removeprefix("w4 g32 a8 g32") for one in (layer, folded)]

    assert names("none") == ["", ""]
    assert names("smooth+shift", 3) == [" transform=smooth+shift rank=3", " rank=3"]
    assert names("smooth+hadamard") == [" transform=smooth+hadamard", " transform=hadamard"]


def test_a_name_says_all_that_time_may_depend_on():
    def name(weight, act=None):
        return choice_name(LayerSpec(weight, act), 64)

    assert name(None) == "w16 a16"
    assert name(WeightSpec(4, 64)) == name(WeightSpec(4, 0)) == "w4 g0 a16"
    assert name(WeightSpec(4, 32, range_fn=ranges.mse())) == "w4 g32 a16"  # only other values
    assert name(None, ActSpec(8, 32, range_fn=ranges.mse())) != name(None, ActSpec(8, 32))
    assert name(WeightSpec(4, 32, symmetric=True)) == "w4 g32 symmetric=True a16"
    assert name(WeightSpec(4, 32, scale_dtype="float16")) == "w4 g32 scale_dtype=float16 a16"
    assert name(WeightSpec(fmt=formats.by_name("nf4"), group_size=32)).startswith("w-nf4 g32")


def test_another_device_is_said(space):
    assert table_of(space, by_segments).device_note() is None
    other = dataclasses.replace(
        table_of(space, by_segments), provenance={"device": "1 x tpu (v5e, x)"}
    )
    assert "measured on tpu (v5e, x) and this machine has" in other.device_note()


@pytest.mark.parametrize(
    ("change_fn", "message"),
    [
        (lambda data: "no object", "is not a latency table"),
        (lambda data: {"rows": []}, "is not a latency table"),
        (lambda data: data | {"latency_version": 9}, "latency_version=9"),
        (lambda data: data | {"speed": 1}, "not a whole latency table.*speed"),
        (lambda data: data | {"layers": [{"rows": 1}]}, "not a whole latency table"),
        (lambda data: data | {"provenance": {}}, "not a whole latency table: 'device'"),
        (lambda data: data | {"step_ms": -1.0}, "holds a time of -1.0 ms"),
        (lambda data: data | {"layers": data["layers"][:1] * 2}, "twice; measure it again"),
        (lambda data: data | {"layers": [data["layers"][0] | {"ms": float("nan")}]}, "of nan ms"),
    ],
)
def test_a_wrong_file_is_refused(space, tmp_path, change_fn, message):
    data = table_of(space, by_segments).to_json()
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(change_fn(json.loads(json.dumps(data)))))
    with pytest.raises(UserError, match=message):
        Latency.read(path)


def test_a_file_that_is_absent_or_no_json_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist; `qdit bench CKPT OUT --table` writes one"):
        Latency.read(tmp_path / "absent.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="is not readable JSON"):
        Latency.read(tmp_path / "x.json")
