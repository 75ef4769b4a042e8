"""Spaces, recipes of assignments, costs against figures computed by hand, budgets."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from search_models import SIZES, search, small_model, small_space

from qdit_jax.allocation.cost import num_corrections, num_segments
from qdit_jax.models import DiT, rows_per_sample
from qdit_jax.ptq import quantize_params
from qdit_jax.quant import ActSpec, QTensor, WeightSpec
from qdit_jax.quant import nbytes as qtensor_nbytes
from qdit_jax.recipes import LayerSpec, Recipe


@pytest.fixture(scope="module")
def params():
    return small_model()[1]


@pytest.fixture(scope="module")
def xl2():
    """Returns the paper's space over DiT-XL/2, from shapes alone."""
    model = DiT()
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    return search.search_space(shapes, rows=rows_per_sample(model))


def test_the_papers_space_has_112_layers_of_five_choices(xl2):
    assert len(xl2.layers) == 112
    assert xl2.size == 5**112
    assert [layer.shape for layer in xl2.layers[:4]] == [
        (1152, 1152),
        (1152, 3456),
        (1152, 4608),
        (4608, 1152),
    ]


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 4),
        ({"sides": "weights"}, 4),
        ({"sides": "separate"}, 16),
        ({"weight_bits": (3, 4)}, 8),
        ({"weight_bits": (3, 4), "act_bits": (4, 8), "sides": "separate"}, 64),
        ({"weight_bits": 16}, 4),
        ({"weight_bits": (4, 16), "act_bits": (8, 16), "sides": "weights"}, 10),
    ],
)
def test_the_choices_of_a_layer_are_sizes_times_bits(params, settings, count):
    space = small_space(params, **settings)
    assert set(space.num_choices.tolist()) == {count}


def test_pinned_layers_have_one_choice_and_excluded_ones_are_absent(params):
    kept = LayerSpec(WeightSpec(8, 0), None)
    space = small_space(
        params,
        layers=".*",
        pinned={".*/qkv": 32, "final_layer/linear": kept},
        excluded=["x_embedder/.*", "t_embedder/.*"],
    )
    by_path = {layer.path: layer for layer in space.layers}
    assert by_path["final_layer/linear"].choices == (kept,)
    assert by_path["blocks_0/attn/qkv"].choices[0].weight.group_size == 32
    assert not any("embedder" in path for path in by_path)
    assert len(by_path["blocks_0/adaLN_modulation"].choices) == len(SIZES)


@pytest.mark.parametrize("setting", ["layers", "pinned", "excluded"])
def test_a_pattern_that_matches_nothing_is_an_error(params, setting):
    value = {"layers": "blocks_9", "pinned": {"blocks_9": 32}, "excluded": ["blocks_9"]}[setting]
    with pytest.raises(ValueError, match="'blocks_9' matches no layer"):
        small_space(params, **{setting: value})


@pytest.mark.parametrize("bad", [[0, 0], [0, 0, 0, 4], [0.0] * 4, [-1, 0, 0, 0]])
def test_assignments_that_do_not_fit_are_errors(params, bad):
    with pytest.raises(ValueError, match="assignment"):
        small_space(params).check(bad)


def test_recipes_of_assignments_say_what_was_chosen_and_survive_json(params):
    space = small_space(params, pinned={".*/fc1": 64})
    assignment = np.array([0, 3, 0, 2], np.int32)
    recipe = Recipe.from_json(search.recipe_of(space, assignment).to_json())
    assert recipe.resolve(params) == search.specs_of(space, assignment)
    assert recipe.get("blocks_0/attn/proj").weight.group_size == 8
    assert recipe.get("blocks_0/mlp/fc2").act.group_size == 32


def test_uniform_assignments_exist_for_shared_sizes_only(params):
    space = small_space(params, pinned={".*/fc1": 24})
    assert search.uniform_sizes(space) == list(SIZES)
    assert search.uniform_assignment(space, 16).tolist() == [1, 1, 0, 1]
    with pytest.raises(ValueError, match="no choice of group size 24"):
        search.uniform_assignment(space, 24)


def test_bit_operations_of_xl2_are_the_figures_computed_by_hand(xl2):
    # Multiply-adds of a block, 256 tokens: 256 * (1152*3456 + 1152*1152 + 2 * 1152*4608).
    macs = 28 * 256 * 15_925_248
    assert macs == 114_152_177_664
    # Inputs of a block: 3 * 1152 + 4608 channels, 1152/g * 3 + 4608/g groups.
    for size, groups_of_all in ((32, 252), (128, 63), (288, 28)):
        products = macs * 32  # 4 by 8 bits
        accumulation = macs // size * 1024 * 3
        inputs = 28 * 256 * (8064 * (96 + 1024) + groups_of_all * 2048)
        uniform = search.uniform_assignment(xl2, size)
        table = search.cost_table(xl2, search.BitOps())
        assert search.total_cost(table, uniform) == products + accumulation + inputs
    assert (products, 28 * 256 * 63 * 2048) == (3_652_869_685_248, 924_844_032)


