"""Number formats of the inputs and zero points of the weights as choices: what is offered, what it costs."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from search_models import names_of_choices, search, small_model, small_space
from tiny_models import output

import qdit_jax as qdit
from qdit_jax.allocation.choices import multiplies
from qdit_jax.allocation.cost import unit_bits
from qdit_jax.checkpoint import fingerprint
from qdit_jax.ptq import quantize_params
from qdit_jax.quant import ActSpec, WeightSpec, formats
from qdit_jax.recipes import LayerSpec

FP8 = formats.fp8_e4m3
# All the products of w8a8-fast and fp8_e4m3, with zero points and without.
EIGHT = {
    "weight_bits": 8,
    "group_sizes": (0,),
    "weight_symmetric": (False, True),
    "formats": ("int", "fp8_e4m3"),
    "act_formats": ("int", "fp8_e4m3"),
    "act_scales": "token",
}


@pytest.fixture(scope="module")
def params():
    return small_model()[1]


def test_fp8_inputs_stand_beside_fp8_weights_alone(params):
    assert names_of_choices(params, **EIGHT) == [
        *("w8 g0 a8 token", "w8 g0 symmetric a8 token"),
        *("fp8_e4m3 g0 a8 token", "fp8_e4m3 g0 a-fp8_e4m3 token"),
    ]
    found = {spec.plain for spec in small_space(params, **EIGHT).layers[0].choices}
    for name in ("w8a8-fast", "fp8_e4m3"):
        (rule,) = qdit.Recipe.preset(name, scale_dtype="float32").rules
        assert rule.spec in found
    both = {"formats": ("fp8_e4m3", "fp8_e5m2"), "act_formats": ("fp8_e5m2", "mxfp8")}
    with pytest.raises(ValueError, match="act_formats='mxfp8' is in no choice"):
        names_of_choices(params, **both)
    found = names_of_choices(params, **both | {"act_formats": "fp8_e5m2"}, group_sizes=(16, 0))
    assert found == [
        *("fp8_e4m3 g16 a-fp8_e5m2 g16", "fp8_e4m3 g0 a-fp8_e5m2 token"),
        *("fp8_e5m2 g16 a-fp8_e5m2 g16", "fp8_e5m2 g0 a-fp8_e5m2 token"),
    ]


def test_inputs_go_with_weights_that_hardware_multiplies():
    known = [fmt for fmt in formats.FORMATS.values() if not fmt.has_codebook]
    pairs = {
        (weight.name, act.name)
        for weight, act in itertools.product(known, known)
        if multiplies(LayerSpec(WeightSpec(fmt=weight), ActSpec(fmt=act)))
    }
    fp8 = ("fp8_e4m3", "fp8_e5m2")
    assert pairs == {(fmt.name, fmt.name) for fmt in known} | set(itertools.product(fp8, fp8))
    for act in known:
        assert not multiplies(LayerSpec(WeightSpec(8), ActSpec(fmt=act)))
        assert multiplies(LayerSpec(None, ActSpec(fmt=act)))
        assert multiplies(LayerSpec(WeightSpec(fmt=act), ActSpec(8)))


def test_16_bits_go_with_all(params):
    settings = {**EIGHT, "weight_bits": (8, 16), "act_bits": (8, 16), "weight_symmetric": True}
    assert names_of_choices(params, **settings) == [
        *("w8 g0 symmetric a8 token", "w8 g0 symmetric a16"),
        *("fp8_e4m3 g0 a8 token", "fp8_e4m3 g0 a-fp8_e4m3 token", "fp8_e4m3 g0 a16"),
        *("w16 a8 token", "w16 a-fp8_e4m3 token", "w16 a16"),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"act_formats": "fp8_e4m3"}, "act_formats='fp8_e4m3' .* of fp8_e4m3 or fp8_e5m2; offer"),
        ({"act_formats": ("int", "nvfp4"), "formats": "mxfp4"}, "multiplied by weights of nvfp4;"),
        (
            {"act_formats": "fp8_e4m3", "formats": ("int", "fp8_e4m3")},
            "formats='int' is in no choice: .* inputs of fp8_e4m3; offer 'int' in act_formats too",
        ),
        (
            {"act_formats": "fp8_e4m3", "formats": "int", "weight_bits": (8, 16)},
            "formats='int' is in no choice",
        ),
        ({"act_formats": ("int", "fp8_e4m3"), "act_bits": 16}, "act_bits=16 leaves the inputs"),
        ({"act_formats": "fp8"}, "unknown format 'fp8'"),
        ({"act_formats": "lut4", "formats": "lut4"}, "learns a table per kernel"),
        ({"act_formats": ()}, "act_formats=\\(\\) must be one or more"),
        ({"weight_symmetric": (True, True)}, "must be True, False or both"),
        ({"weight_symmetric": ()}, "must be True, False or both"),
    ],
)
def test_what_would_be_left_out_is_refused(params, settings, message):
    with pytest.raises(ValueError, match=message):
        small_space(params, **settings)


def test_the_default_space_is_as_before(params):
    plain = small_space(params)
    assert plain == small_space(params, act_formats="int", weight_symmetric=False)
    assert all(not spec.weight.symmetric for spec in plain.layers[0].choices)
    both = small_space(params, symmetric=True)
    assert all(spec.weight.symmetric and spec.act.symmetric for spec in both.layers[0].choices)
    assert both == small_space(params, symmetric=True, weight_symmetric=True)
    fp8 = {"formats": "fp8_e4m3", "act_formats": "fp8_e4m3"}
    spaces = [small_space(params, **fp8 | {"act_formats": one}) for one in ("int", FP8.name)]
    spaces += [plain, small_space(params, weight_symmetric=True)]
    assert len({fingerprint(space=space)["space"] for space in spaces}) == len(spaces)
    weights = small_space(params, weight_symmetric=True, group_sizes=(16,)).layers[0].choices
    assert weights == (LayerSpec(WeightSpec(4, 16, True), ActSpec(8, 16)),)


def test_zero_points_are_a_choice_at_all_bits_and_levels(params):
    settings = {"weight_symmetric": (False, True), "scale_levels": (1, 2), "group_sizes": (16,)}
    assert names_of_choices(params, **settings, weight_bits=(4, 8)) == [
        *("w4a8 g16", "w4a8 g16 symmetric", "w4a8 g16 two-level", "w4a8 g16 symmetric two-level"),
        *("w8a8 g16", "w8a8 g16 symmetric"),
    ]
    space = small_space(params, **settings)
    uniform = search.specs_of(space, search.uniform_assignment(space, 16)).values()
    assert {search.describe(spec) for spec in uniform} == {"w4a8 g16"}


@pytest.mark.parametrize("sides", ["both", "weights", "separate"])
def test_uniform_sizes_are_those_of_the_first_format(params, sides):
    settings = {**EIGHT, "group_sizes": (16, 32), "act_scales": ("group", "token")}
    space = small_space(params, **settings, sides=sides)
    assert search.uniform_sizes(space) == [16, 32]
    for size in (16, 32):
        uniform = search.uniform_assignment(space, size)
        (name,) = {search.describe(spec) for spec in search.specs_of(space, uniform).values()}
        assert name == (f"w8 g{size} a8 g128" if sides == "weights" else f"w8a8 g{size}")
        assert search.Within(f"0dB-of-g{size}").reference(space).tolist() == uniform.tolist()


def test_costs_by_hand():
    layer = search.SearchLayer("x", (64, 100), (), rows=10)
    products, quantizing = 10 * 64 * 100 * 8 * 8, 10 * 64 * 1120
    fp8 = LayerSpec(WeightSpec(8, 16, fmt=FP8), ActSpec(8, 0, fmt=FP8))
    # 4 sums of 16 channels without zero points; inputs have one scale per token.
    assert search.BitOps()(layer, fp8) == products + quantizing + 10 * (100 * 4 * 1024 + 2048)
    assert search.Bytes()(layer, fp8) == 64 * 100 + 4 * 100 * 4
    # A zero point of a group is a term of its sum, and 8 bits.
    affine, symmetric = (
        LayerSpec(WeightSpec(8, 16, s), ActSpec(8, 0, True)) for s in (False, True)
    )
    bitops = [search.BitOps()(layer, spec) for spec in (affine, symmetric)]
    assert bitops == [bitops[1] + 10 * 100 * 4 * 1024, search.BitOps()(layer, fp8)]
    nbytes = [search.Bytes()(layer, spec) for spec in (affine, symmetric)]
    assert nbytes == [nbytes[1] + 4 * 100, search.Bytes()(layer, fp8)]
    # FP8 is multiplied by FP8 at the rate of 8 bits, and beside integers as a float of 16.
    mixed = LayerSpec(WeightSpec(8, 16, fmt=FP8), ActSpec(8, 0, True))
    assert [unit_bits(spec) for spec in (fp8, symmetric, mixed)] == [8, 8, 16]
    assert unit_bits(LayerSpec(WeightSpec(fmt=formats.nvfp4), ActSpec(8, 16))) == 8
    gpu = search.gpu_cost()
    assert gpu(layer, fp8) == gpu(layer, symmetric) == gpu(layer, mixed) - 10 * 100 * 4 * 32


def test_bytes_are_those_of_the_quantized_tree(params):
    settings = {**EIGHT, "group_sizes": (16, 0), "act_scales": ("group", "token")}
    settings |= {"scale_levels": (1, 2), "weight_bits": (4, 8), "layers": ".*fc2"}
    space = small_space(params, **settings)
    costs = search.cost_table(space, search.Bytes())
    assert len({spec.weight for spec in space.layers[0].choices}) == 14
    for choice in range(len(space.layers[0].choices)):
        assignment = np.full(len(space.layers), choice)
        made = quantize_params(params, recipe=search.recipe_of(space, assignment))
        for layer, row in zip(space.layers, costs, strict=True):
            kernel = made
            for name in layer.path.split("/"):
                kernel = kernel[name]
            held = sum(leaf.nbytes for leaf in jax.tree.leaves(kernel["kernel"]))
            assert held == row[choice], layer.choices[choice]


def test_the_recipe_of_a_search_is_what_it_measured():
    model, params = small_model()
    found = qdit.search(
        qdit.Checkpoint(model, params),
        jax.random.key(0),
        objective="predicted",
        budget="bytes=0.995x-g0",  # fewer zero points than weights of 8 bits have
        space={**EIGHT, "layers": ".*fc."},
        rollouts=search.Rollouts(num_steps=1, num_batches=1, batch_size=1, num_calibration=1),
    )
    chosen = search.specs_of(found.space, found.assignment)
    assert any(spec.weight.symmetric for spec in chosen.values())
    recipe = qdit.Recipe.from_json(found.recipe.to_json())
    assert recipe.resolve(params) == chosen
    static = quantize_params(params, recipe=recipe)
    traced = jax.jit(lambda numbers: search.assigned_params(params, found.space, numbers))
    x = jax.random.normal(jax.random.key(1), (2, *model.sample_shape()))
    args = x, np.full(2, 400.0, np.float32), np.zeros(2, np.int32)
    expected = output(model, static, *args)
    same = output(model, traced(found.assignment), *args)
    assert np.abs(same - expected).max() <= 0.02 * np.abs(expected).max()
