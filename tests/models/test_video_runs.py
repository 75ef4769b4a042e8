"""Networks whose blocks differ in turn, scanned period by period: the same numbers, half the program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import output, random_params

import qdit_jax as qdit
from qdit_jax.models import FAMILIES, RUNS, build_model, runs, with_runs
from qdit_jax.quant import ActQuant
from qdit_jax.recipes import LayerSpec, Recipe, Rule
from qdit_jax.sampling import denoiser, hoisted, running_params, sampler_timesteps

# The names of the stacks, and how many blocks each holds: of 5 blocks or pairs, of Latte 8 blocks.
STACKS = {
    "latte": ({"depth": 8}, {"blocks_2": 3, "blocks_3": 3}),
    "latte_t2v": (
        {"depth": 5},
        {"transformer_blocks_1": 4, "temporal_transformer_blocks_1": 4},
    ),
    "stdit": ({"depth": 5}, {"blocks_1": 4}),
    "stdit3": ({"depth": 5}, {"spatial_blocks_0": 5, "temporal_blocks_0": 5}),
}
# A layer whose setting differs, in one kind of block only, and the stacks that are left.
CUTS = {
    "latte": ("blocks_5/mlp/fc1", {}),
    "latte_t2v": (
        "temporal_transformer_blocks_2/mlp/fc1",
        {"transformer_blocks_3": 2, "temporal_transformer_blocks_3": 2},
    ),
    "stdit": ("blocks_2/mlp/fc1", {"blocks_3": 2}),
    "stdit3": (
        "spatial_blocks_2/mlp/fc1",
        {"spatial_blocks_0": 2, "temporal_blocks_0": 2}
        | {"spatial_blocks_3": 2, "temporal_blocks_3": 2},
    ),
}
families = pytest.mark.parametrize("family", STACKS)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    monkeypatch.setattr(runs, "LEAST", 2)


def made(family, **fields):
    changes, _ = STACKS[family]
    model = build_model(family, {**FAMILIES[family].examples[0], **changes, **fields})
    return model, random_params(model)


def inputs_of(model):
    def drawn(leaf):
        if leaf.dtype == bool:
            return jnp.asarray(np.arange(leaf.size).reshape(leaf.shape) % 5 < 3)
        if leaf.dtype == jnp.int32:
            return jnp.arange(leaf.size).reshape(leaf.shape)
        if leaf.ndim == 1:
            return jnp.full(leaf.shape, 24.0)
        return jnp.asarray(np.random.default_rng(1).standard_normal(leaf.shape), jnp.float32)

    x, _, condition = model.example_inputs(2)
    return drawn(x), jnp.array([3.0, 700.0]), jax.tree.map(drawn, condition)


def lengths(params):
    return {name: jax.tree.leaves(tree)[0].shape[0] for name, tree in params[RUNS].items()}


def assert_same(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, atol=tolerance * float(jnp.abs(expected).max()))


@families
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_of_periods_computes_the_same(family, dtype):
    model, params = made(family)
    model, inputs = model.clone(dtype=dtype), inputs_of(model)
    ran = running_params(model, params)
    assert lengths(ran) == STACKS[family][1]
    assert running_params(model, ran)[RUNS].keys() == ran[RUNS].keys()
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    assert_same(output(model, ran, *inputs), output(model, params, *inputs), tolerance)


@families
def test_runs_of_quantized_periods_end_where_one_block_differs(family):
    model, params = made(family)
    path, left = CUTS[family]
    recipe = Recipe.preset("w4a8", params, group_size=16)
    coarse = Rule(path, LayerSpec(qdit.WeightSpec(4, 8), qdit.ActSpec(8, 8)))
    params = qdit.quantize_params(params, recipe=Recipe((*recipe.rules, coarse), "mixed"))
    ran, inputs = running_params(model, params), inputs_of(model)
    assert path.split("/")[0] in ran
    assert lengths(ran) == left if left else RUNS not in ran
    assert_same(output(model, ran, *inputs), output(model, params, *inputs))


@families
def test_a_block_of_each_kind_is_traced_once(family):
    model, params = made(family)
    deeper = model.clone(depth=model.depth + 2)
    x, timestep, condition = inputs_of(model)

    def traced(model, params):
        return str(
            jax.make_jaxpr(lambda p: model.apply({"params": p}, x, timestep, condition))(params)
        )

    apart = traced(model, params)
    few, many = (
        traced(network, running_params(network, random_params(network)))
        for network in (model, deeper)
    )
    assert "scan[" in few
    assert few.count("dot_general") == many.count("dot_general") < apart.count("dot_general")


def test_known_modulation_of_latte_is_stacked_with_its_blocks():
    model, params = made("latte")
    labels, sampler = jnp.array([1, 2]), qdit.ddim(steps=2)
    noise = jax.random.normal(jax.random.key(0), (2, *model.sample_shape()))
    fast = hoisted(model, params, sampler_timesteps(sampler), labels, 1.5)
    paths = {path for path in fast.denoise_fn.known if path.startswith(RUNS)}
    assert paths == {f"{RUNS}/blocks_{i}/adaLN_modulation" for i in (2, 3)}
    found = qdit.sample(fast, sampler, noise, labels)
    assert_same(found, qdit.sample(denoiser(model, params, 1.5), sampler, noise, labels))


@families
def test_static_activations_are_not_stacked(family):
    model, params = made(family)
    params = qdit.quantize_params(params, recipe=Recipe.preset("w4a8", params, group_size=16))

    def static(leaf):
        if not isinstance(leaf, ActQuant):
            return leaf
        return dataclasses.replace(leaf, spec=dataclasses.replace(leaf.spec, mode="static"))

    params = jax.tree.map(static, params, is_leaf=lambda leaf: isinstance(leaf, ActQuant))
    assert with_runs(params, FAMILIES[family].block, periods=model.block_periods()) is params
