"""`bench` on a tiny network: rows, ratios, errors, resuming, and what counting predicts."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_models import tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.checkpoint import num_bytes
from qdit_jax.models import FAMILIES, build_model, family_named, rows_per_sample
from qdit_jax.speed import (
    DEVICES,
    RECIPES,
    Device,
    Taken,
    abstract_checkpoint,
    bench,
    devices_named,
    predicted,
    recipe_named,
)
from qdit_jax.speed.contenders import Way, contenders_of
from qdit_jax.speed.peak import peak_share
from qdit_jax.speed.predicted import Counted
from qdit_jax.speed.roofline import layer_work
from qdit_jax.speed.rows import marked
from qdit_jax.speed.steps import jobs_of

SECONDS = {"float32": 2.0, "bfloat16": 4.0, "w4a8-g16": 1.0, "w8a8-g16": 3.0}
FAST = {"batches": (2,), "numerics": ("simulated",), "implementations": ("xla",)}


class FakeTimer:
    """Runs every call once and returns times by name, drifting from round to round."""

    def __init__(self):
        self.timed = []

    def __call__(self, calls, num_rounds):
        for call in calls:
            call.run()
        self.timed.append(calls[1].name)
        drift = np.linspace(1, 2, num_rounds)
        return np.array([SECONDS[call.name.partition(",")[0]] * drift for call in calls])


@pytest.fixture(scope="module")
def checkpoint():
    return tiny_checkpoint(in_channels=1)


@pytest.fixture(scope="module")
def found(checkpoint):
    recipes = ["w4a8-g16", "w8a8-g16"]
    return bench(checkpoint, recipes, num_rounds=5, time_fn=FakeTimer(), **FAST)


def test_ratios_are_of_rounds_side_by_side(found):
    assert [row.title for row in found.rows] == list(SECONDS)
    for row in found.rows:
        assert row.ratio.median == row.ratio.low == row.ratio.high == SECONDS[row.title] / 2
        assert row.milliseconds.median == 1500 * SECONDS[row.title]
    assert found.baseline == "float32"


def test_rows_say_bytes_error_and_who_computes(found, checkpoint):
    full, narrow, four, eight = found.rows
    assert narrow.weight_bytes < 0.75 * full.weight_bytes  # kernels in 16 bits
    assert 30 < narrow.db < 80
    assert full.weight_bytes == num_bytes(checkpoint)
    assert four.weight_bytes < eight.weight_bytes < full.weight_bytes
    assert full.db is None
    assert four.db < eight.db
    assert eight.relative_error == pytest.approx(10 ** (-eight.db / 20))
    assert (full.implementations, four.implementations) == ({}, {"xla": 4})
    json.dumps(found.to_json())


def test_rows_that_take_longer_than_bfloat16_are_marked(found):
    _, narrow, four, _ = found.rows
    assert [row.is_slow for row in found.rows] == [None, None, False, False]
    for ratio, is_slow in ((2.39, False), (2.41, True)):  # bfloat16 takes twice as long as float32
        row = dataclasses.replace(four, ratio=Taken(ratio, ratio, ratio, 5))
        assert marked([narrow, row])[1].is_slow is is_slow
        assert marked([row])[0].is_slow is None
        assert marked([narrow, dataclasses.replace(row, batch=3)])[1].is_slow is None


def test_the_share_of_peak_is_of_each_product_in_its_own_dtype(checkpoint):
    recipes = [recipe_named(name) for name in ("w8a8-fast", "w4a16-g32", "w4a8-g32")]
    full, _, eight, alone, _ = entrants = contenders_of(checkpoint, recipes, dtype="bfloat16")
    counted, h100 = Counted(checkpoint, full.rows), DEVICES["h100"]

    def share(contender, *way):
        return peak_share(counted, contender, Way(*way), 4, h100, ms=2.0)

    operations = sum(part.operations for part in counted.step(full, 4).work(h100))
    assert share(full) == pytest.approx(operations / 989e12 / 2e-3)
    assert share(alone, "simulated") == pytest.approx(share(full))
    assert 0.5 * share(full) < share(eight, "integer") < share(full)
    assert share(eight, "integer", "xla") == share(eight, "integer")
    assert share(entrants[-1], "simulated") is None  # products in float32


def test_a_bench_has_the_share_of_peak_where_the_device_is_known(checkpoint, found, monkeypatch):
    assert all(row.peak_share is None for row in found.rows)
    monkeypatch.setattr("qdit_jax.speed.race.present_device", lambda: DEVICES["v6e"])
    rows = bench(checkpoint, [], num_rounds=2, time_fn=FakeTimer(), **FAST).rows
    assert all(0 < row.peak_share < 1 for row in rows)


def test_default_recipes_are_those_that_can_be_computed(checkpoint):
    entrants = contenders_of(checkpoint, map(recipe_named, RECIPES))
    optional = entrants[2:]
    jobs = list(jobs_of(entrants, (1, 2), ("integer",), (), None, optional))
    titles = [job[0].title for job in jobs]
    assert {"float32", "w8a8-fast-g0", "w4a8-fast-g32", "w4a8-g128"} <= set(titles)
    assert "w4a16-g128" not in titles
    with pytest.raises(qdit.UserError, match="w4a16-g128 cannot be computed this way: integer"):
        list(jobs_of(entrants[-1:], (1, 2), ("integer",), (), None, entrants[-1:]))


def test_counting_predicts_the_bytes_that_are_held(found, checkpoint):
    recipes = [qdit.Recipe.preset(name, group_size=16) for name in ("w4a8", "w8a8")]
    rows = predicted(checkpoint, recipes, (2, 4), 2)
    assert [row.weight_bytes for row in rows[:4]] == [row.weight_bytes for row in found.rows]
    full, _, four, eight = rows[:4]
    assert full.multiply_adds == four.multiply_adds
    assert four.bit_operations < eight.bit_operations < full.bit_operations
    assert rows[4].multiply_adds == 2 * full.multiply_adds


def test_counting_predicts_the_operations_that_are_compiled(checkpoint):
    """XLA's own count of a compiled step has these products, and little beside them."""
    model = checkpoint.model
    step = Counted(checkpoint, rows_per_sample(model)).step(contenders_of(checkpoint, [])[0], 4)
    wide = devices_named(["h100"])[0]
    inputs = model.example_inputs(4)
    compiled = jax.jit(model.apply).lower({"params": checkpoint.params}, *inputs).compile()
    ours = sum(part.operations for part in step.work(wide))
    theirs = compiled.cost_analysis()["flops"]
    assert 0.75 < ours / theirs <= 1.0


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.is_diffusion])
def test_every_family_is_counted(family):
    for fields in family_named(family).examples:
        ckpt = abstract_checkpoint(build_model(family, fields))
        recipes = [recipe_named(name) for name in ("w8a8-fast", "w4a16")]
        devices = devices_named(["h100", "v6e"])
        full, _, eight, narrow = predicted(
            ckpt, recipes, (1,), 1, devices=devices, dtype="bfloat16"
        )
        assert narrow.weight_bytes < eight.weight_bytes < full.weight_bytes
        for device in devices:
            assert 0 < full.milliseconds[device.name] < 1
            assert full.live_bytes[device.name] > 0


