"""Precision and recall by k-nearest-neighbor manifolds (arXiv:1904.06991), in blocks.

Dimensions: N reference samples, M other samples, D features (E must equal D),
R rows of a block, J blocks of S rows.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from qdit_jax.metrics.arrays import check_same_width, feature_rows
from qdit_jax.types import AnyArray

BLOCK_ROWS = 2048
ROUNDING = 16 * float(np.finfo(np.float64).eps)


def precision_and_recall(
    reference: Float[AnyArray, "..."],
    samples: Float[AnyArray, "..."],
    *,
    k: int = 3,
    block_rows: int = BLOCK_ROWS,
) -> tuple[float, float]:
    """Returns precision and recall of `samples` `[M, D]` against `reference` `[N, D]`.

    Precision is the share of samples inside the manifold of the reference; recall is the converse.

    A set's manifold is the union of balls around its members that reach their k-th neighbor;
    a point on the boundary is inside. Memory beyond the inputs is a few blocks of
    `block_rows` squared. Distances are float64's.

    Raises:
        ValueError: if a set has k samples or fewer, holds NaN or infinity, or is not `[N, D]`, or
            the numbers of features differ.
    """
    reference, samples = common_origin(reference, samples)
    reference_radii = manifold_radii(reference, k=k, block_rows=block_rows)
    sample_radii = manifold_radii(samples, k=k, block_rows=block_rows)
    precision = inside(samples, reference, reference_radii, block_rows=block_rows).mean()
    recall = inside(reference, samples, sample_radii, block_rows=block_rows).mean()
    return float(precision), float(recall)


def common_origin(
    reference: Float[AnyArray, "..."], samples: Float[AnyArray, "..."]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns both sets in float64, shifted by the reference's mean.

    Distances stay; their rounding, which grows with the distance from the origin, shrinks.
    """
    reference = feature_rows("reference", reference)
    samples = feature_rows("samples", samples)
    check_same_width(reference, samples)
    center = reference.mean(0)
    return reference - center, samples - center


def manifold_radii(
    features: Float[AnyArray, "..."], *, k: int = 3, block_rows: int = BLOCK_ROWS
) -> Float[np.ndarray, " N"]:
    """Returns the *squared* distance from every sample of `[N, D]` to its k-th nearest neighbor.

    Raises:
        ValueError: if there are not more than k samples, or they are not finite or not `[N, D]`.
    """
    features = feature_rows("features", features)
    if k < 1 or len(features) <= k:
        raise ValueError(
            f"{len(features)} samples have no neighbor number k={k}; use more samples."
        )
    with jax.enable_x64(True):
        blocks, valid = blocked(features, block_rows)
        # The nearest "neighbor" of a sample is itself, hence k + 1.
        rows = [np.asarray(nearest(rows, blocks, valid, k=k + 1)[:, -1]) for rows in blocks]
    return np.concatenate(rows)[: len(features)]


def inside(
    points: Float[AnyArray, "M D"],
    centers: Float[AnyArray, "N D"],
    radii: Float[AnyArray, " N"],
    *,
    block_rows: int = BLOCK_ROWS,
) -> Bool[np.ndarray, " M"]:
    """Returns whether each point lies in any ball; `radii` are squared."""
    with jax.enable_x64(True):
        blocks, valid = blocked(centers, block_rows)
        # A padded center gets a radius that nothing is inside of.
        padded = np.full(valid.size, -np.inf)  # [J S]
        padded[: len(radii)] = radii
        limits = jnp.asarray(padded).reshape(valid.shape)
        rows = [
            np.asarray(covered(rows, blocks, limits)) for rows in blocked(points, block_rows)[0]
        ]
    return np.concatenate(rows)[: len(points)]


def blocked(
    x: Float[AnyArray, "N D"], block_rows: int
) -> tuple[Float[Array, "J S D"], Bool[Array, "J S"]]:
    """Returns `x` cut into blocks, the last one padded, and which rows are real."""
    count, width = x.shape
    size = min(block_rows, count)
    num_blocks = -(-count // size)
    padded = np.zeros((num_blocks * size, width))
    padded[:count] = x
    valid = np.arange(num_blocks * size) < count
    return jnp.asarray(padded).reshape(-1, size, width), jnp.asarray(valid).reshape(-1, size)


def squared_distances(
    a: Float[Array, "R D"], b: Float[Array, "S D"]
) -> tuple[Float[Array, "R S"], Float[Array, "R S"]]:
    """Returns all squared distances between two blocks, never below zero, and their rounding.

    The three terms cancel: 1e-3 apart and 11 from the origin, float32 would leave nothing of a
    distance. What is within float64's rounding of 0 is 0.
    """
    dots = jnp.dot(a, b.T, precision=jax.lax.Precision.HIGHEST)  # [R, S]
    norms = [jnp.square(x).sum(-1) for x in (a, b)]  # [R], [S]
    total = norms[0][:, None] + norms[1]  # [R, S]; rounding of the difference grows with it
    squared, rounding = total - 2 * dots, ROUNDING * total
    return jnp.where(squared > rounding, squared, 0), rounding


@partial(jax.jit, static_argnames=("k",))
def nearest(
    rows: Float[Array, "R D"], blocks: Float[Array, "J S D"], valid: Bool[Array, "J S"], *, k: int
) -> Float[Array, "R k"]:
    """Returns each row's k smallest squared distances to the valid rows of all blocks, ascending."""

    def closer(best, block):
        # `best [R, k]` and the block's distances `[R, S]`: memory stays that of one block.
        distances = jnp.where(block[1], squared_distances(rows, block[0])[0], jnp.inf)
        candidates = jnp.concatenate([best, distances], axis=1)  # [R, k + S]
        # `top_k` takes the largest, hence the signs.
        return -jax.lax.top_k(-candidates, k)[0], None

    start = jnp.full((rows.shape[0], k), jnp.inf, rows.dtype)
    return jax.lax.scan(closer, start, (blocks, valid))[0]


@jax.jit
def covered(
    rows: Float[Array, "R D"], blocks: Float[Array, "J S D"], radii: Float[Array, "J S"]
) -> Bool[Array, " R"]:
    """Returns whether each row lies in any ball around the rows of all blocks."""

    def either(found, block):
        # A point on a boundary is inside: rounding depends on which side is `a`.
        squared, rounding = squared_distances(rows, block[0])
        return found | (squared - rounding <= block[1]).any(1), None

    return jax.lax.scan(either, jnp.zeros(rows.shape[0], bool), (blocks, radii))[0]
