"""Products of very many tokens, some at a time, so that what is float32 in them stays small.

A product in 16 bits quantizes its inputs in float32 and sums in float32. At a video's tens of thousands of
tokens such a copy of an input or output is gigabytes; of a block of tokens it is as small as one wants.

Dimensions: T tokens, K input channels, N output channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qdit_jax.quant import ActQuant

MOST_VALUES = 2**27  # of a float32 array, 512 MiB: more are computed block by block
BLOCK_VALUES = 2**25  # of a block's


def in_token_blocks(
    fn: Callable[[Float[Array, "T K"]], Float[Array, "T N"]],
    x: Float[Array, "*lead K"],
    act_quant: ActQuant | None,
    width: int,
) -> Float[Array, "*lead N"] | None:
    """Returns `fn` of all tokens, one block after another; None where that is not needed or not possible.

    It is not needed below `MOST_VALUES`, and for inputs of 32 bits, of which a copy is the least. It is not
    possible where samples have scales of their own.
    """
    num_tokens = math.prod(x.shape[:-1])
    widest = max(x.shape[-1], width)
    own_scales = act_quant is not None and act_quant.scale is not None and act_quant.scale.ndim > 1
    if num_tokens * widest <= MOST_VALUES or jnp.finfo(x.dtype).bits > 16 or own_scales:
        return None
    count = -(-num_tokens // max(BLOCK_VALUES // widest, 1))
    size = -(-num_tokens // count)
    rows = x.reshape(num_tokens, -1)
    if more := count * size - num_tokens:
        rows = jnp.pad(rows, ((0, more), (0, 0)))
    found = jax.lax.map(fn, rows.reshape(count, size, -1))
    return found.reshape(count * size, width)[:num_tokens].reshape(*x.shape[:-1], width)
