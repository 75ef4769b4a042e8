"""Times of calls, taken in turn so that a machine that slows down slows all of them.

Dimensions: C calls, R rounds.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

LEAST_SECONDS = 10e-3  # of one timing; shorter calls are repeated until they take as long
MOST_REPEATS = 200
LEAST_ROUNDS = 6  # of which the sign test makes an interval of 95 %
LEVEL = 0.95


class Call(NamedTuple):
    """Something to time: its name, and a function that runs it and returns its arrays."""

    name: str
    run: Callable[[], object]


# (calls, number of rounds) -> seconds of every call in every round, `[C, R]`.
TimeFn = Callable[[Sequence[Call], int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Taken:
    """A median with the ends of its 95 % interval, and how many values it is of."""

    median: float
    low: float
    high: float
    count: int


def interleaved(
    calls: Sequence[Call],
    num_rounds: int,
    *,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> Float[np.ndarray, "C R"]:
    """Returns the seconds of every call in every round: A B A B, after two runs of each.

    A call shorter than `LEAST_SECONDS` runs several times per round; the median of these counts, which
    other processes of a shared machine disturb less than the mean.

    Args:
        num_rounds: the most rounds.
        seconds: per call. When the rounds have taken as long for all calls together, no further one begins;
            but `LEAST_ROUNDS` are always taken, or `num_rounds` if that is fewer.
    """
    repeats = []
    for call in calls:
        jax.block_until_ready(call.run())  # warms up
        repeats.append(repeats_of(seconds_of(call, clock)))
    rounds: list[list[float]] = []
    end = clock() + seconds * len(calls)
    while len(rounds) < num_rounds and (len(rounds) < LEAST_ROUNDS or clock() < end):
        each = (
            [seconds_of(c, clock) for _ in range(n)] for c, n in zip(calls, repeats, strict=True)
        )
        rounds.append([float(np.median(runs)) for runs in each])
    return np.array(rounds).T


def seconds_of(call: Call, clock: Callable[[], float]) -> float:
    """Returns how long a call takes until its arrays are there."""
    began = clock()
    jax.block_until_ready(call.run())
    return clock() - began


def repeats_of(seconds: float) -> int:
    """Returns how often a call of that length runs per timing."""
    return int(min(MOST_REPEATS, max(1, math.ceil(LEAST_SECONDS / max(seconds, 1e-9)))))


def taken(values: Float[np.ndarray, " R"]) -> Taken:
    """Returns the median of values with its interval, which assumes nothing about their spread.

    The interval's ends are values themselves: the median lies outside only if too many values fell
    on one side, and the binomial distribution says how often that happens. Fewer than 6 values
    cannot give 95 %; theirs is from the least to the greatest.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    count = len(ordered)
    cut, tail = 0, 0.5**count  # the chance that no value lies below the median
    while cut < (count - 1) // 2:
        tail += math.comb(count, cut + 1) * 0.5**count
        if 2 * tail > 1 - LEVEL:
            break
        cut += 1
    low, high = float(ordered[cut]), float(ordered[count - 1 - cut])
    return Taken(float(np.median(ordered)), low, high, count)


def ratio(seconds: Float[np.ndarray, " R"], base: Float[np.ndarray, " R"]) -> Taken:
    """Returns the ratio of two calls' times, round by round."""
    return taken(np.asarray(seconds) / np.asarray(base))
