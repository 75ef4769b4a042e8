"""What stands beside a kernel when its layer computes in other coordinates of its input.

Each is exact in full precision together with the kernel that belongs to it; they are chosen so that
input and kernel lose less when they are rounded.

Dimensions: K input channels, N output channels, R rank, S channels of a rotated block.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qdit_jax.quant.hadamard import factors

ROTATIONS = ("regular", "hadamard", "dense")


@partial(jax.tree_util.register_dataclass, data_fields=["inverse_scale", "shift"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class InputMap:
    """`x' = (x - shift) * inverse_scale` per channel, where no producer can absorb it.

    Attributes:
        inverse_scale: `[K]`.
        shift: `[K]`, or None for none.
    """

    inverse_scale: Any
    shift: Any = None

    def __call__(self, x: Float[Array, "*lead K"]) -> Float[Array, "*lead K"]:
        """Returns the mapped input, in the dtype of `x`."""
        moved = x if self.shift is None else x - jnp.asarray(self.shift)
        return (moved * jnp.asarray(self.inverse_scale)).astype(x.dtype)


@partial(
    jax.tree_util.register_dataclass, data_fields=["signs", "matrix"], meta_fields=["kind", "size"]
)
@dataclasses.dataclass(frozen=True)
class Rotation:
    """`x' = (x * signs) R`, R orthogonal and block-diagonal in blocks of `size` channels.

    Attributes:
        kind: `"regular"` or `"hadamard"`, see `hadamard`; `"dense"` for `matrix`.
        size: channels of a block; it divides K.
        signs: `[K]` of 1 and -1, or None.
        matrix: `[K / size, size, size]`, orthonormal, of a dense rotation; else None.
    """

    kind: str
    size: int
    signs: Any = None
    matrix: Any = None

    def __call__(self, x: Float[Array, "*lead K"]) -> Float[Array, "*lead K"]:
        """Returns the rotated input, in the dtype of `x`.

        Raises:
            ValueError: if `size` does not divide K, or the kind is unknown.
        """
        if x.shape[-1] % self.size:
            raise ValueError(
                f"size={self.size} of a rotation does not divide {x.shape[-1]} channels."
            )
        if self.signs is not None:
            x = x * jnp.asarray(self.signs).astype(x.dtype)
        blocks = x.reshape(*x.shape[:-1], -1, self.size)
        if self.matrix is not None:
            turned = jnp.einsum("...bi,bij->...bj", blocks, jnp.asarray(self.matrix, x.dtype))
            return turned.reshape(x.shape)
        for matrix in reversed(factors(self.kind, self.size)):
            # Rotates the fastest axis and makes it the slowest, so that every factor gets its own.
            blocks = blocks.reshape(*x.shape[:-1], x.shape[-1] // self.size, -1, len(matrix))
            blocks = jnp.swapaxes(blocks @ jnp.asarray(matrix, x.dtype), -1, -2)
        return blocks.reshape(x.shape)

    def of_kernel(self, kernel: Float[Array, "K N"]) -> Float[Array, "K N"]:
        """Returns `Rᵀ W`, with which the rotated input gives the layer's output."""
        return self(kernel.T).T


@partial(jax.tree_util.register_dataclass, data_fields=["down", "up"], meta_fields=["subspace"])
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A product of rank R in 16 bits beside the quantized one: `x @ down @ up`.

    Attributes:
        down: `[K, R]`.
        up: `[R, N]`.
        subspace: whether `down` is orthonormal and the quantized product sees `x` without its part
            in those R directions.
    """

    down: Any
    up: Any
    subspace: bool = False

    def __call__(self, x: Float[Array, "*lead K"]) -> Float[Array, "*lead N"]:
        """Returns the product, in the dtype of `x`."""
        return (x @ jnp.asarray(self.down, x.dtype)) @ jnp.asarray(self.up, x.dtype)

    def rest(self, x: Float[Array, "*lead K"]) -> Float[Array, "*lead K"]:
        """Returns what of `x` the quantized product sees."""
        if not self.subspace:
            return x
        down = jnp.asarray(self.down, x.dtype)
        return x - (x @ down) @ down.T