def test_a_bound_is_that_of_operations_or_of_bytes():
    device = Device("box", "a box", {"bfloat16": 1e12, "int8": 2e12}, 1e9, 1e9, "rocm")
    narrow = layer_work(1, (1024, 512), None, "bfloat16", 2, "rocm")
    assert narrow.seconds(device) == narrow.moved / 1e9
    assert narrow.moved == 2 * (1024 * 512 + 2 * (1024 + 512))
    wide = layer_work(10**6, (1024, 512), None, "bfloat16", 2, "rocm")
    assert wide.operations == 2 * 10**6 * 1024 * 512


@pytest.mark.parametrize(
    "name", ["w8a8-fast", "w4a8-fast-g16", "w4a8-g16", "lut4", "nvfp4", "w4a16-g16"]
)
def test_a_stored_network_counts_as_its_recipe_does(checkpoint, name):
    recipe = recipe_named(name)
    stored = qdit.quantize(checkpoint, "rtn", recipe)
    devices = devices_named(["h100", "v6e"])
    own = predicted(stored, [], (1,), 1, devices=devices)
    by_recipe = predicted(checkpoint, [recipe], (1,), 1, devices=devices)
    assert own[-1].milliseconds == by_recipe[-1].milliseconds
    assert own[-1].live_bytes == by_recipe[-1].live_bytes


def test_what_a_kernel_keeps_inside_is_not_counted():
    """Rows 64, K 1024, N 512; ROCm has no kernels, those for GPUs quantize no inputs."""

    def moved(recipe, platform, channels=1024):
        spec = recipe_named(recipe).rules[0].spec
        return layer_work(64, (channels, 512), spec, "bfloat16", 2, platform).moved

    copy, codes, sums = 1024 * 512, 64 * 1024, 8 * 4 * 64 * 512
    for recipe, saved in {
        "w4a8-fast": 2 * copy,
        "w4a8": 2 * copy + 2 * sums,
        "w4a16": 2 * 2 * copy,
        "w8a8-fast": 0,
    }.items():
        by_xla = moved(recipe, "rocm")
        assert by_xla - moved(recipe, "cuda") == saved
        quantized = 0 if recipe == "w4a16" else 2 * codes
        assert by_xla - moved(recipe, "tpu") == saved + quantized
    # FP8 by XLA: weights are copied in bfloat16, codes of inputs as float32.
    assert moved("fp8_e4m3", "rocm") - moved("fp8_e4m3", "cuda") == 2 * 2 * copy + 2 * 3 * codes
    # No kernel for GPUs takes 1000 channels, and none for TPUs groups that are no multiples of 32.
    assert moved("w4a8-fast", "cuda", 1000) == moved("w4a8-fast", "rocm", 1000)
    assert moved("w4a8-g48", "tpu") == moved("w4a8-g48", "rocm")
    for platform in ("cuda", "tpu"):
        assert moved("w4a8-g32", platform) < moved("w4a8-g32", "rocm")


