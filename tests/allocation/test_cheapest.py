"""The cheapest assignment within an error: against brute force, noise, resuming, refusals."""

import itertools

import jax
import numpy as np
import pytest
from search_models import search, small_model, small_space
from told import Told

import qdit_jax as qdit
from qdit_jax.allocation import Cheapest, CheapestSettings, Rollouts, Store, Within
from qdit_jax.allocation.budget import whole_cost

NUM_LAYERS = 8
COSTS = ("bitops", "bytes")


@pytest.fixture(scope="module")
def space():
    return small_space(small_model(2)[1])


@pytest.fixture(scope="module")
def every():
    return np.array(list(itertools.product(range(4), repeat=NUM_LAYERS)), np.int32)


def quadratic(strength, seed=1):
    """Returns errors that fall with finer groups, with terms between layers of a given strength."""
    rng = np.random.default_rng(seed)
    size = rng.exponential(size=(NUM_LAYERS, 1)) * np.array([0.5, 1.0, 2.0, 3.5])
    direction = rng.normal(size=(NUM_LAYERS, 4, 30)) / 30**0.5
    shared = rng.normal(size=30) / 30**0.5
    rows = np.sqrt(size)[..., None] * (direction + strength * shared)
    gram = np.einsum("lci,mdi->lcmd", rows, rows)
    return search.Prediction(0.1, np.zeros((NUM_LAYERS, 4)), gram)


def additive(seed=1):
    table = np.einsum("lclc->lc", quadratic(0.0, seed).gram)
    return search.Prediction(0.1, table, np.zeros((NUM_LAYERS, 4) * 2))


def run(space, cost, truth, believed=None, within="0.5dB-of-g32", **options):
    budget = whole_cost(cost, space, search.named_costs())
    given = [search.uniform_assignment(space, size) for size in (8, 16, 32, 64)]
    found = search.cheapest(
        space,
        budget,
        lambda rows, batches: truth.joint(rows),
        lambda base: believed or truth,
        within=Within(within),
        num_batches=8,
        seed=3,
        first=given,
        **options,
    )
    return budget, found


def optimum(space, budget, truth, every, within):
    limit = truth.joint(Within(within).reference(space))[0] * Within(within).factor
    one = np.eye(4)[every].reshape(len(every), -1)  # [N, L C]
    errors = truth.constant + one @ truth.linear.ravel()
    errors += (one @ truth.gram.reshape(one.shape[1], -1) * one).sum(axis=1)
    inside = every[errors <= limit * (1 + 1e-9)]
    return budget.cost(inside).min(), limit


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("within", ["0dB-of-g32", "0.5dB-of-g32", "-1dB-of-w4a8-g32", "3dB-of-g8"])
def test_additive_errors_give_what_brute_force_gives(space, every, cost, within):
    truth = additive()
    budget, found = run(space, cost, truth, within=within)
    best, limit = optimum(space, budget, truth, every, within)
    assert truth.joint(found.assignment)[0] <= limit
    assert budget.cost(found.assignment) == pytest.approx(best, rel=1e-9)
    assert found.report["error_limit"] == pytest.approx(limit)
    assert found.report["error_db"] <= float(within.partition("dB")[0]) + 1e-9


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_errors_with_terms_between_layers_come_close_to_brute_force(space, every, seed):
    truth = quadratic(1.0, seed)
    budget, found = run(space, "bitops", truth)
    best, limit = optimum(space, budget, truth, every, "0.5dB-of-g32")
    assert truth.joint(found.assignment)[0] <= limit
    assert budget.cost(found.assignment) <= 1.02 * best
    assert len(found.measured.fitness) < 70


def test_a_wrong_scale_is_corrected_by_what_is_measured(space, every):
    truth, base = additive(), additive()
    wrong = search.Prediction(3.0, 7 * base.linear, base.gram)
    budget, found = run(space, "bitops", truth, wrong)
    best, _ = optimum(space, budget, truth, every, "0.5dB-of-g32")
    assert budget.cost(found.assignment) <= 1.01 * best


def test_a_misleading_prediction_never_leaves_the_error(space, every):
    rng = np.random.default_rng(5)
    wrong = search.Prediction(0.0, rng.random((NUM_LAYERS, 4)), 0 * additive().gram)
    truth = additive()
    budget, found = run(space, "bitops", truth, wrong)
    limit = found.report["error_limit"]
    assert truth.joint(found.assignment)[0] <= limit
    assert budget.cost(found.assignment) <= budget.cost(Within("0dB-of-g32").reference(space))
    inside = found.measured.fitness <= limit
    assert budget.cost(found.assignment) == found.measured.cost[inside].min()


