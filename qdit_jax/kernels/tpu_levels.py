"""One int8 dot over all input channels, in one Pallas kernel for TPUs.

Compiled for v5e, v5p and v6e, interpreted on CPU, not run on a TPU.

Inputs have one symmetric scale per token, computed in the kernel; weights are int8 levels with one scale
per output channel (`quant.levels`), or symmetric codes per channel. A block of rows is quantized once
into VMEM, and packed codes become levels there once per call. So memory sees the inputs, the packed
codes and the result, and nothing between.

Codes are unpacked four at a time, in words of 32 bits, see `tpu_words`. The map to levels,
`(code * step + offset) ^ 128`, stays inside its byte: 0 <= code * step + offset <= 255.

Dimensions: M rows (tokens), K input channels, N output channels, G groups along K, R rows of packed
bytes; J blocks of columns of a panel, L rows and C columns of a block (`tpu_blocks`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from qdit_jax.kernels.level_reasons import is_in_levels
from qdit_jax.kernels.refs import Ref, Span
from qdit_jax.kernels.token_scales import INFINITY, divisor_of, magnitude_bits
from qdit_jax.kernels.tpu_blocks import STRIP, sizes_of
from qdit_jax.kernels.tpu_call import TPUOperands, fused_by
from qdit_jax.kernels.tpu_reasons import levels_reason, row
from qdit_jax.kernels.tpu_rows import TileFn, Tokens, Writer, span
from qdit_jax.kernels.tpu_words import EACH_BYTE, SIGNS, as_rows_of, code_words
from qdit_jax.quant import (
    ActSpec,
    QTensor,
    rounded_quotients,
    scale_value,
    step_and_offset,
)


def _operands(q: QTensor, spec: ActSpec | None) -> TPUOperands:
    assert spec is not None, "its row refuses it"
    scale = q.channel_scale if q.has_levels else scale_value(q.scale)[0]
    kernel = functools.partial(_kernel, act_spec=spec)
    return TPUOperands(kernel, step_and_offset(q), [scale[None]])


# In integer numerics. Equal to `xla.integer_matmul` to float rounding, whose derivative it has; a token that
# holds NaN or infinity gives NaN.
levels_fused = fused_by(
    "tpu_levels", _operands, lambda shape, q, itemsize, _: sizes_of(shape, q, itemsize)
)


def _kernel(
    tokens: Tokens,
    codes: Ref,
    step: Ref,
    offset: Ref,
    scale: Ref,
    x_codes: Ref,
    x_scale: Ref,
    levels: Ref,
    *turned: Ref,
    writer: Writer,
    bits: int,
    groups: tuple[int, ...],
    act_spec: ActSpec,
) -> None:
    """Writes one block `[L, C]` of the result, and what later blocks share.

    Shared are the codes `[L, K]` and scales `[L, 1]` of the rows, and the levels `[J, K, C]` of the
    panel. Packed codes are `[R, C]`, or `[C, R]` where there is room to have them `turned`.
    """
    block = pl.program_id(2)

    @pl.when(block == 0)
    def _() -> None:
        quantize_rows(tokens, x_codes, x_scale, act_spec)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        columns = turned[0] if turned else codes
        if turned:
            columns[...] = codes[...].T
        unpack_columns(columns, step, offset, levels.at[block], bits, groups)

    sums = jnp.dot(
        x_codes[...],
        levels[block],
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.int32,
    )
    scaled = sums.astype(jnp.float32) * x_scale[...] * scale[...]
    writer.write(scaled)


def quantize_rows(tokens: Tokens, x_codes: Ref, x_scale: Ref, spec: ActSpec) -> None:
    """Writes codes and scales of a block of tokens, as `ActSpec` has them; not finite: NaN as scale.

    An int8 tile at a time, which is read twice: a strip of all K does not fit into registers.
    """
    tiles = range(tokens.num_tiles)
    top = 2 ** (spec.bits - 1) - 1

    def quantize_strip(rows: Span, tile_fn: TileFn) -> None:
        most = functools.reduce(jnp.maximum, (magnitude_bits(tile_fn(tile)) for tile in tiles))
        divisor, x_scale[rows, :] = token_scale(jnp.max(most, axis=1, keepdims=True), spec)
        codes_fn = rounded_quotients(divisor, top)
        for tile in tiles:
            x_codes[rows, span(tile)] = codes_fn(tile_fn(tile)).astype(jnp.int8)

    tokens.over_strips(quantize_strip)


def token_scale(
    most: Int32[Array, "M 1"], spec: ActSpec
) -> tuple[Float[Array, "M 1"], Float[Array, "M 1"]]:
    """Returns (what to divide by, scale), given the greatest of `magnitude_bits` of every token."""
    is_finite = most < INFINITY
    high = jax.lax.bitcast_convert_type(jnp.where(is_finite, most, 0), jnp.float32)
    divisor = divisor_of(high, spec)
    return divisor, jnp.where(is_finite, divisor, jnp.nan)


def unpack_columns(
    codes: Ref, step: Ref, offset: Ref, levels: Ref, bits: int, groups: tuple[int, ...]
) -> None:
    """Writes the levels `[K, C]` of a block of columns."""
    steps, offsets = step[...].astype(jnp.int32), offset[...].astype(jnp.int32) * EACH_BYTE
    for index, group in enumerate(groups):
        word = code_words(codes, bits, index)
        own_step, own_offset = (a[group : group + 1] for a in (steps, offsets))
        rows = pl.ds(index * STRIP, STRIP)
        levels[rows, :] = as_rows_of((word * own_step + own_offset) ^ SIGNS, jnp.int8)


TPU_LEVELS = row(
    *("tpu_levels", levels_fused, ("weights", "sums", "codes"), levels_reason),
    meant_for=is_in_levels,
)
