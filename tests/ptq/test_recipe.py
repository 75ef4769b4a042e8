"""Recipes and the transform: rules, their errors, and what is left alone."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from qdit_jax.calibration import Stats
from qdit_jax.ptq import plan, quantize_params
from qdit_jax.quant import ActSpec, QTensor, WeightSpec, dequantize, formats, nbytes
from qdit_jax.recipes import LayerSpec, Recipe, Rule, layer_paths
from qdit_jax.recipes.recipe import GELU_SHIFT
from qdit_jax.testing import realistic_dit


@pytest.fixture(scope="module")
def params():
    return realistic_dit(0, hidden_size=48, depth=2, num_heads=4, input_size=8)[1]


def test_the_last_matching_rule_decides(params):
    fine, coarse = WeightSpec(4, 16), WeightSpec(4, 0)
    recipe = Recipe(
        (
            Rule(r"blocks_\d+/mlp/fc\d", LayerSpec(coarse)),
            Rule("blocks_1/mlp/fc2", LayerSpec(fine)),
            Rule("blocks_0/mlp/fc1", LayerSpec()),
        )
    )
    assert recipe.get("blocks_0/mlp/fc2") == LayerSpec(coarse)
    assert recipe.get("blocks_1/mlp/fc2") == LayerSpec(fine)
    assert recipe.get("blocks_0/mlp/fc1") is None
    assert recipe.get("blocks_0/mlp/fc22") is None
    assert list(recipe.resolve(params)) == [
        "blocks_0/mlp/fc2",
        "blocks_1/mlp/fc1",
        "blocks_1/mlp/fc2",
    ]


def test_json_round_trip(tmp_path):
    recipe = Recipe(
        (Rule("blocks_0/attn/qkv", LayerSpec(WeightSpec(3, 64, True), ActSpec(8, 32))),), "mine"
    )
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.to_json()))
    assert Recipe.from_json(file) == recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable JSON"),
        ("[]", "holds no JSON object"),
        ('{"rules": 3}', "a list of objects named 'rules'"),
        ('{"format_version": 9, "rules": []}', "format_version=9"),
        ('{"rules": [{"layers": "("}]}', "rule 0: layers='\\(' is not a regular expression"),
        ('{"rules": [{"layers": "x", "wieght": {}}]}', "unknown entry 'wieght'"),
        ('{"rules": [{"layers": "x", "weight": {"bits": 9}}]}', "rule 0: bits=9 is not supported"),
        ('{"rules": [{"layers": "x", "weight": {"group": 9}}]}', "unknown setting 'group'"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    file = tmp_path / "recipe.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        Recipe.from_json(file)


def test_a_rule_that_matches_nothing_is_an_error(params):
    recipe = Recipe((Rule("block_0/mlp/fc1", LayerSpec(WeightSpec())),))
    with pytest.raises(ValueError, match="'block_0/mlp/fc1' matches no layer"):
        quantize_params(params, recipe=recipe)


def test_operands_have_no_weights(params):
    recipe = Recipe((Rule("blocks_0/attn/q", LayerSpec(WeightSpec())),))
    with pytest.raises(ValueError, match="has no weights"):
        recipe.resolve(params)


@pytest.mark.parametrize("name", ["w4", "int4", "w44a8", "w9a8", "w4a1"])
def test_an_unknown_preset_is_named(name, params):
    with pytest.raises(ValueError, match=r"is not a preset|is not supported"):
        Recipe.preset(name, params)


@pytest.mark.parametrize(("name", "weights", "acts"), [("w16a8", 0, 8), ("w4a16", 8, 0)])
def test_16_bits_leave_a_side_as_it_is(name, weights, acts, params):
    quantized = quantize_params(params, recipe=Recipe.preset(name, params, group_size=32))
    is_q = [isinstance(leaf, QTensor) for leaf in leaves(quantized)]
    assert sum(is_q) == weights
    blocks = [quantized[f"blocks_{i}"] for i in range(2)]
    assert (
        sum("act_quant" in b[p][n] for b in blocks for p in ("attn", "mlp") for n in b[p]) == acts
    )


@pytest.mark.parametrize(
    ("name", "weight", "acts"),
    [
        ("w4a8-fast", WeightSpec(4, 32, scale_dtype="float16", scale_levels=2), 8),
        ("w6a6-fast", WeightSpec(6, 32, scale_dtype="float16", scale_levels=2), 6),
        ("w8a8-fast", WeightSpec(8, 0, symmetric=True, scale_dtype="float16"), 8),
    ],
)
def test_a_fast_preset_is_one_dot_over_all_channels(name, weight, acts, params):
    recipe = Recipe.preset(name, params)
    (rule,) = recipe.rules
    assert rule.spec == LayerSpec(weight, ActSpec(acts, 0, symmetric=True))
    assert rule.spec.weight.product_group_size == 0
    assert recipe.name == f"{name}-g{weight.group_size}"
    assert Recipe.from_json(recipe.to_json()) == recipe
    found = quantize_params(params, recipe=recipe)["blocks_0"]["mlp"]["fc1"]["kernel"]
    assert found.has_levels == (weight.bits < 8)


def test_a_fast_preset_takes_settings_that_leave_its_dot_whole(params):
    def spec(name="w4a8-fast", **settings):
        return Recipe.preset(name, params, **settings).rules[0].spec

    assert spec(group_size=64).weight.group_size == 64
    assert spec(act_mode="static").act.mode == "static"
    assert not spec(act_symmetric=False).act.symmetric
    assert spec(weight_format="lut4").weight == WeightSpec(
        fmt=formats.lut4, group_size=32, scale_dtype="float16"
    )
    assert Recipe.preset("w4a8-fast-all", params).rules[0].layers == ".*"
    with pytest.raises(ValueError, match="act_group_size=64 does not go with recipe='w4a8-fast'"):
        spec(act_group_size=64)
    with pytest.raises(ValueError, match=r"group_size=32 does not go .*; use 0, or 'w8a8'"):
        spec("w8a8-fast", group_size=32)
    with pytest.raises(ValueError, match="not for the format 'nf4'"):
        spec(weight_format="nf4")
    with pytest.raises(ValueError, match=r"recipe='w4a16-fast' has no integer dot.*use w4a16"):
        spec("w4a16-fast")


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, QTensor))


def test_only_named_layers_change_and_the_input_stays(params):
    before = jax.tree.map(np.array, params)
    quantized = quantize_params(params, recipe=Recipe.preset("w4a8", params, group_size=32))
    jax.tree.map(np.testing.assert_array_equal, params, before)
    np.testing.assert_array_equal(quantized["pos_embed"], params["pos_embed"])
    kernel = quantized["blocks_0"]["adaLN_modulation"]["kernel"]
    np.testing.assert_array_equal(kernel, params["blocks_0"]["adaLN_modulation"]["kernel"])
    assert isinstance(quantized["blocks_1"]["mlp"]["fc2"]["kernel"], QTensor)


def test_every_kernel_can_be_quantized_patches_included(params):
    paths = layer_paths(params)
    assert {"x_embedder/proj", "t_embedder/mlp_0", "final_layer/linear"} <= set(paths)
    recipe = Recipe(
        (Rule(".*(proj|mlp_.|linear|modulation|qkv|fc.)", LayerSpec(WeightSpec(8, 32))),)
    )
    quantized = quantize_params(params, recipe=recipe)
    q = quantized["x_embedder"]["proj"]["kernel"]
    original = params["x_embedder"]["proj"]["kernel"].reshape(q.shape)
    assert np.abs(dequantize(q) - original).max() <= 0.51 * np.abs(np.asarray(q.scale)).max()
    assert sum(isinstance(leaf, QTensor) for leaf in leaves(quantized)) == len(paths)


def test_the_plan_tells_the_bytes_that_are_held(params):
    recipe = Recipe.preset("w3a8", params, group_size=32)
    quantized = quantize_params(params, recipe=recipe)
    for entry in plan(params, recipe):
        block, part, name = entry.path.split("/")
        assert nbytes(quantized[block][part][name]["kernel"]) == entry.bytes_after


def test_quantizing_twice_is_refused(params):
    recipe = Recipe.preset("w4a8", params, group_size=32)
    quantized = quantize_params(params, recipe=recipe)
    with pytest.raises(ValueError, match="quantized already"):
        quantize_params(quantized, recipe=recipe)


def test_static_activations_need_statistics(params):
    recipe = Recipe.preset("w4a8", params, group_size=0, act_mode="static")
    with pytest.raises(ValueError, match="needs calibration statistics"):
        quantize_params(params, recipe=recipe)


def test_static_scales_cover_the_calibrated_range(params):
    rng = np.random.default_rng(0)
    low, high = -rng.uniform(1, 20, (3, 48)), rng.uniform(1, 20, (3, 48))
    path = "blocks_0/attn/qkv"
    stats = Stats(np.arange(3), {path: low}, {path: high})
    for group_size in (0, 32):
        spec = ActSpec(8, group_size, mode="static")
        recipe = Recipe((Rule(path, LayerSpec(None, spec)),))
        act = quantize_params(params, recipe=recipe, stats=stats)["blocks_0"]["attn"]["qkv"][
            "act_quant"
        ]
        starts = [0] if group_size == 0 else [0, 32]
        span = np.maximum.reduceat(high.max(0), starts) - np.minimum.reduceat(low.min(0), starts)
        np.testing.assert_allclose(act.scale, span / 255, rtol=1e-6)


def test_shifted_gelu_makes_the_inputs_of_fc2_unsigned(params):
    recipe = Recipe.preset("w4a8", params, group_size=32).with_shifted_gelu(params)
    quantized = quantize_params(params, recipe=recipe)
    act = quantized["blocks_1"]["mlp"]["fc2"]["act_quant"]
    assert act.spec == ActSpec(8, 32, True, unsigned=True, shift=GELU_SHIFT)
    assert quantized["blocks_1"]["mlp"]["fc1"]["act_quant"].spec == ActSpec(8, 32)
    lowest = jax.nn.gelu(np.linspace(-3, 3, 64, dtype=np.float32), approximate=True)
    step = (lowest.max() + GELU_SHIFT) / 255
    assert np.abs(act(lowest) - lowest).max() <= 0.51 * step


@pytest.mark.parametrize(
    ("part", "layers"), [("adaln", 3), ("embedders", 3), ("final", 1), ("attention", 8)]
)
def test_a_part_adds_its_layers(params, part, layers):
    base = Recipe.preset("w4a8", params, group_size=32)
    name = "w16a6" if part == "attention" else "w6a6"
    extended = base.with_part(part, name, group_size=16)
    added = set(extended.resolve(params)) - set(base.resolve(params))
    assert len(added) == layers
    for path in added:
        spec = extended.get(path)
        assert spec.act.bits == 6
        assert (spec.weight is None) == (part == "attention")
    assert Recipe.from_json(extended.to_json()) == extended


def test_an_unknown_part_is_named():
    with pytest.raises(
        ValueError, match="part='head' is not known; use one of blocks, adaln, embedders"
    ):
        Recipe.preset("w4a8").with_part("head", "w8a8")


EVERYTHING = {
    "x_embedder/proj", "t_embedder/mlp_0", "t_embedder/mlp_2", "y_embedder",
    "final_layer/adaLN_modulation", "final_layer/linear",
    *(f"blocks_{i}/{name}" for i in range(2)
      for name in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2", "adaLN_modulation")),
}  # fmt: skip
OPERANDS = [
    f"blocks_{i}/attn/operands/{name}" for i in range(2) for name in ("q", "k", "v", "softmax")
]


@pytest.mark.parametrize("layers", [".*", None])
def test_a_pattern_of_everything_quantizes_layers_and_tables_and_leaves_operands(params, layers):
    name = "w4a8" if layers else "w4a8-all"
    recipe = Recipe.preset(name, params, group_size=16, layers=layers)
    found = recipe.resolve(params)
    assert set(found) == EVERYTHING
    assert found["y_embedder"] == LayerSpec(found["blocks_0/attn/qkv"].weight)
    assert recipe.operands_left(params) == OPERANDS
    quantized = quantize_params(params, recipe=recipe)
    assert isinstance(quantized["y_embedder"]["embedding_table"], QTensor)
    assert set(quantized["blocks_0"]["attn"]) == {"qkv", "proj"}
    assert recipe.name == f"{name}-g16"


def test_a_pattern_of_a_block_leaves_its_operands_and_their_own_rule_takes_them(params):
    block = Rule(r"blocks_\d+/.*", LayerSpec(WeightSpec(4, 16), ActSpec(8, 16)))
    operands = Rule(r"blocks_0/attn/(q|k|v|softmax)", LayerSpec(None, ActSpec(8, 0)))
    for rules in ((block, operands), (operands, block)):
        recipe = Recipe(rules)
        found = recipe.resolve(params)
        assert found["blocks_0/attn/operands/q"] == operands.spec
        assert found["blocks_0/attn/qkv"] == block.spec
        assert recipe.operands_left(params) == OPERANDS[4:]


def test_inputs_alone_by_a_broad_pattern_leave_operands_too(params):
    found = Recipe.preset("w16a8", params, layers=".*", group_size=16).resolve(params)
    assert set(found) == EVERYTHING - {"y_embedder"}


def test_a_rule_without_a_spec_leaves_operands_as_well(params):
    base = Recipe.preset("w4a8", params).with_part("attention", "w16a8")
    recipe = Recipe((*base.rules, Rule("blocks_0/.*", LayerSpec())))
    assert all(path.startswith("blocks_1/") for path in recipe.resolve(params))
    assert len(recipe.resolve(params)) == 4 + 4
    assert recipe.operands_left(params) == []


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(()),
        Recipe((Rule(".*", LayerSpec()),)),
        Recipe((Rule(".*", LayerSpec(WeightSpec())), Rule(".*", LayerSpec()))),
        Recipe((Rule("y_embedder", LayerSpec(None, ActSpec(8, 0))),)),
    ],
)
def test_a_recipe_that_quantizes_nothing_is_refused(params, recipe):
    for fn in (
        recipe.resolve,
        lambda p: plan(p, recipe),
        lambda p: quantize_params(p, recipe=recipe),
    ):
        with pytest.raises(ValueError, match="quantizes nothing"):
            fn(params)


def test_presets_that_do_not_fit_are_named(params):
    with pytest.raises(ValueError, match="recipe='w16a16' quantizes nothing"):
        Recipe.preset("w16a16")
    with pytest.raises(ValueError, match=r"layers='.\*' does not go with recipe='w4a8-all'"):
        Recipe.preset("w4a8-all", layers=".*")
    with pytest.raises(ValueError, match="adaln='w4' is not a preset"):
        Recipe.preset("w4a8").with_part("adaln", "w4")
    with pytest.raises(ValueError, match="attention='w4a8': attention operands have no weights"):
        Recipe.preset("w4a8").with_part("attention", "w4a8")


@pytest.mark.parametrize(
    "make", [lambda: Rule("(", LayerSpec()), lambda: Recipe.preset("w4a8", layers="(")]
)
def test_a_bad_pattern_is_a_sentence(make):
    with pytest.raises(ValueError, match=r"layers='\(' is not a regular expression: missing \)"):
        make()


@pytest.mark.parametrize("name", ["smooth+hadamard", "hadamard64", "smooth+shift+hadamard256"])
def test_transforms_and_ranks_survive_json_and_are_absent_where_the_method_decides(name):
    side = WeightSpec(4, 16)
    asked = LayerSpec(side, None, name, np.int64(8))
    recipe = Recipe((Rule("a", asked), Rule("b", LayerSpec(side)), Rule("c", LayerSpec())))
    data = json.loads(json.dumps(recipe.to_json()))
    assert Recipe.from_json(data) == recipe
    assert (data["rules"][0]["transform"], data["rules"][0]["rank"]) == (name, 8)
    assert set(data["rules"][1]) == {"layers", "weight", "act"}
    assert recipe.for_rounding().rules[0].spec == LayerSpec(side)
    off = LayerSpec(side, None, "none", 0)
    assert Recipe.from_json(Recipe((Rule("a", off),)).to_json()).rules[0].spec == off
    assert off.asks_for is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"transform": "smoth"}, "rule 0: transform='smoth' is not known; use one of none, smooth"),
        ({"transform": 3}, "rule 0: transform=3 is not known"),
        ({"rank": -1}, "rule 0: rank=-1 is not the rank of a branch"),
        ({"rank": True}, "rule 0: rank=True is not"),
        ({"rank": 1.5}, "rule 0: rank=1.5 is not"),
        ({"weight": None, "rank": 4}, "rank=4 of a layer that is left in full precision"),
        ({"transfrom": "none"}, "unknown entry 'transfrom'"),
    ],
)
def test_transforms_and_ranks_that_do_not_exist_are_refused(entry, message):
    rule = {"layers": "a", "weight": WeightSpec(4, 16).to_json(), **entry}
    with pytest.raises(ValueError, match=message):
        Recipe.from_json({"rules": [rule]})


def test_rounding_alone_refuses_what_a_method_makes_first(params):
    spec = LayerSpec(WeightSpec(4, 16), None, "smooth")
    recipe = Recipe((Rule("blocks_0/mlp/fc2", spec),))
    with pytest.raises(ValueError, match=r"asks for transform='smooth' of blocks_0/mlp/fc2"):
        quantize_params(params, recipe=recipe)
    quantize_params(params, recipe=recipe.for_rounding())
    operand = Recipe((Rule("blocks_0/attn/q", LayerSpec(None, ActSpec(8, 0), "smooth")),))
    with pytest.raises(ValueError, match="is an operand of the attention products"):
        operand.resolve(params)