def test_what_a_few_batches_let_pass_is_verified_on_all(space):
    truth = additive()

    class Noisy:
        """Errors on a few batches are off by up to 6 %; on all they are exact."""

        def __call__(self, rows, batches):
            exact = truth.joint(rows)
            if len(batches) == 8:
                return exact
            shares = [np.random.default_rng(row.astype(np.uint8)).uniform(-1, 1) for row in rows]
            return exact * (1 + 0.06 * np.array(shares))

    budget = whole_cost("bitops", space, search.named_costs())
    within = Within("0.5dB-of-g32")
    found = search.cheapest(
        space, budget, Noisy(), lambda base: truth, within=within, num_batches=8, seed=0
    )
    limit = truth.joint(within.reference(space))[0] * within.factor
    assert truth.joint(found.assignment)[0] <= limit
    assert found.report["finalists"][-1]["assignment"] == found.assignment.tolist()
    assert any(one["fitness"] > limit for one in found.report["finalists"][:-1])


def test_what_no_choice_reaches_is_refused_with_the_least_error(space):
    with pytest.raises(ValueError, match=r"'-30dB-of-g32' is out of reach: the least error .* -\d"):
        run(space, "bitops", additive(), within="-30dB-of-g32")


def test_a_stopped_search_measures_nothing_twice(space, tmp_path):
    truth = quadratic(1.0)
    _, whole = run(space, "bitops", truth)

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
        run(space, "bitops", Dying(), truth, journal=search.Journal(store))
    counted = []

    class Counting:
        def joint(self, rows):
            counted.append(len(rows))
            return truth.joint(rows)

    with Store(tmp_path / "state", {}) as store:
        _, again = run(space, "bitops", Counting(), truth, journal=search.Journal(store))
    assert again.report == whole.report
    assert again.assignment.tolist() == whole.assignment.tolist()
    # Two steps were saved before it stopped.
    uninterrupted = []

    class All:
        def joint(self, rows):
            uninterrupted.append(len(rows))
            return truth.joint(rows)

    run(space, "bitops", All(), truth)
    assert counted == uninterrupted[2:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5-of-g128", "within='0.5-of-g128' cannot be read; write a number of decibels"),
        ("0.5dB", "cannot be read"),
        ("dB-of-g8", "cannot be read"),
    ],
)
def test_an_error_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Cheapest(within=text)


def test_a_reference_that_is_not_a_choice_and_a_cost_that_is_none_are_named(space):
    costs = search.named_costs()
    with pytest.raises(ValueError, match=r"needs the choice w4a8 g128, which .* has not; offer it"):
        Cheapest("bytes").budget_of("bytes", space, costs)
    with pytest.raises(ValueError, match="minimize='speed' is not a cost's name: use one of"):
        Cheapest("speed", "1dB-of-g8").budget_of("speed", space, costs)
    with pytest.raises(ValueError, match="a cost that is minimized has no limit"):
        Cheapest("bytes", "1dB-of-g8").budget_of("bytes=5M", space, costs)


def test_the_reference_has_the_first_transform_and_rank():
    beside = {"transforms": ("none", "hadamard"), "ranks": (0, 2)}
    space = small_space(small_model()[1], **beside)
    reference = Within("0.5dB-of-g16").reference(space)
    assert reference.tolist() == search.uniform_assignment(space, 16).tolist()
    chosen = search.specs_of(space, reference).values()
    assert {search.describe(spec) for spec in chosen} == {"w4a8 g16"}


def test_a_search_of_a_network_keeps_to_the_error(tmp_path):
    checkpoint = qdit.Checkpoint(*small_model())
    strategy = Cheapest("bytes", "1dB-of-g16", CheapestSettings(num_gate=3, num_rounds=1))
    options = {
        "strategy": strategy,
        "space": {"group_sizes": (8, 16, 64), "weight_bits": (4, 5)},
        "rollouts": Rollouts(
            num_steps=2, num_batches=2, batch_size=2, num_calibration=1, state=tmp_path / "state"
        ),
    }
    told = Told()
    found = search.search(checkpoint, jax.random.key(0), progress_fn=told.tell, **options)
    report, measured = found.history["report"], found.history["measured"]
    chosen = next(r for r in measured if r["assignment"] == found.assignment.tolist())
    assert chosen["fitness"] <= report["error_limit"]
    inside = [r["cost"] for r in measured if r["fitness"] <= report["error_limit"]]
    assert chosen["cost"] == min(inside) <= report["reference_cost"]
    assert any("cheapest within the error" in text for text in told.texts)
    again = search.search(checkpoint, jax.random.key(0), **options)
    assert again.history["measured"] == measured
    with pytest.raises(ValueError, match="measures nothing, but this strategy needs"):
        search.search(checkpoint, jax.random.key(0), objective="predicted", **options)
