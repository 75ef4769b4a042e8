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
    inside = gated if gated is not None and is_whole(gated, tiles) else None
    is_apart = parts == 1 or (gated is None and width // parts % tiles.block == 0)
    if is_apart and parts > 1:
        return product_fn(None, parts)
    (y,) = product_fn(inside, 1)
    return followed(y, None if inside is not None else gated, parts)


def is_whole(gated: Gated, tiles: Tiles) -> bool:
    """Returns whether every block of the result has one gate and no padding, and the dtype of the sum."""
    is_wide = gated.x.dtype == gated.dtype
    return is_wide and not (gated.tokens_per_sample % tiles.rows or gated.x.shape[-1] % tiles.block)


def written_dtype(dtype: str, gated: Gated | None) -> np.dtype:
    """Returns what a kernel writes: the dtype of the result, or of the sum."""
    return jnp.dtype(dtype) if gated is None else gated.dtype


def without_padding(
    found: Sequence[Float[Array, "_ _"]], lead: tuple[int, ...], width: int
) -> tuple[Float[Array, "*lead M"], ...]:
    """Returns the parts of a result of `width` channels with the leading axes of the input."""
    num_rows, each = int(np.prod(lead)), width // len(found)
    return tuple(y[:num_rows, :each].reshape(*lead, each) for y in found)