def test_a_preset_keeps_its_own_group_size_unless_one_is_given():
    names = [
        recipe_named(text).name for text in ("w4a8", "w4a8-fast", "w4a8-fast-g64", "w8a8-fast")
    ]
    assert names == ["w4a8-g128", "w4a8-fast-g32", "w4a8-fast-g64", "w8a8-fast-g0"]
    assert recipe_named("w4a8", 16).name == "w4a8-g16"


def test_a_stopped_bench_goes_on_and_only_on_its_own(checkpoint, tmp_path):
    class StoppedError(Exception):
        pass

    def stopping(calls, num_rounds):
        if calls[1].name == "w8a8-g16":
            raise StoppedError
        return FakeTimer()(calls, num_rounds)

    recipes = ["w4a8-g16", "w8a8-g16"]
    with pytest.raises(StoppedError):
        bench(checkpoint, recipes, num_rounds=5, state=tmp_path, time_fn=stopping, **FAST)
    timer = FakeTimer()
    bench(checkpoint, recipes, num_rounds=5, state=tmp_path, time_fn=timer, **FAST)
    assert timer.timed == ["w8a8-g16"]
    with pytest.raises(qdit.UserError, match="other settings: num_rounds was 5, now it is 6"):
        bench(checkpoint, recipes, num_rounds=6, state=tmp_path, time_fn=timer, **FAST)
    other = tiny_checkpoint(in_channels=1, depth=2)
    with pytest.raises(qdit.UserError, match="other settings: network was"):
        bench(other, recipes, num_rounds=5, state=tmp_path, time_fn=timer, **FAST)


def test_on_a_cpu_a_network_is_timed_as_it_is_sampled_and_rows_say_their_rounds(checkpoint):
    asked = {"numerics": ("integer",), "num_rounds": 21, "seconds": 1e-9}
    rows = bench(checkpoint, ["w4a8-g16"], **asked).rows
    assert [row.batch for row in rows] == [1] * 3 + [8] * 3
    assert [row.implementations for row in rows[2::3]] == [{"xla_cpu": 4}] * 2
    assert {row.ratio.count for row in rows} == {6}
    both = bench(
        checkpoint, ["w4a8-g16"], batches=(2,), implementations=("xla", "xla_cpu"), **asked
    )
    assert [row.implementations for row in both.rows[2:]] == [{"xla_cpu": 4}, {"xla": 4}]
    with pytest.raises(qdit.UserError, match="seconds=nan"):
        bench(checkpoint, [], seconds=float("nan"))


def test_a_quantized_checkpoint_is_timed_as_it_is(checkpoint):
    recipe = qdit.Recipe.preset("w4a8", group_size=16)
    params = qdit.quantize_params(checkpoint.params, recipe=recipe)
    small = qdit.Checkpoint(checkpoint.model, params, recipe)
    alone = bench(small, num_rounds=3, time_fn=FakeTimer(), **FAST)
    assert [(row.title, row.db) for row in alone.rows] == [("w4a8-g16", None)]
    paired = bench(small, against=checkpoint, num_rounds=3, time_fn=FakeTimer(), **FAST)
    assert [row.ratio.median for row in paired.rows] == [1, 2, 0.5]
    assert paired.rows[2].db > 0
    options = {"against": checkpoint, "expand": True, "num_rounds": 3, "time_fn": FakeTimer()}
    packed, unpacked = bench(small, **options, **FAST).rows[2:]
    assert [packed.title, unpacked.title] == ["w4a8-g16", "w4a8-g16, expanded"]
    assert packed.weight_bytes < unpacked.weight_bytes
    assert packed.relative_error == unpacked.relative_error
    with pytest.raises(
        qdit.UserError, match=r"quantized already \(w4a8-g16\) and is benched as it"
    ):
        bench(small, ["w8a8"], **FAST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": (0,)}, "batches=0"),
        ({"expand": True, "recipes": None}, "only the weights of a quantized checkpoint"),
        ({"num_rounds": 1}, "num_rounds=1"),
        ({"seconds": 0.0}, "seconds=0.0 is not supported; use a number above 0"),
        ({"numerics": ("exact",)}, "numerics='exact' is not known"),
        ({"implementations": ("magic",)}, "implementation='magic' is not known"),
        ({"recipes": ["w9a9"]}, "bits=9"),
        ({"recipes": ["fast"]}, "'fast' is not a preset"),
        ({"recipes": ["w4a16"], "numerics": ("integer",)}, "cannot be computed this way: integer"),
    ],
)
def test_errors_name_what_was_given(checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        bench(checkpoint, **{"recipes": ["w4a8"], **options})
