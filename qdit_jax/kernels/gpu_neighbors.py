"""How kernels for GPUs are called: in which blocks, and with what of the product's neighbors.

A gated sum and parts are computed in the kernel where its blocks allow it, else by XLA.

Dimensions: K input channels, N output channels, M of a part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from jaxtyping import Array, Float

from qdit_jax.kernels.call import Call, fused_of
from qdit_jax.kernels.derivative import with_derivative_of_xla
from qdit_jax.kernels.epilogue import (
    Epilogue,
    Gated,
    bias_of,
    followed,
    without_padding,
    written_dtype,
)
from qdit_jax.kernels.gpu_call import called
from qdit_jax.kernels.gpu_tiles import Shape, Tiles, chosen_tiles
from qdit_jax.kernels.prologue import Pending
from qdit_jax.quant import ActSpec, QTensor

# (inputs, weights, call) -> a kernel and its operands, see `gpu_call.called`.
OperandsFn = Callable[[Array | Pending, QTensor, Call], tuple[Callable[..., None], Sequence[Array]]]
# (rows, weights, spec of the inputs, bytes of a number of the result) -> the product, as the table knows it.
ShapeFn = Callable[[int, QTensor, ActSpec | None, int], Shape]


def fused_by(
    name: str, operands_fn: OperandsFn, shape_fn: ShapeFn
) -> Callable[..., tuple[Array, ...]]:
    """Returns the function that a row of the table calls as `run_fused`; it has the derivative of XLA's product.

    A gated sum is computed in the kernel where a block of rows lies in one sample, and parts are written
    apart where a block of columns lies in one.
    """

    @with_derivative_of_xla
    def product(
        x: Float[Array, "*lead K"] | Pending,
        q: QTensor,
        bias: Float[Array, " N"] | None,
        gated: Gated | None,
        call: Call,
    ) -> tuple[Float[Array, "*lead M"], ...]:
        kernel, operands = operands_fn(x, q, call)
        width = q.shape[1]
        epilogue = Epilogue(
            bias_of(bias, width, len(operands[1])),
            written_dtype(call.dtype, gated),
            *(call.activation, gated, call.parts),
        )
        found = called(kernel, operands, epilogue, call.tiles, name=name, interpret=call.interpret)
        return without_padding(found, x.shape[:-1], width)

    def fused(
        x: Float[Array, "*lead K"] | Pending,
        q: QTensor,
        bias: Float[Array, " N"] | None,
        gated: Gated | None,
        call: Call,
    ) -> tuple[Float[Array, "*lead M"], ...]:
        fits = takes(gated, call.parts, q.shape[1])
        tiles = call.tiles
        if tiles is None:
            itemsize = written_dtype(call.dtype, gated).itemsize
            shape = shape_fn(math.prod(x.shape[:-1]), q, call.spec, itemsize)
            tiles = chosen_tiles(shape, fits)
        is_inside, call = fits(tiles), call._replace(tiles=tiles)
        if gated is None and is_inside:
            return product(x, q, bias, None, call)
        (y,) = product(x, q, bias, gated if is_inside else None, call._replace(parts=1))
        return followed(y, None if is_inside else gated, call.parts)

    return fused_of(fused)


def takes(gated: Gated | None, parts: int, width: int) -> Callable[[Tiles], bool]:
    """Returns whether blocks let the kernel compute what follows a product.

    Every block of a gated sum has one gate, no padding, and the dtype of the sum; of parts each lies in one.
    """

    def fits(tiles: Tiles) -> bool:
        if gated is None:
            return parts == 1 or width // parts % tiles.block == 0
        is_wide = gated.x.dtype == gated.dtype
        return is_wide and not (gated.tokens_per_sample % tiles.rows or width % tiles.block)

    return fits
