"""Packed codes come back, in the bytes that the formula says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.quant import WeightSpec, packed_nbytes, packing, quantize

ROWS = (1, 33, 100, 288)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_come_back_for_any_number_of_rows(bits):
    rng = np.random.default_rng(bits)
    for rows in ROWS:
        codes = rng.integers(0, 2**bits, (2, rows, 5)).astype(np.uint8)
        packed = jax.jit(packing.pack, static_argnums=1)(codes, bits)
        assert packed.shape == (2, packing.packed_rows(rows, bits), 5)
        restored = jax.jit(packing.unpack, static_argnums=(1, 2))(packed, bits, rows)
        np.testing.assert_array_equal(restored, codes)


@pytest.mark.parametrize(("bits", "planes"), [(2, [2]), (3, [2, 1]), (6, [4, 2]), (7, [4, 2, 1])])
def test_rows_are_the_bits_rounded_up_to_bytes(bits, planes):
    for rows in ROWS:
        assert packing.packed_rows(rows, bits) == sum(-(-rows * p // 8) for p in planes)


def test_neighboring_sub_blocks_of_32_rows_share_bytes():
    codes = jnp.arange(128, dtype=jnp.uint8)[:, None] // 32 + 1  # 1, 2, 3, 4 by sub-block
    np.testing.assert_array_equal(packing.pack(codes, 4)[:, 0], [0x21] * 32 + [0x43] * 32)
    np.testing.assert_array_equal(packing.pack(codes - 1, 2)[:, 0], [0b11100100] * 32)


def test_bits_out_of_range_are_named():
    with pytest.raises(ValueError, match="bits=9 cannot be packed"):
        packing.planes(9)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_held_equal_the_formula(bits, symmetric):
    for rows, group_size, dtype in (
        (100, 32, "float16"),
        (130, 0, "float32"),
    ):
        spec = WeightSpec(bits, group_size, symmetric, scale_dtype=dtype)
        q = jax.eval_shape(lambda w, spec=spec: quantize(w, spec), jnp.ones((rows, 6)))
        assert q.nbytes == packed_nbytes(rows, 6, spec)


def test_675_million_weights_in_4_bits_take_351_megabytes():
    spec = WeightSpec(bits=4, group_size=128, scale_dtype="float16")
    total = sum(
        count * packed_nbytes(rows, width, spec)
        for count, rows, width in (
            (28, 1152, 3456),
            (28, 1152, 1152),
            (28, 1152, 4608),
            (28, 4608, 1152),
            (29, 1152, 6912),
        )
    )
    weights = 28 * (1152 * (3456 + 1152 + 2 * 4608)) + 29 * 1152 * 6912
    assert total / weights * 675e6 == pytest.approx(351e6, rel=0.01)
