"""Branches that are always taken, so that XLA:CPU computes when and where a program says.

It fuses a cheap producer into each of its consumers, and computes what depends on parameters alone
long before it is used; optimization barriers are gone when it decides. The contents of a branch
of a conditional are computed when the branch is taken, from operands that are computed once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qdit_jax.types import AnyArray


def true_after(x: Float[AnyArray, "..."]) -> Bool[Array, ""]:
    """Returns true, as a value that depends on `x` and that the compiler cannot foresee.

    `x` has one element or more.
    """
    bits = jax.lax.bitcast_convert_type(x.reshape(-1)[0].astype(jnp.float32), jnp.int32)
    return (bits | 1) != 0
