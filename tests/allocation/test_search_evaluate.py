"""The assigned tree equals static quantization; one compilation; errors of objectives."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from search_models import batches_of_noise, search, small_model, small_rollout, small_space
from tiny_models import output

from qdit_jax.ptq import quantize_params
from qdit_jax.quant import ranges


@pytest.fixture(scope="module")
def case():
    model, params = small_model()
    space = small_space(params)
    objective = search.paired_error(small_rollout(model), params, *batches_of_noise(model))
    return model, params, space, search.Evaluator(space, params, objective)


def drawn_assignments(space, count, seed=0):
    return np.random.default_rng(seed).integers(0, space.num_choices, (count, len(space.layers)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sides": "separate", "layers": ".*"},
        {"weight_bits": (3, 4, 16), "act_bits": (4, 8), "sides": "weights"},
        {"scale_levels": (1, 2), "act_scales": ("group", "token"), "layers": ".*fc2"},
        {
            **{"formats": ("int", "fp8_e4m3"), "act_formats": ("int", "fp8_e4m3", "fp8_e5m2")},
            **{"weight_symmetric": (False, True), "act_scales": ("group", "token")},
            **{"weight_bits": 8, "group_sizes": (16, 0)},
        },
        pytest.param(
            {"symmetric": True, "group_sizes": (24, 0, 5000), "weight_bits": 3},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"range_fn": ranges.percentile(0.99), "group_sizes": (16, 64)}, marks=pytest.mark.slow
        ),
    ],
)
def test_an_assigned_tree_is_the_statically_quantized_model(settings):
    model, params = small_model()
    space = small_space(params, **settings)
    x, label, _ = (a[0] for a in batches_of_noise(model))
    timestep = jax.numpy.full(len(label), 400.0)

    @jax.jit
    def traced(params, assignment):
        chosen = search.assigned_params(params, space, assignment)
        return model.apply({"params": chosen}, x, timestep, label)

    for assignment in drawn_assignments(space, 3):
        static = quantize_params(params, recipe=search.recipe_of(space, assignment))
        expected = output(model, static, x, timestep, label)
        # A rounding flip at a tie moves an output by a step of its layer's grid.
        gap = np.abs(traced(params, assignment) - expected) / np.abs(expected).max()
        assert np.quantile(gap, 0.9) < 1e-5
        assert gap.max() < 0.02
    assert traced._cache_size() == 1


def test_a_search_compiles_once(case):
    _, _, space, evaluator = case
    before = evaluator.num_compilations
    for count in (1, 2, 5):
        evaluator(drawn_assignments(space, count))
    evaluator(drawn_assignments(space, 3), [1])
    assert evaluator.num_compilations == max(before, 1) == 1


def test_fitness_is_the_error_of_static_rollouts(case):
    model, params, space, evaluator = case
    objective = evaluator.objective
    assignment = drawn_assignments(space, 1)
    static = quantize_params(params, recipe=search.recipe_of(space, assignment[0]))
    final = [
        small_rollout(model)(static, *data)
        for data in zip(objective.noise, objective.condition, objective.keys, strict=True)
    ]
    gap = np.square(np.stack(final) - objective.reference).mean()
    expected = gap / np.square(objective.reference).mean()
    assert evaluator(assignment)[0] == pytest.approx(expected, rel=0.05)


def test_the_answer_does_not_depend_on_company_or_on_order(case):
    _, _, space, evaluator = case
    assignments = drawn_assignments(space, 4)
    together = evaluator(assignments)
    assert together.tolist() == evaluator(assignments[::-1])[::-1].tolist()
    assert [evaluator(one)[0] for one in assignments] == together.tolist()
    halves = np.mean([evaluator(assignments, [0]), evaluator(assignments, [1])], axis=0)
    np.testing.assert_allclose(halves, together, rtol=1e-6)


@pytest.mark.slow
def test_many_items_a_call_agree_with_one(case):
    _, params, space, evaluator = case
    several = search.Evaluator(space, params, evaluator.objective, per_device=4, batch_size=2)
    assignments = drawn_assignments(space, 3)
    np.testing.assert_allclose(several(assignments), evaluator(assignments), rtol=0.05)
    assert several.num_compilations == 1


def test_finer_groups_have_smaller_errors(case):
    _, _, space, evaluator = case
    errors = evaluator(np.stack([search.uniform_assignment(space, size) for size in (8, 64)]))
    assert errors[0] < 0.7 * errors[1]


def test_a_users_function_is_averaged_over_its_keys(case):
    _, params, space, _ = case

    def fn(params, key):
        return jax.random.uniform(key) + params["blocks_0"]["mlp"]["fc1"]["kernel"].sum()

    objective = search.function_objective(fn, jax.random.key(3), num_batches=4)
    evaluator = search.Evaluator(space, params, objective)
    assignment = search.uniform_assignment(space, 16)
    assert evaluator(assignment)[0] == pytest.approx(
        np.mean([evaluator(assignment, [i])[0] for i in range(4)]), rel=1e-6
    )


def test_a_distance_of_features_sees_all_samples_at_once(case):
    model, params, space, _ = case

    def features_fn(latents):
        return latents.reshape(len(latents), -1)[:, :5]

    def distance_fn(features):
        assert features.shape == (6, 5)
        return float(np.square(features.mean(0)).sum())

    objective = search.feature_distance(
        small_rollout(model), features_fn, distance_fn, *batches_of_noise(model)
    )
    evaluator = search.Evaluator(space, params, objective)
    assert evaluator(search.uniform_assignment(space, 16))[0] > 0
    assert evaluator.num_measured == 2


def test_a_fitness_that_is_no_number_names_the_assignment(case):
    _, params, space, _ = case
    objective = search.function_objective(lambda params, key: np.nan, jax.random.key(0))
    with pytest.raises(search.BadFitnessError, match=r"returned nan for the assignment \[1, 1, 1"):
        search.Evaluator(space, params, objective)(search.uniform_assignment(space, 16))


def test_batches_and_settings_that_do_not_exist_are_errors(case):
    _, params, space, evaluator = case
    with pytest.raises(ValueError, match="an objective that has 2"):
        evaluator(search.uniform_assignment(space, 16), [2])
    with pytest.raises(ValueError, match="positive multiple of batch_size=2"):
        search.Evaluator(space, params, evaluator.objective, per_device=3, batch_size=2)
