"""Levels of the weights' scales and scales of the inputs as choices: what is offered, what it costs."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from search_models import names_of_choices, search, small_model, small_space

import qdit_jax as qdit
from qdit_jax.allocation import Latency, LayerTime
from qdit_jax.allocation.latency import this_device, timed_name
from qdit_jax.quant import ActSpec, WeightSpec
from qdit_jax.recipes import LayerSpec

BOTH = {"scale_levels": (1, 2), "act_scales": ("group", "token"), "group_sizes": (16, 32)}
FAST = LayerSpec(WeightSpec(4, 32, scale_levels=2), ActSpec(8, 0, symmetric=True))


@pytest.fixture(scope="module")
def params():
    return small_model()[1]


def test_the_choices_are_the_product_with_both(params):
    assert names_of_choices(params, **BOTH) == [
        *("w4a8 g16", "w4a8 g32", "w4 g16 a8 token", "w4 g32 a8 token"),
        *("w4a8 g16 two-level", "w4a8 g32 two-level"),
        *("w4 g16 two-level a8 token", "w4 g32 two-level a8 token"),
    ]
    (preset,) = qdit.Recipe.preset("w4a8-fast").rules
    # A preset's scales have 16 bits, which two levels do not use.
    weight = dataclasses.replace(preset.spec.weight, scale_dtype="float32")
    fast = dataclasses.replace(preset.spec, weight=weight)
    assert fast == FAST
    assert FAST in small_space(params, **BOTH).layers[0].choices
    plain = small_space(params)
    assert plain == small_space(params, scale_levels=1, act_scales="group")
    assert {spec.weight.scale_levels for spec in plain.layers[0].choices} == {1}


def test_formats_and_more_than_6_bits_have_one_level(params):
    settings = {**BOTH, "group_sizes": (32,), "act_scales": "token"}
    found = names_of_choices(params, **settings, weight_bits=(4, 8), formats=("int", "nf4"))
    assert found == [
        *("w4 g32 a8 token", "w4 g32 two-level a8 token", "nf4 g32 a8 token", "w8 g32 a8 token"),
    ]
    found = names_of_choices(params, **settings, weight_bits=(4, 16), act_bits=(8, 16))
    assert found == [
        *("w4 g32 a8 token", "w4 g32 a16", "w4 g32 two-level a8 token", "w4 g32 two-level a16"),
        *("w16 a8 token", "w16 a16"),
    ]
    with pytest.raises(ValueError, match="scale_levels=2 with bits=8 is not supported"):
        names_of_choices(params, scale_levels=2, weight_bits=8)
    with pytest.raises(ValueError, match="act_scales='tensor' is not known; use 'group' or 'tok"):
        names_of_choices(params, act_scales="tensor")


@pytest.mark.parametrize("sides", ["both", "weights", "separate"])
def test_uniform_sizes_are_those_of_the_first_levels_and_scales(params, sides):
    space = small_space(params, **BOTH, sides=sides)
    assert search.uniform_sizes(space) == [16, 32]
    act = "" if sides == "weights" else None
    for size in (16, 32):
        uniform = search.uniform_assignment(space, size)
        (name,) = {search.describe(spec) for spec in search.specs_of(space, uniform).values()}
        assert name == (f"w4a8 g{size}" if act is None else f"w4 g{size} a8 g128")
        reference = search.Within(f"0dB-of-g{size}").reference(space)
        assert reference.tolist() == uniform.tolist()
    wide = search.reference_spec(space.layers[0], 64, None)
    assert search.describe(wide) == ("w4a8 g64" if act is None else "w4 g64 a8 g128")


def test_the_first_scale_of_inputs_stays_in_references_and_pins(params):
    settings = {**BOTH, "act_scales": ("token", "group")}
    space = small_space(params, **settings, pinned={".*fc2": 8})
    assert search.uniform_sizes(space) == [16, 32]
    token = "w4 g{} a8 token".format
    chosen = search.specs_of(space, search.uniform_assignment(space, 32))
    assert [search.describe(spec) for spec in chosen.values()] == [token(32)] * 3 + [token(8)]
    assert search.describe(search.reference_spec(space.layers[0], 64, None)) == token(64)


def test_costs_by_hand():
    layer = search.SearchLayer("x", (64, 100), (), rows=10)
    # One int8 dot of all 64 channels, and one scale per sum; inputs have one scale per token.
    products, sums, inputs = 10 * 64 * 100 * 8 * 8, 10 * 100 * 1024, 10 * (64 * 1120 + 2048)
    assert search.BitOps()(layer, FAST) == products + sums + inputs
    assert search.Bytes()(layer, FAST) == 64 * 100 // 2 + 2 * 100 * 2 + 100 * 4
    # A unit of depth 128 is half full; a sum outside of it takes 60, as does an input.
    assert search.tpu_cost()(layer, FAST) == 10 * (100 * 128 + 100 * 60 + 64 * 60)
    # Groups of the inputs cut the dot, whatever the weights' scales are: 2 sums with zero points.
    grouped = dataclasses.replace(FAST, act=ActSpec(8, 32))
    more = 10 * (100 * (2 * 2 - 1) * 1024 + 2048)
    assert search.BitOps()(layer, grouped) - search.BitOps()(layer, FAST) == more


@pytest.mark.slow
def test_a_search_at_the_speed_of_channels_takes_two_levels_and_token_scales():
    checkpoint = qdit.Checkpoint(*small_model())
    space = small_space(checkpoint.params, **{**BOTH, "group_sizes": (16, 0)}, layers=".*fc.")
    times = measured(space, lambda spec: 1.0 if cuts_nothing(spec) else 3.0)
    exact = checkpoint.params["blocks_0"]["mlp"]

    def lost(params, key):
        """Returns the power that the kernels lose; the rest is time alone."""
        mlp = params["blocks_0"]["mlp"]
        errors = (mlp[name]["kernel"] - exact[name]["kernel"] for name in ("fc1", "fc2"))
        return sum(jax.numpy.square(error).sum() for error in errors)

    found = qdit.search(
        checkpoint,
        jax.random.key(0),
        objective=lost,
        budget=search.Priced("latency=1.0x-w4a8-g0", {"latency": times}),
        space=space,
        strategy=search.Evolve(search.EvolutionSettings(24, 3)),
        rollouts=search.Rollouts(num_steps=2, num_batches=1),
    )
    assert found.history["cost"] == found.history["limit"] == len(space.layers)
    chosen = search.specs_of(space, found.assignment).values()
    # Of all that is as fast, this alone has fine groups.
    assert {search.describe(spec) for spec in chosen} == {"w4 g16 two-level a8 token"}
    recipe = qdit.Recipe.from_json(found.recipe.to_json())
    assert recipe.resolve(checkpoint.params) == search.specs_of(space, found.assignment)
    made = qdit.quantize(checkpoint, method="rtn", recipe=recipe).params
    kernels = [made["blocks_0"]["mlp"][name]["kernel"] for name in ("fc1", "fc2")]
    assert all(kernel.has_levels and kernel.group_size == 16 for kernel in kernels)


def cuts_nothing(spec):
    """Returns whether a product is one dot of all channels."""
    return spec.weight.product_group_size == 0 and spec.act.group_size == 0


def measured(space, ms_fn):
    """Returns a latency table of a space in which every choice takes `ms_fn(spec)`."""
    found = {}
    for layer in space.layers:
        k, n = layer.shape
        for spec in (LayerSpec(), *layer.choices):
            ms = ms_fn(spec) if spec.weight else 9.0
            time = LayerTime(k, n, layer.rows * 2, timed_name(layer, spec), ms, ms, ms, 0.0)
            found[time.key] = time
    made = {"device": f"1 x {this_device()}"}
    return Latency(1, 2, "integer", 100.0, tuple(found.values()), made)
