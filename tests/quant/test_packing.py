"""Packed codes come back, in the bytes that the formula says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.quant import WeightSpec, packed_nbytes, packing, quantize

COUNTS = (1, 33, 100, 128, 288)


@pytest.mark.parametrize("bits", range(2, 9))
def test_any_number_of_codes_comes_back_with_jax_and_with_numpy(bits):
    rng = np.random.default_rng(bits)
    for count in COUNTS:
        codes = rng.integers(0, 2**bits, (2, 5, count)).astype(np.uint8)
        packed = jax.jit(packing.pack, static_argnums=1)(codes, bits)
        assert packed.shape == (2, 5, packing.packed_bytes(count, bits))
        restored = jax.jit(packing.unpack, static_argnums=(1, 2))(packed, bits, count)
        np.testing.assert_array_equal(restored, codes)
        on_host = packing.pack(codes, bits)
        assert isinstance(on_host, np.ndarray)
        np.testing.assert_array_equal(on_host, packed)
        np.testing.assert_array_equal(packing.unpack(on_host, bits, count), codes)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_slice_is_unpacked_from_the_bytes_of_its_runs(bits):
    rng = np.random.default_rng(bits)
    sliced = jax.jit(packing.unpack_slice, static_argnums=(1, 2, 4))
    for count, length in ((256, 128), (256, 64), (96, 96), (96, 32), (64, 16)):
        codes = rng.integers(0, 2**bits, (3, count)).astype(np.uint8)
        packed = packing.pack(codes, bits)
        assert packing.can_slice(count, length)
        for start in range(0, count, length):
            found = sliced(packed, bits, count, start, length)
            np.testing.assert_array_equal(found, codes[:, start : start + length])
    assert not packing.can_slice(256, 48)
    assert not packing.can_slice(48, 16)  # the bytes of the last codes are no whole run


@pytest.mark.parametrize(("bits", "planes"), [(2, [2]), (3, [2, 1]), (6, [4, 2]), (7, [4, 2, 1])])
def test_bytes_are_the_bits_rounded_up(bits, planes):
    for count in COUNTS:
        assert packing.packed_bytes(count, bits) == sum(-(-count * p // 8) for p in planes)


def test_a_byte_holds_codes_of_one_run_as_far_apart_as_its_plane_is_long():
    quarters = np.arange(128) // 32  # 0, 1, 2, 3
    np.testing.assert_array_equal(packing.pack(quarters + 1, 4), [0x31] * 32 + [0x42] * 32)
    np.testing.assert_array_equal(packing.pack(quarters, 2), [0b11100100] * 32)
    eighths = np.arange(32) // 4  # K is no multiple of 128: runs of 32
    np.testing.assert_array_equal(
        packing.pack(eighths, 4), [0x40] * 4 + [0x51] * 4 + [0x62] * 4 + [0x73] * 4
    )
    # With 3 bits the low two of the 32 codes come first, then their high bit.
    low, high = [0b10001000] * 4 + [0b11011101] * 4, [0b11110000] * 4
    np.testing.assert_array_equal(packing.pack(eighths, 3), low + high)
    # The shorter run after the last whole one: three codes in two bytes.
    np.testing.assert_array_equal(packing.pack(np.arange(35) % 16, 4)[16:], [0x20, 0x01])


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
