"""Rotary position embedding on interleaved pairs of channels, over one or several axes.

Source: RoFormer, arXiv:2104.09864. Channels 2j and 2j + 1 are a pair `(a, b)`, turned by the angle
`position * base ** (-2j / width)` into `(a cos - b sin, a sin + b cos)`.

Dimensions: T tokens, A axes of position, D channels of a head, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qdit_jax.types import AnyArray


def rotary_angles(
    positions: AnyArray, widths: Sequence[int], base: float = 10_000.0
) -> Float[Array, "*batch T half"]:
    """Returns the angle of every pair of channels, the axes' own side by side.

    Known positions (NumPy) are multiplied in float64, traced ones in float32.

    Args:
        positions: `[..., T, A]`, one coordinate per axis.
        widths: even numbers of channels of each axis; their sum is the width of a head.

    Raises:
        ValueError: if a width is odd, or there is not one per axis.
    """
    if any(width % 2 for width in widths) or positions.shape[-1] != len(widths):
        raise ValueError(
            f"rope_axes={tuple(widths)} for positions of {positions.shape[-1]} axes: give one "
            "even number of channels per axis."
        )
    frequencies = [base ** (-np.arange(0, width, 2, dtype=np.float64) / width) for width in widths]
    if isinstance(positions, np.ndarray):
        angles = [positions[..., i, None] * f for i, f in enumerate(frequencies)]
        return jnp.asarray(np.concatenate(angles, -1) % (2 * np.pi), jnp.float32)
    wide = positions.astype(jnp.float32)
    return jnp.concatenate(
        [wide[..., i, None] * f.astype(np.float32) for i, f in enumerate(frequencies)], -1
    )


def rotated(
    x: Float[Array, "*batch T H D"], angles: Float[Array, "... T half"]
) -> Float[Array, "*batch T H D"]:
    """Returns `x` with every pair of channels turned by its angle, the same for all heads.

    The leading axes of `angles` broadcast: none where all samples have the same positions.
    """
    return pairs_turned(x, jnp.cos(angles), jnp.sin(angles))


def pairs_turned(
    x: Float[Array, "*batch T H D"],
    cos: Float[Array, "... T half"],
    sin: Float[Array, "... T half"],
) -> Float[Array, "*batch T H D"]:
    """Returns the same for given cosines and sines, such as those of a stored table."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    a, b = wide[..., 0::2], wide[..., 1::2]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def grid_positions(*sizes: int) -> np.ndarray:
    """Returns the coordinates `[T, A]` of a grid's points, the last axis fastest."""
    axes = np.meshgrid(*(np.arange(size) for size in sizes), indexing="ij")
    return np.stack([axis.reshape(-1) for axis in axes], -1)
