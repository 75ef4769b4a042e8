"""What follows the sums of a product: a bias per output channel, and an activation function.

XLA fuses both with what comes next. A kernel's result it would have to read and write once more; so kernels
do both as they write, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from jaxtyping import Array, Float

GELU = "gelu_tanh"  # the form with the hyperbolic tangent
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {GELU: partial(jax.nn.gelu, approximate=True)}


def activated(y: Float[Array, "*lead N"], activation: str | None) -> Float[Array, "*lead N"]:
    """Returns `y` after an activation function, a name in `ACTIVATIONS`, or as it is for None."""
    return y if activation is None else ACTIVATIONS[activation](y)


def finished(
    y: Float[Array, "*lead N"], bias: Float[Array, " N"] | None, activation: str | None
) -> Float[Array, "*lead N"]:
    """Returns sums with their bias, activated, in the dtype that they have."""
    return activated(y if bias is None else y + bias.astype(y.dtype), activation)
