"""Hadamard matrices: orthogonal, with entries of one size, so that they spread an outlier evenly.

Two kinds. The *regular* ones of ConvRot (arXiv:2512.03673) have rows of equal sum, so that a large
mean makes no new outlier; they exist for powers of 4. Those of QuaRot (arXiv:2404.00456) exist for
`m * 2**k` with m of 1, 12, 20, 28, 36: Sylvester's construction times a matrix of Paley's.
"""

from __future__ import annotations

from functools import cache, reduce

import numpy as np
from scipy.linalg import hadamard as sylvester

REGULAR_4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
WHOLE = 256  # the largest order that is multiplied as one matrix
# Order -> (the prime q, Paley's first or second construction).
PALEY = {12: (11, 1), 20: (19, 1), 28: (13, 2), 36: (17, 2)}


def regular_size(num_channels: int, largest: int = 256) -> int:
    """Returns the largest power of 4, at most `largest`, that divides `num_channels`."""
    size = 1
    while num_channels % (4 * size) == 0 and 4 * size <= largest:
        size *= 4
    return size


def whole_size(num_channels: int) -> int:
    """Returns the largest order of a Hadamard matrix known here that divides `num_channels`."""
    power = num_channels & -num_channels
    orders = [
        m * (power // 4) for m in PALEY if power >= 4 and num_channels % (m * power // 4) == 0
    ]
    return max([power, *orders])


@cache
def factors(kind: str, size: int) -> tuple[np.ndarray, ...]:
    """Returns orthonormal float32 matrices whose Kronecker product is the matrix of order `size`.

    As few as there can be of orders up to `WHOLE`: more of smaller ones are fewer operations, but each is
    a pass over memory.

    Args:
        kind: `"regular"` or `"hadamard"`.

    Raises:
        ValueError: if there is no such matrix.
    """
    if kind == "regular":
        count = (size.bit_length() - 1) // 2
        if size != 4**count:
            raise ValueError(f"size={size} of a regular Hadamard matrix must be a power of 4.")
        found = [kronecker_power(REGULAR_4, n) for n in split_power(count, 4)]
    elif kind == "hadamard":
        power = size & -size
        if size == power:
            found = powers_of_two(power)
        elif 4 * (size // power) in PALEY and power >= 4:
            found = [paley(4 * (size // power)), *powers_of_two(power // 4)]
        else:
            raise ValueError(
                f"size={size}: Hadamard matrices are known here for m * 2**k with m of 1, "
                f"{', '.join(map(str, PALEY))}."
            )
    else:
        raise ValueError(f"kind={kind!r} is not known; use 'regular' or 'hadamard'.")
    return tuple((m / np.sqrt(len(m))).astype(np.float32) for m in found)


def powers_of_two(power: int) -> list[np.ndarray]:
    """Returns Sylvester's matrices whose Kronecker product is that of order `power`, entries 1 and -1."""
    return [sylvester(2**n) for n in split_power(power.bit_length() - 1, 2)]


def split_power(exponent: int, base: int) -> list[int]:
    """Returns exponents of `base`, about equal, whose powers are at most `WHOLE` and multiply to the whole."""
    most = next(n for n in range(exponent, -1, -1) if base**n <= WHOLE)
    count = -(-exponent // max(most, 1)) or 1
    return [exponent // count + (index < exponent % count) for index in range(count)]


def kronecker_power(matrix: np.ndarray, exponent: int) -> np.ndarray:
    """Returns the Kronecker product of `exponent` times a matrix."""
    return reduce(np.kron, [matrix] * exponent, np.eye(1, dtype=int))


def paley(order: int) -> np.ndarray:
    """Returns Paley's Hadamard matrix of an order in `PALEY`, entries 1 and -1."""
    q, construction = PALEY[order]
    squares = {i * i % q for i in range(1, q)}
    character = np.array([0, *(1 if i in squares else -1 for i in range(1, q))])
    jacobsthal = character[(np.arange(q)[:, None] - np.arange(q)) % q]  # [q, q]
    sign = -1 if construction == 1 else 1
    core = np.block([[np.zeros((1, 1)), np.ones((1, q))], [sign * np.ones((q, 1)), jacobsthal]])
    if construction == 1:
        return (core + np.eye(q + 1)).astype(int)
    return (np.kron(core, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])).astype(
        int
    )