def test_bytes_of_xl2_are_the_figures_computed_by_hand(xl2):
    # 445,906,944 weights at 4 bits; a float32 scale and a 4-bit zero point a group of 128.
    weights, scales = 28 * 15_925_248, 28 * 15_925_248 // 128
    table = search.cost_table(xl2, search.Bytes())
    odd_rows = 28 * (3456 + 1152 + 4608) // 2  # 9 zero points a column take 5 bytes, not 4.5
    expected = weights // 2 + scales * 4 + scales // 2 + odd_rows
    assert search.total_cost(table, search.uniform_assignment(xl2, 128)) == expected


def test_bytes_are_those_of_the_quantized_tree(params):
    space = small_space(params)
    assignment = np.array([0, 1, 2, 3], np.int32)
    quantized = quantize_params(params, recipe=search.recipe_of(space, assignment))
    leaves = jax.tree.leaves(quantized, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    held = sum(qtensor_nbytes(leaf) for leaf in leaves if isinstance(leaf, QTensor))
    assert search.total_cost(search.cost_table(space, search.Bytes()), assignment) == held


def test_mean_group_of_the_release_is_a_mean_over_the_layers(xl2):
    budget = search.parse_budget("mean-group=128", xl2, search.named_costs())
    sizes = np.array(search.GROUP_SIZES)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 5, (200, 112))
    assert (budget.allows(drawn) == (sizes[drawn].mean(axis=1) >= 128)).all()


def test_hardware_profiles_charge_what_their_unit_wastes():
    layer = search.SearchLayer("blocks_0/mlp/fc1", (1152, 10), ())

    def spec(size, bits=8):
        return LayerSpec(WeightSpec(bits, size), ActSpec(bits, size))

    for cost_fn in (search.gpu_cost(), search.tpu_cost(), search.CpuCost(), search.BitOps()):
        costs = [cost_fn(layer, spec(size)) for size in (32, 64, 128, 192, 288)]
        assert costs == sorted(costs, reverse=True)
    bare = search.HardwareCost(depth8=128, depth4=128, rate4=1.0, rescale=0.0)
    assert bare(layer, spec(32)) == 4 * bare(layer, spec(128)) == 4 * 1152 * 10
    gpu = search.HardwareCost(depth8=32, depth4=64, rate4=2.0, rescale=0.0)
    assert gpu(layer, spec(32)) == gpu(layer, spec(128)) == 1152 * 10
    assert gpu(layer, spec(32, 4)) == 1152 * 10  # 64 deep: half of it zeros, at twice the rate
    assert gpu(layer, spec(128, 4)) == 1152 * 10 / 2


def test_segments_are_the_common_refinement_of_both_sides():
    layer = search.SearchLayer("x", (100, 7), ())
    assert num_segments(layer, LayerSpec(WeightSpec(4, 32), ActSpec(8, 48))) == 5
    assert num_segments(layer, LayerSpec(WeightSpec(4, 0), None)) == 1
    pairs = [(True, True, 1), (True, False, 2), (False, False, 3)]
    for weight, act, expected in pairs:
        spec = LayerSpec(WeightSpec(4, 32, weight), ActSpec(8, 32, act))
        assert num_corrections(spec) == expected


def test_relative_budgets_admit_their_uniform_assignment_and_nothing_dearer(params):
    space = small_space(params)
    costs = search.named_costs()
    for name in ("bitops", "bytes", "gpu", "tpu", "cpu", "bitops16"):
        budget = search.parse_budget(f"{name}=1.0x-g32", space, costs)
        assert budget.allows(search.uniform_assignment(space, 32))
        assert not budget.allows(search.uniform_assignment(space, 8))
    between = [search.parse_budget(f"bytes=1.0x-g{g}", space, costs).limit for g in (32, 24, 16)]
    assert between == sorted(between)
    wider = small_space(params, weight_bits=(3, 4))
    low, high = (search.parse_budget(f"bytes=1.0x-w{b}a8-g32", wider, costs).limit for b in (3, 4))
    assert low < high
    assert search.parse_budget("bytes=1.5M", space, costs).limit == 1.5e6


def test_a_budget_that_leaves_no_choice_says_so(params):
    space = small_space(params)
    for name in ("bitops", "bytes"):
        least = search.parse_budget(f"{name}=1.0x-g64", space, search.named_costs())
        assert least.leaves_no_choice
        steps = [np.diff(np.sort(row)[:2])[0] for row in least.table]
        one_more = f"{name}={float(least.least + min(steps))!r}"
        assert not search.parse_budget(one_more, space, search.named_costs()).leaves_no_choice


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed=1", "the cost 'speed' is not known"),
        ("bytes=1", "is impossible: the limit is 1 and the cheapest assignment costs"),
        ("mean-group=9000", "is impossible"),
        ("bytes=cheap", "cannot be read"),
        ("bytes", "cannot be read"),
    ],
)
def test_budgets_that_cannot_be_met_or_read_are_errors(params, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        search.parse_budget(text, small_space(params), search.named_costs())


def test_a_users_own_cost_is_any_function_of_layer_and_spec(params):
    space = small_space(params)
    budget = search.parse_budget(
        "groups=10", space, {"groups": lambda layer, spec: layer.shape[0] / spec.weight.group_size}
    )
    assert budget.cost(search.uniform_assignment(space, 64)) == 3 + 4
    with pytest.raises(ValueError, match="the cost function returned"):
        search.cost_table(space, lambda layer, spec: np.nan)
