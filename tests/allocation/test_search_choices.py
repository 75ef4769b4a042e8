"""Transforms, ranks and formats as choices: what is measured is what a method then makes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from search_models import batches_of_noise, search, small_model, small_rollout, small_space
from tiny_models import output
from told import Told

import qdit_jax as qdit
from qdit_jax.allocation.asked import given_assignments
from qdit_jax.allocation.rollouts import Sensitivities
from qdit_jax.calibration import collect_items
from qdit_jax.diffusion import ddim
from qdit_jax.methods import CalibrationData, method_named
from qdit_jax.quant import ActSpec, WeightSpec
from qdit_jax.recipes import LayerSpec

NAMES = ("none", "smooth+hadamard", "smooth+shift+pca")
CHOICES = {"group_sizes": (16,), "transforms": NAMES, "ranks": (0, 3), "act_bits": 4}


@pytest.fixture(scope="module")
def case():
    """Returns a network, its space, what the choices are fitted to, and the fits."""
    model, params = small_model()
    checkpoint = qdit.Checkpoint(model, params)
    items = collect_items(checkpoint, jax.random.key(7), 8, sampler=ddim(steps=2), batch_size=8)
    data = CalibrationData(items=items, batch_size=16)
    space = small_space(params, **CHOICES)
    return checkpoint, space, data, search.fitted_coordinates(checkpoint, space, data)


def drawn_assignments(space, count, seed=0):
    return np.random.default_rng(seed).integers(0, space.num_choices, (count, len(space.layers)))


def by_nearest():
    """Returns `best` with rounding to nearest in place of GPTQ."""
    return dataclasses.replace(method_named("best"), apply=method_named("rtn").apply)


def test_the_choices_are_the_product_without_what_changes_nothing():
    params = small_model()[1]
    space = small_space(params, **{**CHOICES, "group_sizes": (8, 32)})
    assert set(space.num_choices.tolist()) == {2 * 3 * 2}
    names = [search.describe(spec) for spec in space.layers[0].choices]
    assert len(set(names)) == 12
    assert names[:3] == ["w4a4 g8", "w4a4 g32", "w4a4 g8 r3"]
    assert names[-1] == "w4a4 g32 smooth+shift+pca r3"
    assert all(spec.transform and spec.rank is not None for spec in space.layers[0].choices)
    plain = small_space(params).layers[0].choices
    assert {(spec.transform, spec.rank) for spec in plain} == {(None, None)}
    wide = {"weight_bits": (4, 16), "act_bits": (8, 16), "sides": "weights", "group_sizes": (8, 16)}
    found = (
        small_space(params, transforms=("none", "smooth"), ranks=(0, 2), **wide).layers[0].choices
    )
    # Four of weights and inputs (x 2 x 2), one of inputs alone (x 2, no rank), one of nothing.
    assert len(found) == 4 * 4 + 2 + 1
    assert LayerSpec() in found


def test_formats_are_choices_of_the_weights():
    params = small_model()[1]
    settings = {"formats": ("int", "nf4", "nvfp4"), "weight_bits": (3, 4), "group_sizes": (16, 32)}
    found = small_space(params, **settings).layers[0].choices
    names = [search.describe(spec) for spec in found]
    assert names == [
        *("w3a8 g16", "w3a8 g32", "nf4 g16 a8 g16", "nf4 g32 a8 g32", "nvfp4 g16 a8 g16"),
        *("nvfp4 g16 a8 g32", "w4a8 g16", "w4a8 g32"),
    ]
    with pytest.raises(ValueError, match="unknown format 'int9'"):
        small_space(params, formats=("int9",))


def test_what_a_layer_cannot_have_is_left_out_or_refused():
    params = small_model()[1]
    found = small_space(params, ranks=(0, 4096)).layers
    assert all(spec.rank == 0 for layer in found for spec in layer.choices)
    with pytest.raises(ValueError, match=r"rank=4096 of blocks_0/attn/proj: its kernel is 64x64"):
        small_space(params, ranks=(4096,))
    with pytest.raises(ValueError, match="transform='smoth' is not known"):
        small_space(params, transforms=("smoth",))
    with pytest.raises(ValueError, match="must be one or more different names"):
        small_space(params, transforms=("smooth", "smooth"))
    odd = {"layer": {"kernel": jnp.ones((6, 8))}}
    names = ("none", "hadamard", "hadamard64", "smooth")
    space = search.search_space(odd, layers="layer", transforms=names)
    assert {spec.transform for spec in space.layers[0].choices} == {"none", "smooth"}
    with pytest.raises(ValueError, match="no bias, which a shift"):
        search.search_space(odd, layers="layer", transforms=("shift",))


def test_no_choice_changes_the_function_in_full_precision(case):
    checkpoint, space, _, coordinates = case
    x, label, _ = (a[0] for a in batches_of_noise(checkpoint.model))
    timestep = jnp.full(len(label), 400.0)

    @jax.jit
    def traced(params, assignment, coordinates):
        moved = search.coordinated_params(params, space, assignment, coordinates)
        return checkpoint.model.apply({"params": moved}, x, timestep, label)

    params = checkpoint.params
    expected = output(checkpoint.model, params, x, timestep, label)
    for choice in range(6):
        found = traced(params, np.full(len(space.layers), choice), coordinates)
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert traced._cache_size() == 1
    kernel = flatten_dict(search.coordinated_params(params, space, np.full(4, 5), coordinates))
    assert (
        np.abs(
            kernel[("blocks_0", "mlp", "fc2", "kernel")]
            - params["blocks_0"]["mlp"]["fc2"]["kernel"]
        ).max()
        > 0.01
    )


def test_an_assignment_is_what_best_makes_of_its_recipe(case):
    checkpoint, space, data, coordinates = case
    x, label, _ = (a[0] for a in batches_of_noise(checkpoint.model))
    timestep = jnp.full(len(label), 400.0)

    @jax.jit
    def traced(params, assignment, coordinates):
        chosen = search.assigned_params(params, space, assignment, coordinates)
        return checkpoint.model.apply({"params": chosen}, x, timestep, label)

    exact = output(checkpoint.model, checkpoint.params, x, timestep, label)
    without = [i for i, spec in enumerate(space.layers[0].choices) if not spec.rank]
    rng = np.random.default_rng(0)
    for numbers, flips in ((without, 1e-6), (range(len(space.layers[0].choices)), 0.2)):
        assignment = rng.choice(numbers, len(space.layers))
        recipe = search.recipe_of(space, assignment)
        made = qdit.quantize(checkpoint, by_nearest(), recipe, data=data)
        expected = output(checkpoint.model, made.params, x, timestep, label)
        found = traced(checkpoint.params, assignment, coordinates)
        lost, own = (float(np.square(a - exact).sum()) for a in (expected, found))
        # A fold into a layer's outputs changes its branch, which is rounded to 16 bits once more:
        # then what is left for the kernel rounds to another side here and there.
        assert np.square(found - expected).sum() < flips * lost
        assert own == pytest.approx(lost, rel=0.05)
    assert traced._cache_size() == 1


def test_a_search_begins_from_every_transform_in_all_layers_that_the_budget_allows():
    space = small_space(small_model()[1], transforms=("none", "hadamard"), ranks=(0, 2))
    budget = search.parse_budget("bytes=1.0x-g16", space, search.named_costs())
    found = [
        [search.describe(s) for s in search.specs_of(space, a).values()]
        for a in given_assignments(space, budget)
    ]
    assert [set(one) for one in found] == [
        *({f"w4a8 g{size}"} for size in (8, 16, 32, 64)),
        {"w4a8 g32 r2"},
        {"w4a8 g16 hadamard"},
        {"w4a8 g32 hadamard r2"},
    ]
    plain = small_space(small_model()[1], weight_bits=(3, 4))
    given = given_assignments(
        plain, search.parse_budget("bytes=1.0x-g16", plain, search.named_costs())
    )
    assert len(given) == 4


def test_choices_that_were_not_fitted_are_refused(case):
    checkpoint, space, _, _ = case
    with pytest.raises(ValueError, match="has choices with rank=3, which have to be fitted"):
        search.assigned_params(checkpoint.params, space, np.zeros(4, np.int32))


@pytest.fixture(scope="module")
def measured(case):
    """Returns the objective's data, assignments, their fitness, and how often that compiled."""
    checkpoint, space, _, coordinates = case
    data = batches_of_noise(checkpoint.model, 1, 4)
    objective = search.paired_error(small_rollout(checkpoint.model, 2), checkpoint.params, *data)
    evaluator = search.Evaluator(space, checkpoint.params, objective, coordinates=coordinates)
    assignments = drawn_assignments(space, 4)
    return data, assignments, evaluator(assignments), evaluator.num_compilations


