"""Low-rank branches in 16 bits beside a quantized kernel, from its weights or from its inputs.

Dimensions: M rows, K input channels, N output channels, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
from jaxtyping import Float

from qdit_jax.methods.input_transforms import sixteen_bits
from qdit_jax.methods.scoring import rounded_kernel, rounded_rows
from qdit_jax.quant import LowRank
from qdit_jax.recipes import LayerSpec

# `(kernel [K, N], rows fitted to [M, K], held-out rows, spec) -> branch`; None to have none. Rows and
# kernel are in the coordinates of the layer's input transform.
BranchFn = Callable[[np.ndarray, np.ndarray, np.ndarray, LayerSpec], LowRank | None]
# The shape of a kernel -> the rank of its branch.
RankFn = Callable[[tuple[int, ...]], int]
LARGEST_RANK, CHANNELS_PER_RANK = 32, 32
WHOLE_SVD = 512  # what has fewer channels on one side is decomposed whole


def published_rank(shape: tuple[int, ...]) -> int:
    """Returns 32, as published for kernels of 1024 channels and more; less in proportion below.

    In a kernel of 128 channels, a rank of 32 would take twice the bytes of its 4-bit codes.
    """
    return max(1, min(LARGEST_RANK, min(shape) // CHANNELS_PER_RANK))


def weight_branch(rank_fn: RankFn = published_rank, iterations: int = 4) -> BranchFn:
    """Returns the rule of SVDQuant: what a truncated SVD of the kernel holds.

    The next decomposition is of the kernel without its rounded rest, as long as the output error on
    the held-out rows falls, `iterations` times at most.
    """

    def branch(
        kernel: np.ndarray, rows: np.ndarray, held_out: np.ndarray, spec: LayerSpec
    ) -> LowRank | None:
        size = rank_fn(kernel.shape)
        rest, best, least = np.zeros_like(kernel), None, np.inf
        for _ in range(iterations):
            down, up = truncated_svd(kernel - rest, size)
            found = LowRank(sixteen_bits(down), sixteen_bits(up))
            rest = np.asarray(rounded_kernel(jnp.asarray(kernel - product_of(found)), spec.weight))
            error = branch_error(kernel, found, held_out, spec)
            if not error < least:
                break
            best, least = found, error
        return best

    return branch


def input_branch(rank_fn: RankFn = published_rank) -> BranchFn:
    """Returns the rule of DiRotQ in its cheap form: the directions in which inputs vary most.

    What of the input lies in them is multiplied in 16 bits, and only the rest is quantized.
    """

    def branch(
        kernel: np.ndarray, rows: np.ndarray, held_out: np.ndarray, spec: LayerSpec
    ) -> LowRank | None:
        size = rank_fn(kernel.shape)
        stored = sixteen_bits(leading_directions(rows.T.astype(np.float64) @ rows, size))
        up = np.asarray(stored, np.float32).T @ kernel
        return LowRank(stored, sixteen_bits(up), subspace=True)

    return branch


def closest_branch(*rules: BranchFn) -> BranchFn:
    """Returns the rule that takes whichever branch of `rules` leaves the least error on held-out rows."""

    def branch(
        kernel: np.ndarray, rows: np.ndarray, held_out: np.ndarray, spec: LayerSpec
    ) -> LowRank | None:
        made = (rule(kernel, rows, held_out, spec) for rule in rules)
        found = [each for each in made if each is not None]
        if len(found) < 2:
            return found[0] if found else None
        return min(found, key=lambda each: branch_error(kernel, each, held_out, spec))

    return branch


def is_worth(
    branch: LowRank | None,
    share: float,
    kernel: Float[np.ndarray, "K N"],
    rows: Float[np.ndarray, "M K"],
    spec: LayerSpec,
) -> bool:
    """Returns whether there is a branch that lowers the squared output error on `rows` to that share."""
    if branch is None:
        return False
    whole = branch_error(kernel, None, rows, spec)
    return branch_error(kernel, branch, rows, spec) <= share * whole


def truncated_svd(matrix: Float[np.ndarray, "K N"], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `[K, R]` and `[R, N]` whose product is the best approximation of that rank."""
    if min(matrix.shape) <= max(WHOLE_SVD, rank + 1):
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
    else:
        start = np.ones(min(matrix.shape), matrix.dtype)  # so that the result is the same each time
        u, s, v = scipy.sparse.linalg.svds(matrix, rank, v0=start)
    largest = np.argsort(-s)[:rank]
    root = np.sqrt(s[largest])
    return u[:, largest] * root, root[:, None] * v[largest]


def leading_directions(covariance: Float[np.ndarray, "K K"], count: int) -> np.ndarray:
    """Returns the eigenvectors `[K, count]` of the greatest eigenvalues, the greatest first."""
    if len(covariance) <= max(WHOLE_SVD, count + 1):
        vectors = np.linalg.eigh(covariance)[1]
    else:
        start = np.ones(len(covariance))  # so that the result is the same each time
        _, vectors = scipy.sparse.linalg.eigsh(covariance, count, v0=start)
    return vectors[:, ::-1][:, :count].astype(np.float32)


def product_of(branch: LowRank) -> Float[np.ndarray, "K N"]:
    """Returns the product of a branch as stored, in float32."""
    down, up = (np.asarray(a, np.float32) for a in (branch.down, branch.up))
    return down @ up


def with_folds(
    branch: LowRank | None, before: Float[np.ndarray, "K N"], after: Float[np.ndarray, "K N"]
) -> LowRank | None:
    """Returns a branch of the kernel `before` for the kernel `after`, whose columns are multiples.

    A fold into a layer's outputs multiplies columns of its kernel.
    """
    if branch is None or np.array_equal(before, after):
        return branch
    power = np.square(before).sum(axis=0)
    factor = np.where(power > 0, (before * after).sum(axis=0) / np.maximum(power, 1e-30), 1.0)
    up = np.asarray(branch.up, np.float32) * factor.astype(np.float32)
    return dataclasses.replace(branch, up=sixteen_bits(up))


def branch_error(
    kernel: Float[np.ndarray, "K N"],
    branch: LowRank | None,
    rows: Float[np.ndarray, "M K"],
    spec: LayerSpec,
) -> float:
    """Returns the squared error of the output on `rows`, with the kernel less its branch rounded."""
    x = jnp.asarray(rows)
    if branch is None:
        found = rounded_rows(x, spec.act) @ rounded_kernel(jnp.asarray(kernel), spec.weight)
    else:
        rest = rounded_kernel(jnp.asarray(kernel - product_of(branch)), spec.weight)
        found = rounded_rows(branch.rest(x), spec.act) @ rest + branch(x)
    return float(jnp.sum(jnp.square(found - x @ kernel)))
