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
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from qdit_jax.kernels.product import Implementation
from qdit_jax.kernels.tpu_blocks import (
    STRIP,
    TILE,
    VMEM_LIMIT,
    Blocks,
    chosen_blocks,
    sizes_of,
)
from qdit_jax.kernels.tpu_reasons import tpu_reason
from qdit_jax.kernels.tpu_words import (
    EACH_BYTE,
    SIGNS,
    as_rows_of,
    code_words,
    groups_of_sub_blocks,
    is_turned_inside,
    padded,
    whole_codes,
)
from qdit_jax.kernels.xla import integer_matmul
from qdit_jax.quant import (
    ActQuant,
    ActSpec,
    QTensor,
    rounded_quotients,
    scale_value,
    step_and_offset,
)

MAGNITUDE, INFINITY = 0x7FFFFFFF, 0x7F800000  # bits of float32
LEAST_NORMAL = 2.0**-126


def levels_matmul(
    x: Float[Array, "*lead K"],
    q: QTensor,
    act: ActQuant | None,
    numerics: str,
    *,
    interpret: bool = False,
) -> Float[Array, "*lead N"]:
    """Returns `act(x) @ q` in integer numerics; `interpret` runs it on any platform, slowly.

    Equal to `xla.integer_matmul` to float rounding, whose derivative it has. A token that holds NaN or
    infinity gives NaN.
    """
    assert act is not None, "tpu_reason refuses it"
    return _product(x, q, act.spec, interpret)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _product(
    x: Float[Array, "*lead K"], q: QTensor, spec: ActSpec, interpret: bool
) -> Float[Array, "*lead N"]:
    num_channels, width = q.shape
    sizes = sizes_of(x.shape, q, x.dtype.itemsize)
    blocks = chosen_blocks(sizes)
    assert blocks is not None, "tpu_reason refuses it"
    rows, columns = blocks.rows * blocks.num_rows, sizes.column_tiles * TILE
    tokens = padded(x.reshape(-1, num_channels), rows, sizes.channels)
    scale = q.channel_scale if q.has_levels else scale_value(q.scale)[0]
    maps = (padded(a, a.shape[0], columns) for a in step_and_offset(q))
    codes = whole_codes(q, sizes, columns)
    inside = is_turned_inside(codes.shape[1])
    codes = codes if inside else codes.T
    operands = (tokens, codes, *maps, padded(scale[None], 1, columns))
    groups = groups_of_sub_blocks(sizes.channels, num_channels, q.group_size)
    kernel = functools.partial(_kernel, bits=q.bits, groups=groups, act_spec=spec)
    y = _call(kernel, operands, blocks, inside, interpret)
    return y[: math.prod(x.shape[:-1]), :width].reshape(*x.shape[:-1], width)