def test_measuring_compiles_once(measured):
    _, _, fitness, num_compilations = measured
    assert num_compilations == 1
    assert len(set(fitness.tolist())) == 4


@pytest.mark.slow
def test_predictions_see_the_choices(case, measured):
    checkpoint, space, _, coordinates = case
    data, assignments, fitness, _ = measured
    rollout = small_rollout(checkpoint.model, 2)
    predict_fn = Sensitivities(
        rollout, space, checkpoint.params, data, jax.random.key(0), 2, coordinates
    )
    base = predict_fn(assignments[0])
    assert base.joint(assignments[0])[0] == pytest.approx(fitness[0], rel=1e-3)
    table = predict_fn(None).table
    # What lowers the error of the layers' outputs does so by the prediction too.
    names = [search.describe(spec) for spec in space.layers[0].choices]
    plain, turned = names.index("w4a4 g16"), names.index("w4a4 g16 smooth+hadamard")
    assert table[:, turned].sum() < table[:, plain].sum()


def test_costs_count_what_transforms_and_branches_do():
    sides = (WeightSpec(4, 0, True), ActSpec(8, 0, True))
    layer = search.SearchLayer("x", (64, 100), (), rows=10)
    folded = dataclasses.replace(layer, folded=True)
    scaled = dataclasses.replace(folded, scale_only=True)

    def more(cost_fn, name, rank=0, layer=layer):
        return cost_fn(layer, LayerSpec(*sides, name, rank)) - cost_fn(layer, LayerSpec(*sides))

    ops = search.BitOps()
    assert more(ops, "none") == 0
    assert more(ops, "smooth") == 10 * 64 * 1024
    assert more(ops, "smooth", layer=folded) == 0
    assert more(ops, "hadamard") == 10 * 64 * 4 * 3 * 256  # three factors of order 4
    assert more(ops, "smooth+hadamard16", layer=folded) == 10 * 64 * 4 * 2 * 256
    assert more(ops, "smooth+pca", layer=folded) == 10 * 64 * 64 * 256
    assert more(ops, "none", 5) == 10 * 5 * 164 * 256
    nbytes = search.Bytes()
    assert more(nbytes, "smooth+hadamard", 5) == 64 * 4 + 2 * 5 * 164
    assert more(nbytes, "smooth+shift", layer=folded) == 0
    assert more(nbytes, "smooth", layer=scaled) == 0
    assert more(nbytes, "smooth+shift", layer=scaled) == more(nbytes, "smooth+shift")
    assert more(nbytes, "smooth+shift") == 2 * 64 * 4
    assert more(nbytes, "pca") == 64 * 64 * 4
    assert more(search.CpuCost(), "smooth+hadamard", 5) == 10 * (64 + 768 + 5 * 164)
    gpu = search.gpu_cost()
    assert more(gpu, "smooth+hadamard", 5) == 10 * (64 * 30 + 64 * 64 / 0.5 + 5 * 164 / 0.5)
    assert more(search.MeanGroup(), "smooth+pca", 9) == 0


