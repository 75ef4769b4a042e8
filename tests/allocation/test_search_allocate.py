"""The default search on known quadratic errors: optimality, the gate, verification, resuming."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from search_models import search, small_model, small_space
from told import Told

from qdit_jax.allocation import Store

NUM_LAYERS = 8


@pytest.fixture(scope="module")
def space():
    return small_space(small_model(2)[1])


@pytest.fixture(scope="module")
def budget(space):
    return search.parse_budget("bitops=1.0x-g32", space, search.named_costs())


@pytest.fixture(scope="module")
def legal(space, budget):
    every = np.array(list(itertools.product(range(4), repeat=NUM_LAYERS)), np.int32)
    return every[budget.allows(every)]


def quadratic(strength):
    """Returns a prediction with terms between layers of a given strength."""
    rng = np.random.default_rng(1)
    rise = np.array([0.5, 1.0, 2.0, 3.5])
    size = rng.exponential(size=(NUM_LAYERS, 1)) * rise
    direction = rng.normal(size=(NUM_LAYERS, 4, 30)) / 30**0.5
    shared = rng.normal(size=30) / 30**0.5
    rows = np.sqrt(size)[..., None] * (direction + strength * shared)
    gram = np.einsum("lci,mdi->lcmd", rows, rows)
    return search.Prediction(0.1, np.zeros((NUM_LAYERS, 4)), gram)


def run(space, budget, truth, believed=None, **options):
    settings = search.AllocationSettings(rungs=(1, 2, 3), **options.pop("changes", {}))
    given = [search.uniform_assignment(space, size) for size in (8, 16, 32, 64)]
    return search.allocate(
        space,
        budget,
        lambda rows, batches: truth.joint(rows),
        lambda base: believed or truth,
        seed=3,
        settings=settings,
        first=given,
        **options,
    )


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_faithful_prediction_leads_to_the_optimum(space, budget, legal, strength):
    truth = quadratic(strength)
    found = run(space, budget, truth)
    assert budget.allows(found.assignment)
    # Moves of at most two layers end in a local optimum: among the best percent at least.
    assert truth.joint(found.assignment)[0] <= np.quantile(truth.joint(legal), 0.01)
    assert found.report["rank_correlation"]["joint"] == pytest.approx(1.0)
    assert len(found.measured.fitness) < 120


def test_without_terms_between_layers_the_knapsack_is_already_optimal(space, budget, legal):
    truth = quadratic(0.0)
    alone = np.einsum("lclc->lc", truth.gram)
    additive = search.Prediction(truth.constant, alone, np.zeros_like(truth.gram))
    found = run(space, budget, additive)
    assert found.report["passed"]
    assert found.report["knapsack"] == found.assignment.tolist()
    assert additive.joint(found.assignment)[0] == pytest.approx(additive.joint(legal).min())
    assert found.report["knapsack_gap"] == 0


def test_a_misleading_prediction_is_noticed_and_measurements_win(space, budget):
    truth, wrong = quadratic(1.0), quadratic(0.0)
    wrong = search.Prediction(0.0, np.random.default_rng(5).random((NUM_LAYERS, 4)), 0 * wrong.gram)
    told = Told()
    found = run(space, budget, truth, wrong, progress_fn=told.tell)
    assert not found.report["passed"]
    assert any("leaning on measured joint errors" in line for line in told.texts)
    gated = (found.measured.round == 0) & budget.allows(found.measured.assignments)
    assert truth.joint(found.assignment)[0] < 0.97 * found.measured.fitness[gated].min()


def test_uniform_assignments_may_win(space, budget, legal):
    uniform = search.uniform_assignment(space, 32)

    class Truth:
        def joint(self, rows):
            return 1.0 + (np.atleast_2d(rows) != uniform).sum(axis=1)

    assert run(space, budget, Truth(), quadratic(0.0)).assignment.tolist() == uniform.tolist()


def test_a_stopped_search_goes_on_without_measuring_twice(space, budget, tmp_path):
    truth = quadratic(1.0)
    whole = run(space, budget, truth)

    class StoppedError(Exception):
        pass

    calls = []

    class Dying:
        def joint(self, rows):
            calls.append(len(rows))
            if len(calls) == 3:
                raise StoppedError
            return truth.joint(rows)

    with Store(tmp_path / "state", {}) as store, pytest.raises(StoppedError):
        run(space, budget, Dying(), truth, journal=search.Journal(store))
    counted = []

    class Counting:
        def joint(self, rows):
            counted.append(len(rows))
            return truth.joint(rows)

    with Store(tmp_path / "state", {}) as store:
        resumed = run(space, budget, Counting(), truth, journal=search.Journal(store))
    assert resumed.report == whole.report
    assert resumed.assignment.tolist() == whole.assignment.tolist()
    for name, array in whole.measured.arrays().items():
        assert array.tobytes() == resumed.measured.arrays()[name].tobytes()
    assert sum(counted) < len(whole.measured.fitness)


def test_a_regression_on_measured_errors_finds_what_the_prediction_lacks(space):
    truth = quadratic(1.0)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 4, (150, NUM_LAYERS))
    blind = search.Prediction(0.0, np.zeros((NUM_LAYERS, 4)), np.zeros_like(truth.gram))
    fitted = search.corrected(blind, rows[:100], truth.joint(rows[:100]), additive=True)
    assert search.rank_correlation(fitted.joint(rows[100:]), truth.joint(rows[100:])) > 0.8
    scaled = search.Prediction(0.0, 3 * truth.linear, 3 * truth.gram)
    refit = search.corrected(scaled, rows[:40], truth.joint(rows[:40]), additive=False)
    np.testing.assert_allclose(refit.joint(rows), truth.joint(rows), rtol=0.05)


def test_the_descent_never_leaves_the_budget_and_always_improves(space, budget):
    truth = quadratic(1.0)
    start = search.uniform_assignment(space, 64)
    path = search.descend(truth, space, budget, start)
    values = truth.joint(np.array([start, *path]))
    assert (np.diff(values) < 0).all()
    assert budget.allows(np.array(path)).all()
