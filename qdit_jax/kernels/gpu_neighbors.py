"""What kernels for GPUs compute after a product where their blocks allow it: a gated sum, and parts.

Dimensions: N output channels, M of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qdit_jax.kernels.epilogue import Gated, followed
from qdit_jax.kernels.gpu_tiles import Tiles

# (what the result is added to in the kernel, how many parts it writes) -> parts.
ProductFn = Callable[[Gated | None, int], tuple[Array, ...]]


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


def written_dtype(dtype: str, gated: Gated | None) -> np.dtype:
    """Returns what a kernel writes: the dtype of the result, or of the sum."""
    return jnp.dtype(dtype) if gated is None else gated.dtype


def without_padding(
    found: Sequence[Float[Array, "_ _"]], lead: tuple[int, ...], width: int
) -> tuple[Float[Array, "*lead M"], ...]:
    """Returns the parts of a result of `width` channels with the leading axes of the input."""
    num_rows, each = int(np.prod(lead)), width // len(found)
    return tuple(y[:num_rows, :each].reshape(*lead, each) for y in found)