def test_bytes_are_those_of_what_is_made(case):
    checkpoint, space, data, _ = case
    names = [search.describe(spec) for spec in space.layers[0].choices]
    for name in ("w4a4 g16 smooth+hadamard r3", "w4a4 g16 smooth+shift+pca"):
        assignment = np.full(4, names.index(name))
        recipe = search.recipe_of(space, assignment)
        made = flatten_dict(
            qdit.quantize(checkpoint, by_nearest(), recipe, data=data).params, sep="/"
        )
        slots = ("kernel", "input_map", "rotation", "low_rank")
        leaves = [made.get(f"{layer.path}/{slot}") for layer in space.layers for slot in slots]
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(leaves))
        assert search.total_cost(search.cost_table(space, search.Bytes()), assignment) == held


@pytest.mark.slow
def test_a_search_over_all_choices_finds_a_recipe_that_best_makes(case, tmp_path):
    checkpoint, _, data, _ = case
    told = Told()
    settings = {
        "budget": "bytes=1.15x-g32",
        "space": {
            "group_sizes": (8, 32),
            "transforms": ("none", "smooth"),
            "ranks": (0, 2),
            "act_bits": 4,
        },
        "rollouts": search.Rollouts(
            num_steps=2,
            num_batches=2,
            batch_size=4,
            guidance=None,
            data=data,
            state=tmp_path / "state",
        ),
        "strategy": search.Allocate(
            search.AllocationSettings(num_gate=3, num_rounds=1, num_estimates=1)
        ),
    }
    run = lambda: qdit.search(  # noqa: E731
        checkpoint, jax.random.key(1), progress_fn=told.tell, **settings
    )
    result = run()
    recipe = qdit.Recipe.from_json(result.recipe.to_json())
    assert all(
        rule.spec.transform is not None and rule.spec.rank is not None for rule in recipe.rules
    )
    assert {rule.spec.transform for rule in recipe.rules} - {"none"}
    made = qdit.quantize(checkpoint, by_nearest(), recipe, data=data)
    seeds = search.seeds(checkpoint.model, jax.random.split(jax.random.key(1))[0], 2, 4)
    rollout = search.Rollout.of(checkpoint.model, ddim(steps=2), None)
    objective = search.paired_error(rollout, checkpoint.params, *seeds)
    own = np.mean([objective.measure(made.params, batch) for batch in range(2)])
    measured = [
        fitness
        for rung in result.history["report"]["finalists"]
        for one, fitness in zip(rung["assignments"], rung["fitness"], strict=True)
        if one == result.history["assignment"] and rung["batches"] == 2
    ]
    assert own == pytest.approx(measured[-1], rel=0.05)
    # The same call again reads fits and measurements back.
    texts = told.texts
    assert any(text.startswith("fitted transforms and branches of 4 of 4") for text in texts)
    told.clear()
    again = run()
    assert again.assignment.tolist() == result.assignment.tolist()
    assert not told.counts
    assert not any("fitted" in text for text in told.texts)
    other_data = dataclasses.replace(data, seed=5)
    rollouts = dataclasses.replace(settings["rollouts"], data=other_data)
    other = {**settings, "rollouts": rollouts}
    with pytest.raises(qdit.UserError, match="data was"):
        qdit.search(checkpoint, jax.random.key(1), **other)
