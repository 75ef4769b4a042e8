"""The Pallas kernel for NVIDIA GPUs, interpreted on CPU: the product of `xla`, by the same numbers.

The interpreter multiplies from shared memory, where a GPU multiplies from registers. What differs between
the two is held by itself: the arithmetic of words bit by bit, and the layouts that make one register both
a word and four operands.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted_gpu import needs_interpreter
from level_products import LEVELS, TOKEN, W, random_kernel, relative_errors, tokens

from qdit_jax.kernels import gpu_check, gpu_words, quantized_matmul
from qdit_jax.kernels.gpu_memory import word_layout
from qdit_jax.kernels.gpu_reasons import GPU_LEVELS
from qdit_jax.kernels.gpu_tiles import Tiles
from qdit_jax.kernels.units import of_units
from qdit_jax.quant import (
    ActQuant,
    ActSpec,
    dequantize,
    level_rows,
    levels,
    packing,
    quantize,
    with_codes,
)

SMALL = Tiles(rows=64, columns=64, steps=2)

# Weights, (M, K, N), the inputs' dtype and quantizer, blocks.
CASES = [
    (W(4, 32, **LEVELS), (9, 256, 20), "float32", TOKEN, SMALL),
    (W(4, 64, symmetric=True, **LEVELS), (70, 128, 130), "bfloat16", TOKEN, SMALL),
    (W(4, 0, **LEVELS), (8, 256, 8), "float32", ActSpec(4, 0, symmetric=True), Tiles(96, 64, 4)),
    (W(4, 0, symmetric=True), (7, 128, 1), "float32", TOKEN, Tiles(64, 128, 4)),
    (W(8, 0, symmetric=True), (40, 384, 9), "bfloat16", TOKEN, Tiles(192, 64, 2)),
    (W(8, 0, symmetric=True, scale_dtype="float16"), (8, 128, 9), "float32", TOKEN, Tiles()),
]


def interpreted(x, q, act=TOKEN, tiles=SMALL):
    from jax.experimental.pallas import mosaic_gpu

    parameters = mosaic_gpu.InterpretGPUParams()
    return GPU_LEVELS.run(x, q, ActQuant(act), "integer", tiles=tiles, interpret=parameters)


def kernel(weight, num_channels, width):
    """Returns any kernel of a spec."""
    return with_codes(*jax.tree.map(jnp.asarray, random_kernel(weight, num_channels, width)))


@needs_interpreter
@pytest.mark.parametrize(("weight", "sizes", "dtype", "act", "tiles"), CASES, ids=str)
def test_the_kernel_is_the_product_of_the_rounded_operands(weight, sizes, dtype, act, tiles):
    x, q = jnp.asarray(tokens(*sizes[:2]), dtype), kernel(weight, *sizes[1:])
    found = jax.jit(lambda x, q: interpreted(x, q, act, tiles))(x, q)
    assert (found.shape, found.dtype) == ((sizes[0], sizes[2]), dtype)
    # Not compiled together: XLA would divide by multiplying with the reciprocal, see `division`.
    wide = ActQuant(act)(x.astype(jnp.float32))
    ulp = {"float32": 2**-23, "bfloat16": 2**-8}[dtype]
    assert relative_errors(found, found, wide, dequantize(q))[0] < 4 * ulp


@needs_interpreter
def test_a_token_that_is_not_finite_is_nan_and_touches_no_other():
    x, q = tokens(12, 128), kernel(W(4, 32, **LEVELS), 128, 24)
    clean = interpreted(jnp.asarray(x, jnp.float32), q)
    x[6, 3], x[7, 60], x[8, 0], x[0, 5] = np.nan, np.inf, -np.inf, np.nan
    found = np.asarray(interpreted(jnp.asarray(x, jnp.float32), q))
    broken = [0, 6, 7, 8]
    assert np.isnan(found[broken]).all()
    np.testing.assert_array_equal(np.delete(found, broken, 0), np.delete(clean, broken, 0))


@needs_interpreter
def test_sums_are_written_in_16_bits_at_once():
    from jax.experimental.pallas import mosaic_gpu

    parameters = mosaic_gpu.InterpretGPUParams()
    x, q = jnp.asarray(tokens(8, 128), jnp.float32), kernel(W(8, 0, symmetric=True), 128, 8)
    settings = {"tiles": SMALL, "interpret": parameters}
    found = GPU_LEVELS.run(x, q, ActQuant(TOKEN), "integer", "bfloat16", **settings)
    by_xla = quantized_matmul(x, q, TOKEN, "integer", "xla", out_dtype="bfloat16")
    assert found.dtype == by_xla.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, by_xla)


@needs_interpreter
def test_the_check_of_a_device_passes_in_the_interpreter():
    def product(x, q, dtype):
        return interpreted(x.astype(jnp.float32), q).astype(dtype)

    assert gpu_check.wrong_with(product, gpu_check.LEVELS) is None


@needs_interpreter
def test_works_under_vmap_inside_of_scan():
    x = jnp.asarray(np.stack([tokens(8, 128), tokens(8, 128, 1)]), jnp.float32)
    w = np.random.default_rng(0).normal(size=(2, 128, 8)).astype(np.float32)
    q = jax.vmap(lambda w: quantize(w, W(4, 32, **LEVELS)))(jnp.asarray(w))

    @jax.jit
    def products(q):
        step = lambda _, q: (_, jax.vmap(lambda x: interpreted(x, q))(x))  # noqa: E731
        return jax.lax.scan(step, 0, q)[1]

    found = products(q)
    for index in range(2):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], q)
        by_xla = quantized_matmul(x, one, TOKEN, "integer", "xla")
        np.testing.assert_array_equal(found[index], by_xla)


@needs_interpreter
def test_the_derivative_is_that_of_xla():
    x, q = jnp.asarray(tokens(6, 128), jnp.float32), kernel(W(4, 32, **LEVELS), 128, 8)
    ours = jax.grad(lambda x: interpreted(x, q).sum())(x)
    by_xla = jax.grad(lambda x: quantized_matmul(x, q, TOKEN, "integer", "xla").sum())(x)
    np.testing.assert_array_equal(ours, by_xla)


@pytest.mark.parametrize("bits", gpu_words.BITS)
def test_words_hold_the_codes_of_packed_bytes(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 128)).astype(np.uint8)
    packed = packing.pack(codes, bits)
    for half in range(2):
        part = packed if bits == 4 else packed[:, 64 * half : 64 * half + 64]
        words = gpu_words.code_words(gpu_words.words_of(jnp.asarray(part)), bits, half)
        found = np.asarray(gpu_words.bytes_of(words)).view(np.uint8)
        np.testing.assert_array_equal(found, codes[:, 64 * half : 64 * half + 64])


def test_words_become_levels_for_every_code_step_and_offset():
    most = levels.greatest_step(4, symmetric=False)
    steps = [(s, o) for s in range(1, most + 1) for o in range(256 - 15 * s)]
    step, offset = (np.array(values, np.int32)[:, None] for values in zip(*steps, strict=True))
    codes = np.broadcast_to(np.arange(16, dtype=np.uint8), (len(steps), 16))
    words = gpu_words.words_of(jnp.asarray(codes))
    found = gpu_words.bytes_of(gpu_words.level_words(words, jnp.asarray(step), jnp.asarray(offset)))
    np.testing.assert_array_equal(found, codes.astype(np.int32) * step + offset - 128)


@pytest.mark.parametrize("bits", gpu_words.BITS)
def test_symmetric_words_become_signed_codes(bits):
    codes = np.arange(2**bits, dtype=np.uint8)[None]
    words = gpu_words.words_of(jnp.asarray(codes))
    found = gpu_words.bytes_of(gpu_words.symmetric_level_words(words, bits))
    np.testing.assert_array_equal(found, codes.astype(np.int32) - 2 ** (bits - 1))


@pytest.mark.parametrize("group_size", [32, 64, 96, 0])
def test_every_32_channels_have_the_step_of_their_group(group_size):
    q = kernel(W(4, group_size, **LEVELS), 384, 3)
    found = of_units(jnp.asarray(q.scale), 384, group_size, 32)
    size = group_size or 384
    expected = np.stack([q.scale[row // size] for row in range(0, 384, 32)])
    np.testing.assert_array_equal(found, expected)


@needs_interpreter
@pytest.mark.parametrize(("name", "count"), [("WGMMA_LAYOUT_8BIT", 4), ("WGMMA_LAYOUT", 2)])
def test_a_register_is_a_word_and_several_operands(name, count):
    """Four bytes, or two numbers of 16 bits."""
    from jax.experimental.mosaic.gpu import fragmented_array

    operands, words = getattr(fragmented_array, name), word_layout().to_mgpu()
    assert operands.registers_shape((64, 64)) == words.registers_shape((64, 64 // count))
    assert (operands.vector_length, words.vector_length) == (count, 1)
    assert operands.warp_dims == words.warp_dims
    assert operands.lane_dims == words.lane_dims
    for row, column in itertools.product(range(64), range(64)):
        own = operands.tiling.tile_indices((row, column))
        other = words.tiling.tile_indices((row, column // count))
        assert (own[:-1], own[-1]) == (other[:-1], column % count)


def test_levels_of_words_are_those_of_rows():
    q = kernel(W(4, 32, **LEVELS), 128, 5)
    words = gpu_words.words_of(jnp.asarray(q.codes))
    maps = [of_units(jnp.asarray(m), 128, 32, 32) for m in (q.scale, q.offset)]
    halves = []
    for half in range(2):
        own = [jnp.repeat(m[2 * half : 2 * half + 2].T.astype(jnp.int32), 8, axis=1) for m in maps]
        fields = gpu_words.code_words(words, 4, half)
        halves.append(gpu_words.bytes_of(gpu_words.level_words(fields, *own)))
    np.testing.assert_array_equal(jnp.concatenate(halves, axis=1), level_rows(q))