@_product.defjvp
def _product_jvp(
    spec: ActSpec, interpret: bool, primals: tuple[Any, Any], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    _, tangent = jax.jvp(lambda x, q: integer_matmul(x, q, ActQuant(spec)), primals, tangents)
    return _product(*primals, spec, interpret), tangent


def _call(
    kernel: Any, operands: tuple[Array, ...], blocks: Blocks, inside: bool, interpret: bool
) -> Array:
    """Returns the kernel's result `[M, N]`, padding included.

    The codes among the operands are `[N, R]` where they are to be transposed `inside`, else `[R, N]`.
    """
    from jax.experimental.pallas import tpu as pltpu

    tokens, codes, step, _, scale = operands
    (rows, channels), width = tokens.shape, scale.shape[1]
    columns, panel = blocks.columns, blocks.panel

    def of_rows(p: Array, i: Array, j: Array) -> tuple[Any, Any]:
        return i, 0

    def of_columns(p: Array, i: Array, j: Array) -> tuple[Any, Any]:
        return 0, p * panel + j

    def once(p: Array, i: Array, j: Array) -> tuple[Any, Any]:
        # Only the first block of rows reads them: after it, the last block stays where it is.
        return 0, p * panel + jnp.where(i == 0, j, panel - 1)

    codes_block, turned = pl.BlockSpec((codes.shape[0], columns), once), []
    if inside:
        codes_block = pl.BlockSpec((columns, codes.shape[1]), lambda *at: once(*at)[::-1])
        turned = [pltpu.VMEM((codes.shape[1], columns), jnp.uint8)]

    bytes_of_codes = sum(a.size * a.dtype.itemsize for a in operands[1:])
    bytes_of_rows = tokens.dtype.itemsize * rows * (blocks.panels * channels + width)
    return pl.pallas_call(
        kernel,
        grid=blocks.grid,
        in_specs=[
            pl.BlockSpec((blocks.rows, channels), of_rows),
            codes_block,
            *(pl.BlockSpec((step.shape[0], columns), once) for _ in range(2)),
            pl.BlockSpec((1, columns), of_columns),
        ],
        out_specs=pl.BlockSpec((blocks.rows, columns), lambda p, i, j: (i, p * panel + j)),
        out_shape=jax.ShapeDtypeStruct((rows, width), tokens.dtype),
        scratch_shapes=[
            pltpu.VMEM((blocks.rows, channels), jnp.int8),
            pltpu.VMEM((blocks.rows, 1), jnp.float32),
            pltpu.VMEM((panel, channels, columns), jnp.int8),
            *turned,
        ],
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * channels * width,
            transcendentals=0,
            bytes_accessed=bytes_of_codes + bytes_of_rows,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
        name="tpu_levels",
    )(*operands)


# Any: references to memory, which have no public type.
def _kernel(
    x: Any,
    codes: Any,
    step: Any,
    offset: Any,
    scale: Any,
    y: Any,
    x_codes: Any,
    x_scale: Any,
    levels: Any,
    *turned: Any,
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
        quantize_rows(x, x_codes, x_scale, act_spec)

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
    y[...] = (sums.astype(jnp.float32) * x_scale[...] * scale[...]).astype(y.dtype)


def quantize_rows(x: Any, x_codes: Any, x_scale: Any, spec: ActSpec) -> None:
    """Writes codes and scales of a block of tokens, as `ActSpec` has them; not finite: NaN as scale.

    An int8 tile at a time, which is read twice: a strip of all K does not fit into registers.
    """
    parts = [pl.ds(start, TILE) for start in range(0, x.shape[1], TILE)]
    top = 2 ** (spec.bits - 1) - 1

    def quantize_strip(strip: Array, _: None) -> None:
        rows = pl.ds(pl.multiple_of(strip * STRIP, STRIP), STRIP)
        tiles = (x[rows, part].astype(jnp.float32) for part in parts)
        most = functools.reduce(jnp.maximum, (magnitude_bits(tile) for tile in tiles))
        divisor, x_scale[rows, :] = token_scale(jnp.max(most, axis=1, keepdims=True), spec)
        codes_fn = rounded_quotients(divisor, top)
        for part in parts:
            x_codes[rows, part] = codes_fn(x[rows, part].astype(jnp.float32)).astype(jnp.int8)

    jax.lax.fori_loop(0, x.shape[0] // STRIP, quantize_strip, None)


def magnitude_bits(x: Float[Array, "M K"]) -> Int32[Array, "M K"]:
    """Returns whole numbers that are ordered as magnitudes are, NaN above infinity."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) & MAGNITUDE


def token_scale(
    most: Int32[Array, "M 1"], spec: ActSpec
) -> tuple[Float[Array, "M 1"], Float[Array, "M 1"]]:
    """Returns (what to divide by, scale), given the greatest of `magnitude_bits` of every token."""
    high = jax.lax.bitcast_convert_type(most, jnp.float32)
    limits = spec.range_fn.limits_from_extremes(-high, high, spec.bits, True)
    scale = spec.range_fn.scale(*limits, spec.bits, True)
    # What a TPU flushes to zero has no reciprocal.
    divisor = jnp.where((most < INFINITY) & (scale >= LEAST_NORMAL), scale, 1.0)
    return divisor, jnp.where(most < INFINITY, divisor, jnp.nan)


def unpack_columns(
    codes: Any, step: Any, offset: Any, levels: Any, bits: int, groups: tuple[int, ...]
) -> None:
    """Writes the levels `[K, C]` of a block of columns."""
    steps, offsets = step[...].astype(jnp.int32), offset[...].astype(jnp.int32) * EACH_BYTE
    for index, group in enumerate(groups):
        word = code_words(codes, bits, index)
        own_step, own_offset = (a[group : group + 1] for a in (steps, offsets))
        rows = pl.ds(index * STRIP, STRIP)
        levels[rows, :] = as_rows_of((word * own_step + own_offset) ^ SIGNS, jnp.int8)


TPU_LEVELS = Implementation("tpu_levels", levels_matmul, tpu_reason)
