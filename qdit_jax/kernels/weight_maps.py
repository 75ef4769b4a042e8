"""What makes weights of codes, for the kernels that multiply inputs in 16 bits: a map for every group.

Groups, zero points and two levels of scales are one form, `(code * factor - zero) * scale`, whose first part
is exact in float32.

Dimensions: N output channels, G groups along K.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from qdit_jax.quant import QTensor, scale_value, step_and_offset

HALF = 128  # levels are codes moved by it


def maps_of(
    q: QTensor,
) -> tuple[Float[Array, "G N"] | None, Float[Array, "G N"], Float[Array, "G N"]]:
    """Returns (factor, zero, scale); no factor where all would be 1."""
    if q.has_levels:
        step, offset = (a.astype(jnp.float32) for a in step_and_offset(q))
        return step, HALF - offset, jnp.broadcast_to(q.channel_scale, step.shape)
    scale = scale_value(q.scale)
    zero_point = q.zero_point
    zero = jnp.float32(2 ** (q.bits - 1)) if zero_point is None else zero_point.astype(jnp.float32)
    return None, jnp.broadcast_to(zero, scale.shape), scale
