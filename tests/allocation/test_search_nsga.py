"""NSGA-II under a known fitness: ranks by definition, legality, the front it finds, resuming."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import numpy as np
import pytest
from search_models import search, small_model, small_space

from qdit_jax.allocation import EvolutionSettings, Measured, offspring, pareto
from qdit_jax.allocation.strategies.evolution import predicted_front, repaired
from qdit_jax.allocation.strategies.nsga import crowding, survivors

SETTINGS = EvolutionSettings(population=24, num_generations=8, num_crossover=12, num_mutation=12)


@pytest.fixture(scope="module")
def space():
    return small_space(small_model(2)[1])


@pytest.fixture(scope="module")
def budget(space):
    return search.parse_budget("bitops=1.0x-g16", space, search.named_costs())


def fitness(assignments):
    """Returns errors that grow with the group size, with strong terms between layers."""
    rng = np.random.default_rng(0)
    own = np.cumsum(rng.uniform(0.2, 1.0, (8, 4)), axis=1)
    pairs = rng.standard_normal((8, 8))
    shares = own[np.arange(8), np.atleast_2d(assignments)]
    return shares.sum(axis=1) + 0.1 * np.einsum("ni,ij,nj->n", shares, pairs @ pairs.T, shares)


def dominated_ranks(cost, error):
    """Returns every point's rank by the definition: peel off what no point left dominates."""
    ranks, left, rank = np.full(len(cost), -1), set(range(len(cost))), 0
    while left:
        best = {
            i
            for i in left
            if not any(
                (cost[j] <= cost[i] and error[j] <= error[i])
                and (cost[j] < cost[i] or error[j] < error[i])
                for j in left
            )
        }
        ranks[list(best)] = rank
        left, rank = left - best, rank + 1
    return ranks


@pytest.mark.parametrize("seed", range(5))
def test_survivors_come_rank_by_rank(seed):
    points = np.random.default_rng(seed).random((2, 40))
    ranks = dominated_ranks(*points)
    for count in (1, 7, 25, 40, 60):
        chosen = survivors(*points, count)
        assert len(set(chosen.tolist())) == min(count, 40)
        assert ranks[chosen].tolist() == sorted(ranks)[:count]


def test_equal_points_all_survive_in_the_end():
    cost, error = np.array([1.0, 1.0, 2.0, 1.0]), np.array([3.0, 3.0, 1.0, 3.0])
    assert sorted(survivors(cost, error, 4).tolist()) == [0, 1, 2, 3]


def test_crowding_is_the_distance_between_neighbors():
    cost, error = np.array([0.0, 1.0, 4.0, 10.0]), np.array([8.0, 6.0, 5.0, 0.0])
    expected = [np.inf, 4 / 10 + 3 / 8, 9 / 10 + 6 / 8, np.inf]
    np.testing.assert_allclose(crowding(cost, error), expected)
    assert crowding(np.zeros(1), np.zeros(1)).tolist() == [np.inf]


def test_of_one_rank_the_lonely_survive():
    cost = np.array([0.0, 1.0, 1.1, 5.0, 10.0])
    assert set(survivors(cost, 10 - cost, 3).tolist()) == {0, 4, 3}


def test_every_child_is_legal_and_new(space, budget):
    found = search.evolve(
        space, budget, fitness, draw_fn=search.offspring, seed=3, settings=SETTINGS
    )
    assert budget.allows(found.assignments).all()
    assert len(found.known) == len(found.fitness)
    children = offspring(
        np.random.default_rng(0), space=space, budget=budget, settings=SETTINGS, measured=found
    )
    assert len(children) == 24
    assert not found.known & {child.tobytes() for child in children}


def test_a_repaired_assignment_only_gets_cheaper(space, budget):
    rng = np.random.default_rng(1)
    for _ in range(20):
        drawn = rng.integers(0, space.num_choices)
        made = repaired(rng, drawn, budget)
        assert budget.allows(made)
        changed = np.flatnonzero(made != drawn)
        assert all(budget.table[i][made[i]] < budget.table[i][drawn[i]] for i in changed)


def hypervolume(cost, error, most_cost, most_error):
    """Returns the area that the front of the points dominates, below a reference point."""
    front = pareto(cost, error)
    edges = np.append(cost[front], most_cost)
    return float(((most_error - error[front]) * np.diff(edges)).sum())


def test_the_front_is_nearer_to_the_true_one_than_random_search_and_a_seeded_one_nearer_still(
    space, budget
):
    everything = np.array(list(itertools.product(range(4), repeat=8)), np.int32)
    everything = everything[budget.allows(everything)]
    cost, error = budget.cost(everything), fitness(everything)
    corner = cost.max() * 1.01, error.max() * 1.01
    whole = hypervolume(cost, error, *corner)
    own = np.stack([fitness(np.eye(8, dtype=int)[i] * c) for i in range(8) for c in range(4)])
    table = own.reshape(8, 4) - own.min()
    prediction = search.Prediction(0.0, table, np.zeros((8, 4, 8, 4)))
    first = predicted_front(prediction, space, budget, 12)
    assert budget.allows(np.array(first)).all()
    missing = {"random": [], "nsga2": [], "seeded": []}
    for seed in range(5):
        options = {"seed": seed, "settings": SETTINGS}
        found = {
            "random": search.evolve(
                space, budget, fitness, draw_fn=search.random_children, **options
            ),
            "nsga2": search.evolve(space, budget, fitness, draw_fn=search.offspring, **options),
            "seeded": search.evolve(
                space, budget, fitness, draw_fn=search.offspring, first=first, **options
            ),
        }
        for name, one in found.items():
            missing[name].append(1 - hypervolume(one.cost, one.fitness, *corner) / whole)
    means = {name: float(np.mean(values)) for name, values in missing.items()}
    assert means["seeded"] < means["nsga2"] < 0.5 * means["random"], means


def test_a_stopped_run_goes_on_to_the_same_result(space, budget):
    states = []
    evolve = partial(
        search.evolve, space, budget, fitness, draw_fn=search.offspring, settings=SETTINGS
    )
    whole = evolve(seed=7, save_fn=states.append)
    resumed = evolve(seed=7, measured=Measured(**states[3].arrays()))
    for name, array in whole.arrays().items():
        assert array.tobytes() == resumed.arrays()[name].tobytes(), name
    other = evolve(seed=8)
    assert other.assignments.tobytes() != whole.assignments.tobytes()


def test_without_generations_only_the_first_population_is_measured(space, budget):
    settings = dataclasses.replace(SETTINGS, num_generations=0)
    assert (
        len(
            search.evolve(
                space, budget, fitness, draw_fn=search.offspring, seed=0, settings=settings
            ).fitness
        )
        == 24
    )
