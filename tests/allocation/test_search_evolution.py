"""The published evolution under a known fitness: exact trajectories, legality, resuming."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from search_models import search, small_model, small_space

from qdit_jax.allocation import Measured, Store
from qdit_jax.allocation.strategies.evolution import children, random_legal
from qdit_jax.errors import UserError

SETTINGS = search.EvolutionSettings(
    population=8, num_generations=5, num_kept=3, num_crossover=4, num_mutation=4
)


@pytest.fixture(scope="module")
def space():
    return small_space(small_model(2)[1])


@pytest.fixture(scope="module")
def budget(space):
    return search.parse_budget("bitops=1.0x-g32", space, search.named_costs())


def known_fitness(assignments):
    """Returns a distance with weights that make every assignment's fitness different."""
    target = np.array([0, 3, 1, 2, 3, 0, 2, 1])
    return (np.abs(assignments - target) * 1.1 ** np.arange(8)).sum(axis=1)


def run(space, budget, **changes):
    options = {"seed": 7, "settings": SETTINGS, **changes}
    return search.evolve(space, budget, known_fitness, **options)


def test_the_trajectory_is_exact(space, budget):
    found = run(space, budget)
    best = [found.fitness[found.round <= r].min() for r in range(6)]
    np.testing.assert_allclose(best, BEST_BY_GENERATION, rtol=1e-12)
    assert found.best.tolist() == BEST
    assert [int((found.round == r).sum()) for r in range(6)] == [8] * 6


BEST_BY_GENERATION = [9.43612, 9.43612, 7.97202, 7.97202, 7.97202, 7.97202]
BEST = [1, 3, 3, 3, 3, 2, 2, 1]


def test_every_assignment_is_legal_and_new(space, budget):
    found = run(space, budget)
    assert budget.allows(found.assignments).all()
    assert len(found.known) == len(found.fitness)


def test_children_come_from_the_best_seen_so_far(space):
    free = search.parse_budget("bytes=1G", space, search.named_costs())
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 4, (20, 8)).astype(np.int32)
    measured = Measured.none(space).extended(drawn, known_fitness(drawn), free.cost(drawn))
    parents = drawn[np.argsort(known_fitness(drawn))[:3]]
    crossing = dataclasses.replace(SETTINGS, num_mutation=0, num_crossover=10)
    crossed = children(rng, space, free, crossing, measured)
    assert all((child == parents).any(axis=0).all() for child in crossed)
    mutating = dataclasses.replace(SETTINGS, num_mutation=10, num_crossover=0)
    mutated = children(rng, space, free, mutating, measured)
    distance = (mutated[:, None] != parents).sum(axis=2).min(axis=1)
    assert 1 <= distance.mean() <= 2.5
    assert len(crossed) == len(mutated) == 10


def test_a_stopped_run_goes_on_to_the_same_result(space, budget, tmp_path):
    whole = run(space, budget)

    class StoppedError(Exception):
        pass

    calls = []

    def dying_fitness(assignments):
        calls.append(len(assignments))
        if len(calls) == 4:
            raise StoppedError
        return known_fitness(assignments)

    with Store(tmp_path / "state", {"seed": 7}) as store, pytest.raises(StoppedError):
        search.evolve(
            space,
            budget,
            dying_fitness,
            seed=7,
            settings=SETTINGS,
            save_fn=lambda measured: store.save(measured.arrays()),
        )
    with Store(tmp_path / "state", {"seed": 7}) as store:
        saved = Measured(**store.load())
    assert saved.num_rounds == 3
    resumed = run(space, budget, measured=saved)
    for name, array in whole.arrays().items():
        assert array.tobytes() == resumed.arrays()[name].tobytes(), name
        assert array.dtype == resumed.arrays()[name].dtype


def test_a_state_of_another_search_is_refused(space, tmp_path):
    with Store(tmp_path, {"seed": 7, "budget": "x"}) as store:
        assert store.load() is None
        store.save(Measured.none(space).extended(np.zeros((1, 8)), [1.0], [2.0]).arrays())
    message = "state of another search: seed was 7, now it is 8"
    with (
        Store(tmp_path, {"seed": 8, "budget": "x"}) as store,
        pytest.raises(UserError, match=message),
    ):
        store.load()


def test_the_first_population_holds_the_assignments_given(space, budget):
    uniform = search.uniform_assignment(space, 32)
    found = run(space, budget, first=[uniform, uniform])
    assert found.assignments[0].tolist() == uniform.tolist()
    assert (found.assignments[1:] != uniform).any(axis=1).all()
    with pytest.raises(ValueError, match=r"more than budget='bitops=1.0x-g32' allows"):
        run(space, budget, first=[search.uniform_assignment(space, 8)])


def test_a_space_that_is_exhausted_ends_the_search():
    tiny = small_space(small_model()[1], group_sizes=(32, 64), pinned={".*/(qkv|proj|fc1)": 32})
    budget = search.parse_budget("bitops=1.0x-g32", tiny, search.named_costs())

    def fitness(assignments):
        return assignments.sum(axis=1).astype(float)

    found = search.evolve(tiny, budget, fitness, seed=0, settings=SETTINGS)
    assert sorted(found.fitness.tolist()) == [0.0, 1.0]


def test_random_assignments_fill_a_tight_budget_without_bias_to_failure(space):
    budget = search.parse_budget("bitops=1.2x-g64", space, search.named_costs())
    rng = np.random.default_rng(0)
    drawn = np.array([random_legal(rng, space, budget) for _ in range(50)])
    assert budget.allows(drawn).all()
    assert len(np.unique(drawn, axis=0)) > 20


def test_random_search_measures_as_many_and_evolution_beats_it(space, budget):
    longer = dataclasses.replace(SETTINGS, num_generations=15)
    drawn = run(space, budget, settings=longer, draw_fn=search.random_children)
    evolved = run(space, budget, settings=longer)
    assert len(drawn.fitness) == len(evolved.fitness)
    assert evolved.fitness.min() < drawn.fitness.min()


@pytest.mark.parametrize("bad", [{"population": 0}, {"num_kept": 0}, {"mutation_probability": 1.5}])
def test_settings_that_make_no_sense_are_errors(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        search.EvolutionSettings(**bad)
