"""Times taken in turn, on a clock that moves only when a call runs."""

import numpy as np
import pytest

from qdit_jax.speed import Call, interleaved, ratio, taken


class Machine:
    """A clock, and calls that move it; its speed may change between runs."""

    def __init__(self):
        self.now, self.order, self.slowness = 0.0, [], 1.0

    def call(self, name, seconds):
        def run():
            self.order.append(name)
            self.now += seconds * self.slowness
            return np.zeros(1)

        return Call(name, run)


def test_calls_take_turns_after_two_runs_of_each():
    machine = Machine()
    calls = [machine.call("a", 0.5), machine.call("b", 0.25)]
    found = interleaved(calls, 3, clock=lambda: machine.now)
    assert machine.order == list("aabb" + "ab" * 3)
    np.testing.assert_allclose(found, [[0.5] * 3, [0.25] * 3])


def test_short_calls_are_repeated_and_what_disturbs_a_few_does_not_count():
    machine = Machine()
    call = machine.call("a", 1e-3)

    def disturbed():
        machine.now += 0.5 * (len(machine.order) % 5 == 3)
        return call.run()

    found = interleaved([Call("a", disturbed)], 2, clock=lambda: machine.now)
    assert len(machine.order) == 2 + 2 * 10
    np.testing.assert_allclose(found, [[1e-3] * 2])


@pytest.mark.parametrize(("seconds", "count"), [(0.1, 6), (5.0, 7), (6.0, 8), (100.0, 21)])
def test_slow_calls_have_fewer_rounds_but_enough_for_an_interval(seconds, count):
    machine = Machine()
    calls = [machine.call("a", 1.0), machine.call("b", 0.5)]
    found = interleaved(calls, 21, seconds=seconds, clock=lambda: machine.now)
    assert found.shape == (2, count)
    fewest = interleaved(calls, 3, seconds=seconds, clock=lambda: machine.now)
    assert fewest.shape == (2, 3)


def test_ratios_do_not_depend_on_how_fast_the_machine_is():
    machine = Machine()

    def slower():
        machine.slowness *= 1.5
        return np.zeros(1)

    calls = [machine.call("a", 1.0), machine.call("b", 2.0), Call("c", slower)]
    a, b, _ = interleaved(calls, 7, clock=lambda: machine.now)
    assert a[-1] > 5 * a[0]
    found = ratio(b, a)
    assert (found.median, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


@pytest.mark.parametrize(
    ("count", "cut"), [(3, 0), (5, 0), (6, 0), (8, 0), (9, 1), (15, 3), (21, 5)]
)
def test_an_interval_has_the_ends_of_the_sign_test(count, cut):
    found = taken(np.random.default_rng(count).permutation(count).astype(float))
    assert (found.low, found.high) == (cut, count - 1 - cut)
    assert (found.median, found.count) == ((count - 1) / 2, count)


def test_an_interval_holds_the_median_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = [taken(row) for row in rng.exponential(size=(2000, 15))]
    inside = np.mean([one.low <= np.log(2) <= one.high for one in draws])
    assert 0.95 <= inside <= 0.98
