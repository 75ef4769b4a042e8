"""The call that the kernels for TPUs share: its grid, the blocks of its operands, and what stays in VMEM.

A block of rows meets all blocks of columns of a panel, one after another. The codes of a panel, and what
makes weights of them, are read by its first block of rows alone, which leaves the weights in VMEM.

Dimensions: M rows (tokens), K input channels, N output channels, G groups along K, R packed bytes of a
channel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Num

from qdit_jax.kernels.call import Call, fused_of
from qdit_jax.kernels.derivative import with_derivative_of_xla
from qdit_jax.kernels.epilogue import Epilogue, Gated, followed, without_padding, written_dtype
from qdit_jax.kernels.prologue import Pending, operands_of, plain, source_of
from qdit_jax.kernels.refs import Ref
from qdit_jax.kernels.tpu_blocks import (
    TILE,
    VMEM_LIMIT,
    Blocks,
    Sizes,
    Tiles,
    blocks_of,
    chosen_blocks,
    misfit,
)
from qdit_jax.kernels.tpu_neighbors import (
    Index,
    Operand,
    epilogue_of,
    operands_after,
    operands_before,
    sizes_around,
    takes,
)
from qdit_jax.kernels.tpu_rows import Around, around_of, tokens_of, writer_of
from qdit_jax.kernels.tpu_words import (
    groups_of_sub_blocks,
    is_turned_inside,
    padded,
    whole_codes,
)
from qdit_jax.quant import ActSpec, QTensor


class TPUOperands(NamedTuple):
    """What a kernel is, and what it reads of the weights beside their codes.

    Attributes:
        kernel: see `packed_product`.
        maps: what makes weights of codes, `[G, N]` each.
        of_columns: what has a value per output channel, `[_, N]` each.
    """

    kernel: Callable[..., None]
    maps: Sequence[Num[Array, "G N"]]
    of_columns: Sequence[Float[Array, "_ N"]]


# (weights, spec of the inputs) -> what a kernel reads.
OperandsFn = Callable[[QTensor, ActSpec | None], TPUOperands]
# (shape of the input, weights, bytes of a number of the input, how it is quantized) -> sizes, without neighbors.
SizesFn = Callable[[tuple[int, ...], QTensor, int, ActSpec | None], Sizes]


def fused_by(
    name: str, operands_fn: OperandsFn, sizes_fn: SizesFn
) -> Callable[..., tuple[Array, ...]]:
    """Returns the function that a row of the table calls as `run_fused`; it has the derivative of XLA's product.

    The kernel computes a norm where 128 rows or more, a multiple of 32, divide the tokens of a sample, and a
    gated sum where they do and N is a multiple of 128. All else is XLA's, and so are parts: it rearranges q, k
    and v for its attention in any case.
    """

    @with_derivative_of_xla
    def product(
        x: Float[Array, "*lead K"] | Pending,
        q: QTensor,
        bias: Float[Array, " N"] | None,
        gated: Gated | None,
        call: Call,
    ) -> tuple[Float[Array, "*lead N"], ...]:
        sizes = sizes_fn(x.shape, q, source_of(x).dtype.itemsize, call.spec)
        epilogue = epilogue_of(sizes, bias, gated, call)
        operands = operands_fn(q, call.spec)
        settings = {"name": name, "tiles": call.tiles, "interpret": call.interpret}
        return packed_product(operands, x, q, sizes, epilogue, **settings)

    def fused(
        x: Float[Array, "*lead K"] | Pending,
        q: QTensor,
        bias: Float[Array, " N"] | None,
        gated: Gated | None,
        call: Call,
    ) -> tuple[Float[Array, "*lead M"], ...]:
        def fits(gated: Gated | None) -> bool:
            sizes = sizes_fn(x.shape, q, source_of(x).dtype.itemsize, call.spec)
            whole = sizes_around(sizes, x, written_dtype(call.dtype, gated), gated)
            if call.tiles is not None:
                return misfit(call.tiles, whole) is None
            return chosen_blocks(whole) is not None

        if call.spec is None or not fits(None):
            x = plain(x)
        own, left = None, gated
        if gated is not None and takes(gated, call.dtype) and fits(gated):
            own, left = gated, None
        (y,) = product(x, q, bias, own, call._replace(parts=1))
        return followed(y, left, call.parts)

    return fused_of(fused)


def packed_product(
    operands: TPUOperands,
    x: Float[Array, "*lead K"] | Pending,
    q: QTensor,
    sizes: Sizes,
    epilogue: Epilogue,
    *,
    name: str,
    tiles: Tiles | None,
    interpret: Any,
) -> tuple[Float[Array, "*lead N"], ...]:
    """Returns the product of `x` and `q`, and what `epilogue` makes of it, block by block.

    `sizes` are those of the product alone. The kernel is given `bits`, `groups`, the group of every 32 input
    channels, and `writer`, which takes its sums `[L, C]`; the rows as `Tokens`, and the blocks of the packed
    codes `[R, C]`, or `[C, R]` where the last block is room to have them turned, of each of `maps [G, C]`, and
    of each of `of_columns [_, C]`; then what stays in VMEM: codes `[L, K]` and scales `[L, 1]` of the rows, if
    these are quantized too, and the unpacked weights `[J, K, C]` of the panel. Where a token has scales of U
    units, there are `[_, L, 128]` of them, a lane each, as many zero points, and after the weights room for
    their sums `[J, U, C]`, both int32.

    Raises:
        ValueError: if the product cannot be cut into `tiles`; None chooses them.
    """
    kernel, maps, of_columns = operands
    sizes = sizes_around(sizes, x, epilogue.dtype, epilogue.gated)
    if tiles is not None and (reason := misfit(tiles, sizes)) is not None:
        raise ValueError(f"{tiles}: {reason}")
    blocks = chosen_blocks(sizes) if tiles is None else blocks_of(tiles, sizes)
    assert blocks is not None, "the kernel's reasons refuse it"
    rows, columns = blocks.rows * blocks.num_rows, sizes.column_tiles * TILE
    codes = whole_codes(q, sizes, columns)
    inside = is_turned_inside(codes.shape[1])
    own = [
        padded(operands_of(x)[0], rows, sizes.channels),
        codes if inside else codes.T,
        *(padded(values, values.shape[0], columns) for values in (*maps, *of_columns)),
    ]
    before = operands_before(x, blocks, sizes.channels)
    after = operands_after(epilogue, blocks, of_both(blocks))
    groups = groups_of_sub_blocks(sizes.channels, sizes.num_channels, q.group_size)
    kernel = functools.partial(kernel, bits=q.bits, groups=groups)
    around = around_of(x, epilogue)
    y = pl.pallas_call(
        functools.partial(with_neighbors, kernel, around, len(own), len(before), len(after)),
        grid=blocks.grid,
        in_specs=[
            *in_specs(own, blocks, len(maps), inside=inside),
            *(operand.spec for operand in (*before, *after)),
        ],
        out_specs=pl.BlockSpec((blocks.rows, blocks.columns), of_both(blocks)),
        out_shape=jax.ShapeDtypeStruct((rows, columns), epilogue.dtype),
        scratch_shapes=held_in_vmem(
            *(blocks, sizes, own[1].shape[1] if inside else 0),
            has_norm=around.norm is not None,
        ),
        cost_estimate=cost(own, [*before, *after], blocks, sizes),
        compiler_params=compiler_params(),
        interpret=interpret or False,
        name=name,
    )(*own, *(operand.values for operand in (*before, *after)))
    return without_padding([y], x.shape[:-1], sizes.width)


def with_neighbors(
    kernel: Callable[..., None],
    around: Around,
    own: int,
    before: int,
    after: int,
    *refs: Ref,
) -> None:
    """Calls a kernel with what reads its rows and what writes its sums.

    `own`, `before` and `after` are how many references it has of the product, of what comes before and after.
    """
    (x, *of_product), rest = refs[:own], refs[own:]
    y, *held = rest[before + after :]
    *held, modulation = (*held, None) if around.norm is None else held
    tokens = tokens_of(x, rest[:before], around, modulation)
    writer = writer_of(rest[before:][:after], y, around)
    kernel(tokens, *of_product, *held, writer=writer)


def of_both(blocks: Blocks) -> Callable[[Array, Array, Array], Index]:
    """Returns the place of a block of the result, by panel p, block of rows i and of columns j."""
    return lambda p, i, j: (i, p * blocks.panel + j)


def in_specs(
    operands: Sequence[Array], blocks: Blocks, num_maps: int, *, inside: bool
) -> list[pl.BlockSpec]:
    """Returns the blocks of the operands: rows, codes, maps, and what has a value per column."""
    columns, panel = blocks.columns, blocks.panel

    def of_rows(p: Array, i: Array, j: Array) -> Index:
        return i, 0

    def of_columns(p: Array, i: Array, j: Array) -> Index:
        return 0, p * panel + j

    def once(p: Array, i: Array, j: Array) -> Index:
        # Only the first block of rows reads them: after it, the last block stays where it is.
        return 0, p * panel + jnp.where(i == 0, j, panel - 1)

    tokens, codes, *rest = operands
    of_codes = pl.BlockSpec((codes.shape[0], columns), once)
    if inside:
        of_codes = pl.BlockSpec((columns, codes.shape[1]), lambda *at: once(*at)[::-1])
    return [
        pl.BlockSpec((blocks.rows, tokens.shape[1]), of_rows),
        of_codes,
        *(pl.BlockSpec((values.shape[0], columns), once) for values in rest[:num_maps]),
        *(pl.BlockSpec((values.shape[0], columns), of_columns) for values in rest[num_maps:]),
    ]


def held_in_vmem(blocks: Blocks, sizes: Sizes, turned_bytes: int, *, has_norm: bool) -> list[Any]:
    """Returns what stays in VMEM, see `packed_product`; `turned_bytes` is R, or 0 for no room.

    Last a block's shift and scale, where a norm comes first.
    """
    from jax.experimental.pallas import tpu as pltpu

    rows, columns, channels = blocks.rows, blocks.columns, sizes.channels
    unpacked, quantized, sums = jnp.bfloat16, [], []
    if sizes.unpacked == 1:
        of_rows = (-(-sizes.units // TILE), rows, TILE) if sizes.units else (rows, 1)
        unpacked = jnp.int8
        quantized = [pltpu.VMEM((rows, channels), jnp.int8), pltpu.VMEM(of_rows, jnp.float32)]
    if sizes.units:
        quantized.append(pltpu.VMEM(of_rows, jnp.int32))
        sums.append(pltpu.VMEM((blocks.panel, sizes.units, columns), jnp.int32))
    turned = [pltpu.VMEM((turned_bytes, columns), jnp.uint8)] if turned_bytes else []
    weights = pltpu.VMEM((blocks.panel, channels, columns), unpacked)
    modulation = [pltpu.VMEM((2, channels), jnp.float32)] if has_norm else []
    return [*quantized, weights, *sums, *turned, *modulation]


def cost(
    own: Sequence[Array], neighbors: Sequence[Operand], blocks: Blocks, sizes: Sizes
) -> pl.CostEstimate:
    """Returns what a call costs, for XLA's schedule."""
    tokens, width = own[0], sizes.column_tiles * TILE
    rows, channels = tokens.shape
    read = tokens.size * tokens.dtype.itemsize * blocks.panels
    read += sum(values.size * values.dtype.itemsize for values in own[1:])
    read += sum(operand.read * operand.values.dtype.itemsize for operand in neighbors)
    return pl.CostEstimate(
        flops=2 * rows * channels * width,
        transcendentals=0,
        bytes_accessed=read + rows * width * sizes.result_itemsize,
    )


def compiler_params() -> Any:
    """Returns that the grid is walked in order, and the VMEM that there is."""
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=VMEM_LIMIT)
