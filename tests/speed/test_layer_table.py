"""`layer_table`: what is timed, how often, and that a search can use it."""

import dataclasses
import functools
import operator

import jax
import numpy as np
import pytest
from tiny_models import tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.allocation import (
    Priced,
    Rollouts,
    recipe_of,
    run_time_spec,
    search,
    search_space,
)
from qdit_jax.calibration import Items
from qdit_jax.methods import CalibrationData, method_named
from qdit_jax.models import rows_per_sample
from qdit_jax.speed import layer_table
from qdit_jax.speed.layers import choices_by_shape, layer_params, times_of

FULL_MS, CALL_MS = 8.0, 0.25


class FakeTimer:
    """Runs every call, and takes longer for smaller groups of weights."""

    def __init__(self):
        self.names = []

    def __call__(self, calls, num_rounds):
        self.names += [call.name for call in calls]
        ms = [self.ms(call) for call in calls]
        return np.repeat(np.array(ms)[:, None] / 1000, num_rounds, axis=1)

    def ms(self, call):
        assert np.isfinite(np.asarray(call.run())).all()
        if call.name == "float32":
            return 100.0
        if call.name.endswith("nothing"):
            return CALL_MS
        if call.name.endswith("w16 a16"):
            return FULL_MS
        size = int(call.name.split(" g")[1].split()[0]) or 64
        return CALL_MS + 1 + 8 / size


@pytest.fixture(scope="module")
def checkpoint():
    return tiny_checkpoint(in_channels=1)


@pytest.fixture(scope="module")
def space(checkpoint):
    rows = rows_per_sample(checkpoint.model)
    return search_space(checkpoint.params, rows=rows, group_sizes=(8, 16))


@pytest.fixture(scope="module")
def times(checkpoint, space):
    return layer_table(checkpoint, space, batch=3, num_rounds=2, time_fn=FakeTimer())


def test_every_shape_and_choice_is_timed_once_with_its_references(times, space):
    shapes = {(*layer.shape, layer.rows * 6) for layer in space.layers}
    assert {layer.key[:3] for layer in times.layers} == shapes
    names = [layer.choice for layer in times.layers if layer.channels == 32 and layer.width == 32]
    assert names == ["w16 a16", "w4 g8 a8 g8", "w4 g16 a8 g16", "w4 g0 a8 g0"]
    wide = [layer.choice for layer in times.layers if layer.channels == 128]
    assert wide[-2:] == ["w4 g0 a8 g0"] or "w4 g0 a8 g0" in wide
    assert times.inputs == 6
    assert all(layer.call_ms == CALL_MS for layer in times.layers)
    assert times.layers[1].implementation == "xla_cpu" or jax.default_backend() != "cpu"
    assert times.layers[0].implementation is None


def test_costs_and_remainder_are_what_the_timer_said(times, space):
    layer = space.layers[0]
    assert times(layer, layer.choices[0]) == pytest.approx(2.0)
    assert times(layer, layer.choices[1]) == pytest.approx(1.5)
    assert times.remainder(space) == pytest.approx(100 - len(space.layers) * (FULL_MS - CALL_MS))


def test_what_is_timed_holds_what_a_method_makes(checkpoint):
    """A layer is timed with leaves of the types, shapes and dtypes that `best` places beside it."""
    settings = {"transforms": ("smooth+shift+hadamard", "smooth+shift+pca"), "ranks": (2,)}
    settings["formats"] = ("int", "nf4")
    space = search_space(checkpoint.params, layers=".*fc.", group_sizes=(16,), **settings)
    x = jax.random.normal(jax.random.key(3), (4, *checkpoint.model.sample_shape()))
    labels = np.zeros(4, np.int32)
    items = Items(np.asarray(x), np.full(4, 500.0, np.float32), labels, np.arange(4))
    best = dataclasses.replace(method_named("best"), apply=method_named("rtn").apply)
    recipe = recipe_of(space, [0, 3])
    made = qdit.quantize(checkpoint, best, recipe, data=CalibrationData(items=items)).params
    for layer, choice in zip(space.layers, (0, 3), strict=True):
        spec = run_time_spec(layer, layer.choices[choice])
        k, n = layer.shape
        rng = np.random.default_rng(0)
        timed = layer_params(np.ones((k, n), np.float32), np.ones(n, np.float32), spec, rng)
        own = functools.reduce(operator.getitem, layer.path.split("/"), made)
        assert jax.tree.map(abstract, timed) == jax.tree.map(abstract, own), spec
    assert sorted(own) == ["act_quant", "bias", "input_map", "kernel", "low_rank", "rotation"]


