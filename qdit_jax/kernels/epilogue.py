"""What follows the sums of a product: a bias per output channel, an activation function, a gated sum.

XLA fuses them with what comes next. A kernel's result it would have to read and write once more; so kernels
do it as they write, in float32.

Dimensions: B samples, T tokens, N output channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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


@partial(jax.tree_util.register_dataclass, data_fields=["x", "modulation"], meta_fields=["gate"])
@dataclasses.dataclass(frozen=True)
class Gated:
    """What a result `y` is added to: `x + gate * y`.

    Attributes:
        x: `[B, *T, N]`.
        modulation: `[B, P N]`, for all tokens of a sample; P parts.
        gate: which part it is.
    """

    # Any: `jax.tree.map` and `jax.eval_shape` put other leaves here than arrays.
    x: Any
    modulation: Any
    gate: int

    @property
    def tokens_per_sample(self) -> int:
        """How many tokens have one gate."""
        return self.x.size // self.x.shape[-1] // len(self.modulation)

    @property
    def dtype(self) -> np.dtype:
        """Of the sum."""
        return np.dtype(jnp.promote_types(self.x.dtype, self.modulation.dtype))

    def plus(self, y: Float[Array, "B *T N"]) -> Float[Array, "B *T N"]:
        """Returns the sum, computed by XLA."""
        num_parts = self.modulation.shape[-1] // self.x.shape[-1]
        gate = jnp.split(self.modulation, num_parts, axis=-1)[self.gate]
        return self.x + gate.reshape(len(gate), *(1,) * (self.x.ndim - 2), -1) * y


def followed(
    y: Float[Array, "*lead N"], gated: Gated | None, parts: int
) -> tuple[Float[Array, "*lead M"], ...]:
    """Returns what `gated` has with `y` added, or `y` for None; its channels in `parts` arrays."""
    y = y if gated is None else gated.plus(y)
    return tuple(jnp.split(y, parts, axis=-1)) if parts > 1 else (y,)


class Epilogue(NamedTuple):
    """What is done with the sums as they are written.

    Attributes:
        bias: of all output channels, padding included.
        dtype: of the result.
        activation: see `epilogue.activated`.
        gated: what the result is added to; then nothing is padded, and a block of rows has one gate.
        parts: arrays that the output channels are split among; then they are whole blocks each.
    """

    bias: Float[Array, " N"]
    dtype: np.dtype
    activation: str | None = None
    gated: Gated | None = None
    parts: int = 1


def bias_of(bias: Float[Array, " N"] | None, width: int, columns: int) -> Float[Array, " C"]:
    """Returns the bias of `columns` output channels in float32, zeros where there is none."""
    if bias is None:
        return jnp.zeros(columns, jnp.float32)
    return jnp.pad(bias.astype(jnp.float32), (0, columns - width))


def written_dtype(dtype: str, gated: Gated | None) -> np.dtype:
    """Returns what a kernel writes: the dtype of the result, or of the sum."""
    return jnp.dtype(dtype) if gated is None else gated.dtype


def without_padding(
    found: Sequence[Float[Array, "_ _"]], lead: tuple[int, ...], width: int
) -> tuple[Float[Array, "*lead M"], ...]:
    """Returns the parts of a result of `width` channels with the leading axes of the input."""
    num_rows, each = int(np.prod(lead)), width // len(found)
    return tuple(y[:num_rows, :each].reshape(*lead, each) for y in found)
