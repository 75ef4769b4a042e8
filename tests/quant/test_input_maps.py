"""Leaves that change a layer's input coordinates, and the matrices that they are made of."""

from __future__ import annotations

from functools import reduce

import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.quant import InputMap, LowRank, Rotation, regular_size, whole_size
from qdit_jax.quant.hadamard import PALEY, factors, paley

# K -> (the largest regular block, the largest Hadamard block)
SIZES = {
    128: (64, 128),
    1152: (64, 1152),
    4608: (256, 4608),
    768: (256, 768),
    2240: (64, 448),
    2432: (64, 128),
    36: (4, 36),
    12: (4, 12),
    7: (1, 1),
}


@pytest.mark.parametrize("order", PALEY)
def test_paley_s_matrices_are_hadamard_matrices(order):
    matrix = paley(order)
    np.testing.assert_array_equal(np.abs(matrix), 1)
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize("num_channels", SIZES)
def test_blocks_are_the_largest_that_divide(num_channels):
    assert (regular_size(num_channels), whole_size(num_channels)) == SIZES[num_channels]


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_rows_of_a_regular_matrix_have_one_sum(size):
    matrix = reduce(np.kron, factors("regular", size)).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
    np.testing.assert_allclose(matrix, matrix.T)
    np.testing.assert_allclose(matrix.sum(1), np.ones(size), rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "size", "orders"),
    [
        ("regular", 1, [1]),
        ("regular", 256, [256]),
        ("regular", 1024, [64, 16]),
        ("hadamard", 4096, [64, 64]),
        ("hadamard", 1152, [36, 32]),
        ("hadamard", 12288, [12, 32, 32]),
    ],
)
def test_matrices_are_as_few_as_memory_likes(kind, size, orders):
    found = factors(kind, size)
    assert [len(matrix) for matrix in found] == orders
    for matrix in found:
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-5)


@pytest.mark.parametrize(("kind", "size", "width"), [
    ("regular", 16, 48), ("hadamard", 36, 36), ("hadamard", 96, 192), ("hadamard", 8, 8),
    ("regular", 1024, 1024), ("hadamard", 512, 1024),
])  # fmt: skip
@pytest.mark.parametrize("signed", [False, True])
def test_a_rotation_is_the_product_with_its_matrix(kind, size, width, signed):
    rng = np.random.default_rng(size)
    x, w = rng.standard_normal((3, 5, width)), rng.standard_normal((width, 7))
    x[..., 3] *= 50  # an outlier channel
    signs = rng.choice([-1, 1], width).astype(np.int8) if signed else None
    matrix = np.kron(np.eye(width // size), reduce(np.kron, factors(kind, size)))
    matrix = matrix * (1 if signs is None else signs[:, None])
    rotation = Rotation(kind, size, None if signs is None else jnp.asarray(signs))
    turned = rotation(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(turned, x @ matrix, rtol=1e-4, atol=1e-4)
    kernel = rotation.of_kernel(jnp.asarray(w, jnp.float32))
    np.testing.assert_allclose(kernel, matrix.T @ w, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(turned @ kernel, x @ w, rtol=1e-4, atol=5e-4)
    assert rotation(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_dense_rotation_has_a_matrix_per_block():
    rng = np.random.default_rng(0)
    blocks = np.linalg.qr(rng.standard_normal((2, 4, 4)))[0].astype(np.float32)
    x = rng.standard_normal((3, 8)).astype(np.float32)
    turned = Rotation("dense", 4, matrix=jnp.asarray(blocks))(jnp.asarray(x))
    expected = np.concatenate([x[:, :4] @ blocks[0], x[:, 4:] @ blocks[1]], axis=1)
    np.testing.assert_allclose(turned, expected, rtol=1e-5, atol=1e-5)


def test_what_is_no_rotation_is_refused_by_name():
    x = jnp.ones((2, 6))
    with pytest.raises(ValueError, match="size=4 of a rotation does not divide 6 channels"):
        Rotation("regular", 4)(x)
    with pytest.raises(ValueError, match=r"size=2 of a regular .* power of 4"):
        Rotation("regular", 2)(x)
    with pytest.raises(ValueError, match="size=6: Hadamard matrices are known here"):
        Rotation("hadamard", 6)(x)
    with pytest.raises(ValueError, match="kind='fourier' is not known"):
        Rotation("fourier", 2)(x)


def test_an_input_map_shifts_then_scales_in_the_input_s_dtype():
    x = jnp.asarray([[1.0, -2.0, 3.0]])
    scale, shift = jnp.asarray([2.0, 4.0, 0.5]), jnp.asarray([1.0, 0.0, -1.0])
    found = InputMap(1 / scale, shift)(x)
    np.testing.assert_allclose(found, [[0.0, -0.5, 8.0]])
    np.testing.assert_allclose(InputMap(1 / scale)(x), [[0.5, -0.5, 6.0]])
    assert InputMap(1 / scale, shift)(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_branch_multiplies_and_a_subspace_takes_its_part_off():
    rng = np.random.default_rng(1)
    down = np.linalg.qr(rng.standard_normal((8, 3)))[0].astype(np.float32)
    up, x = (rng.standard_normal(s).astype(np.float32) for s in ((3, 5), (4, 8)))
    branch = LowRank(jnp.asarray(down), jnp.asarray(up))
    np.testing.assert_allclose(branch(jnp.asarray(x)), x @ down @ up, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(branch.rest(jnp.asarray(x)), x)
    rest = LowRank(jnp.asarray(down), jnp.asarray(up), subspace=True).rest(jnp.asarray(x))
    np.testing.assert_allclose(rest @ down, np.zeros((4, 3)), atol=1e-5)
    np.testing.assert_allclose(rest + x @ down @ down.T, x, rtol=1e-5, atol=1e-5)
