"""The knapsack against exhaustive search; the front; what cannot be solved."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdit_jax.allocation import lagrangian_front, pareto, solve


def tables(rng, num_layers, num_choices=4, whole=False):
    errors = [rng.exponential(size=num_choices) for _ in range(num_layers)]
    costs = [rng.exponential(size=num_choices) for _ in range(num_layers)]
    if whole:
        costs = [np.ceil(5 * row) for row in costs]
    return errors, costs


def totals(errors, costs):
    numbers = np.array(list(itertools.product(*(range(len(row)) for row in errors))))
    return [sum(row[numbers[:, i]] for i, row in enumerate(table)) for table in (errors, costs)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0, 1), st.booleans())
def test_the_solution_is_that_of_exhaustive_search(seed, num_layers, share, whole):
    errors, costs = tables(np.random.default_rng(seed), num_layers, whole=whole)
    every_error, every_cost = totals(errors, costs)
    limit = every_cost.min() + share * np.ptp(every_cost)
    found = solve(errors, costs, limit, slack=1e-9)
    assert found.gap == 0
    assert found.error == pytest.approx(every_error[every_cost <= limit + 1e-9].min())
    assert found.cost <= limit + 1e-9
    chosen = sum(row[i] for row, i in zip(errors, found.assignment, strict=True))
    assert chosen == pytest.approx(found.error)


def test_costs_may_be_negative():
    errors = [np.array([0.0, 1.0, 5.0])] * 3
    costs = [np.array([-32.0, -128.0, -288.0])] * 3
    assert solve(errors, costs, -3 * 128.0).error == 3.0


def test_the_papers_size_is_solved_exactly_in_no_time():
    rng = np.random.default_rng(0)
    sizes = np.array([32, 64, 128, 192, 288])
    kinds = np.array([1.0, 3, 4, 4])
    errors = [rng.exponential() * sizes ** rng.uniform(0.3, 1.2) for _ in range(112)]
    costs = [kinds[i % 4] * 288 / sizes for i in range(112)]
    limit = sum(row[2] for row in costs)
    found = solve(errors, costs, limit)
    assert found.gap == 0
    assert found.error < sum(row[2] for row in errors)


def test_too_few_states_give_a_bound_instead_of_a_proof():
    rng = np.random.default_rng(3)
    errors, costs = tables(rng, 14, 5)
    limit = sum(row.mean() for row in costs) * 0.6
    exact = solve(errors, costs, limit)
    rough = solve(errors, costs, limit, max_states=3)
    assert exact.gap == 0
    assert rough.cost <= limit
    assert rough.error - rough.gap <= exact.error <= rough.error


def test_the_front_is_convex_and_holds_the_best_of_every_multiplier():
    errors, costs = tables(np.random.default_rng(1), 5)
    assignments, cost, error = lagrangian_front(errors, costs)
    every_error, every_cost = totals(errors, costs)
    assert (np.diff(cost) > 0).all()
    assert (np.diff(error) < 0).all()
    slopes = np.diff(error) / np.diff(cost)
    assert (np.diff(slopes) >= -1e-9).all()
    for multiplier in (0.0, 0.1, 1.0, 10.0):
        best = (every_error + multiplier * every_cost).min()
        assert (error + multiplier * cost).min() == pytest.approx(best)
    assert assignments.shape == (len(cost), 5)


def test_a_limit_below_the_cheapest_assignment_is_an_error():
    with pytest.raises(ValueError, match=r"no assignment costs 1 or less; the cheapest costs 3\."):
        solve([np.ones(2)] * 3, [np.array([1.0, 2.0])] * 3, 1.0)
    with pytest.raises(ValueError, match="must be finite"):
        solve([np.array([np.nan, 1.0])], [np.ones(2)], 5.0)


def test_pareto_keeps_what_nothing_beats_in_both():
    assert pareto(np.array([3.0, 1, 2, 2]), np.array([1.0, 5, 6, 4])).tolist() == [1, 3, 0]
