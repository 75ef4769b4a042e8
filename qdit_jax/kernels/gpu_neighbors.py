"""How kernels for GPUs are called: in which blocks, and with what of the product's neighbors.

A gated sum and parts are computed in the kernel where its blocks allow it, else by XLA.

Dimensions: K input channels, N output channels, M of a part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from qdit_jax.kernels.epilogue import Gated, followed, written_dtype
from qdit_jax.kernels.gpu_tiles import Shape, Tiles, chosen_tiles
from qdit_jax.kernels.prologue import Pending
from qdit_jax.quant import ActQuant, ActSpec, QTensor

# (what the result is added to in the kernel, how many parts it writes) -> parts.
ProductFn = Callable[[Gated | None, int], tuple[Array, ...]]
# (rows, weights, spec of the inputs, bytes of a number of the result) -> the product, as the table knows it.
ShapeFn = Callable[[int, QTensor, ActSpec | None, int], Shape]


def fused_by(
    product_fn: Callable[..., tuple[Array, ...]], shape_fn: ShapeFn
) -> Callable[..., tuple[Array, ...]]:
    """Returns the function that a row of the table calls as `run_fused`.

    Args:
        product_fn: `(x, q, bias, gated, spec, dtype, activation, parts, tiles, interpret) -> parts`.
    """

    def fused(
        x: Float[Array, "*lead K"] | Pending,
        q: QTensor,
        act: ActQuant | None,
        dtype: str,
        bias: Float[Array, " N"] | None = None,
        activation: str | None = None,
        gated: Gated | None = None,
        parts: int = 1,
        *,
        tiles: Tiles | None = None,
        interpret: Any = None,
    ) -> tuple[Float[Array, "*lead M"], ...]:
        """Returns the parts of a product and of what comes before and after it, see `fused_matmul`.

        `interpret` is Pallas' `InterpretGPUParams`, which run it on a CPU, slowly.
        """
        spec, width = None if act is None else act.spec, q.shape[1]
        if tiles is None:
            itemsize = written_dtype(dtype, gated).itemsize
            shape = shape_fn(math.prod(x.shape[:-1]), q, spec, itemsize)
            tiles = chosen_tiles(shape, takes(gated, parts, width))

        def product(gated: Gated | None, parts: int) -> tuple[Array, ...]:
            return product_fn(x, q, bias, gated, spec, dtype, activation, parts, tiles, interpret)

        return with_neighbors(product, width, gated, parts, tiles)

    return fused


def with_neighbors(
    product_fn: ProductFn, width: int, gated: Gated | None, parts: int, tiles: Tiles
) -> tuple[Float[Array, "*lead M"], ...]:
    """Returns the parts of a product and what follows it, in the kernel or by XLA.

    A gated sum is computed in the kernel where a block of rows lies in one sample, and parts are written
    apart where a block of columns lies in one.
    """
    is_inside = takes(gated, parts, width)(tiles)
    if gated is None and is_inside:
        return product_fn(None, parts)
    (y,) = product_fn(gated if is_inside else None, 1)
    return followed(y, None if is_inside else gated, parts)


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