def abstract(array):
    return array.shape, str(array.dtype)


def test_every_coordinate_is_timed_but_those_that_folds_take(checkpoint):
    settings = {"group_sizes": (16,), "transforms": ("none", "smooth+hadamard"), "ranks": (2,)}
    space = search_space(checkpoint.params, layers=".*fc.", **settings)
    found = choices_by_shape(space, 6)
    references = ["w4 g0 a8 g16", "w4 g0 a8 g0"]  # which have no transform and no branch
    for layer in space.layers:
        part = "hadamard" if layer.folded else "smooth+hadamard"
        choices = ["w4 g16 a8 g16 rank=2", f"w4 g16 a8 g16 transform={part} rank=2"]
        assert [*found[*layer.shape, 6]] == ["w16 a16", *choices, *references]
    assert {layer.folded for layer in space.layers} == {True, False}
    shape, chosen = next(iter(found.items()))
    times = times_of(shape, chosen, "integer", 2, 0, FakeTimer())["layers"]
    assert [one["choice"] for one in times] == [*chosen]


def test_zero_points_and_formats_of_inputs_are_timed(checkpoint):
    settings = {"formats": ("int", "fp8_e4m3"), "act_formats": ("int", "fp8_e4m3")}
    settings["layers"] = ".*attn/proj"
    settings |= {"weight_bits": 8, "weight_symmetric": (False, True), "act_scales": "token"}
    rows = rows_per_sample(checkpoint.model)
    space = search_space(checkpoint.params, rows=rows, group_sizes=(16,), **settings)
    options = {"batch": 3, "numerics": "integer", "num_rounds": 2}
    found = layer_table(checkpoint, space, **options, time_fn=FakeTimer())
    names = [time.choice for time in found.layers if time.key[:2] == (32, 32)]
    token, fp8 = "g0 symmetric=True", "w-fp8_e4m3 g16 symmetric=True"
    assert names[1:5] == [
        *(f"w8 g16 a8 {token}", f"w8 g16 symmetric=True a8 {token}"),
        *(f"{fp8} a8 {token}", f"{fp8} a-fp8_e4m3 {token}"),
    ]
    found.check(space)
    settings |= {"act_scales": "group", "weight_symmetric": True}
    other = search_space(checkpoint.params, rows=rows, group_sizes=(16,), **settings)
    with pytest.raises(qdit.UserError, match="--weight-symmetric yes --act-formats int fp8_e4m3"):
        found.check(other)


def test_a_stopped_table_goes_on(checkpoint, space, tmp_path):
    class StoppedError(Exception):
        pass

    first = FakeTimer()

    def stopping(calls, num_rounds):
        if len(first.names) > 8:
            raise StoppedError
        return first(calls, num_rounds)

    options = {"batch": 3, "num_rounds": 2, "state": tmp_path}
    with pytest.raises(StoppedError):
        layer_table(checkpoint, space, time_fn=stopping, **options)
    second = FakeTimer()
    layer_table(checkpoint, space, time_fn=second, **options)
    assert not set(first.names) & set(second.names)
    third = FakeTimer()
    layer_table(checkpoint, space, time_fn=third, **options)
    assert third.names == []


def test_a_search_at_the_speed_of_coarser_groups(checkpoint, times):
    found = search(
        checkpoint,
        jax.random.key(0),
        objective="predicted",
        budget=Priced("latency=1.0x-g16", {"latency": times}),
        space={"group_sizes": (8, 16)},
        rollouts=Rollouts(num_steps=2, batch_size=2, num_calibration=1),
    )
    assert set(found.assignment.tolist()) == {1}
    assert found.history["cost"] == pytest.approx(4 * 1.5)
    assert found.history["latency"]["remainder_ms"] == times.remainder(found.space)


def test_what_cannot_be_timed_is_refused_before_anything_runs(checkpoint, space):
    rows = rows_per_sample(checkpoint.model)
    weights_only = search_space(checkpoint.params, rows=rows, group_sizes=(8,), act_bits=16)
    timer = FakeTimer()
    with pytest.raises(qdit.UserError, match=r"w4 g8 a16 with numerics='integer'"):
        layer_table(checkpoint, weights_only, numerics="integer", time_fn=timer)
    assert timer.names == []
    recipe = qdit.Recipe.preset("w4a8", group_size=16)
    params = qdit.quantize_params(checkpoint.params, recipe=recipe)
    with pytest.raises(qdit.UserError, match="quantized already"):
        layer_table(qdit.Checkpoint(checkpoint.model, params, recipe), space)
