"""I3D (arXiv:1705.07750), the inflated Inception behind FVD, in the names of its common PyTorch port.

Its features of a video are the 400 logits of Kinetics, averaged over time, before the softmax, as the
published FVD takes them (arXiv:1812.01717).
Dimensions: B batch, T frames, H and W rows and columns, C channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from qdit_jax.models.inception import BATCH_NORM_EPS, resize_matrix
from qdit_jax.types import AnyArray

INPUT_SIZE = 224
LEAST_FRAMES = 9  # fewer are nothing after the last pool
NUM_CLASSES = 400

Axes = tuple[int, int, int]
# Of each block: width of branch 0; first and second of 1; of 2; of the pooled one.
BLOCKS: dict[str, tuple[int, int, int, int, int, int]] = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# The pools before blocks: name of the block -> (window, strides).
POOLS: dict[str, tuple[Axes, Axes]] = {
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


class BatchNorm(nn.Module):
    """Returns `x` normed by stored statistics; `mean` and `var` are params, as nothing trains here."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        inits = {"scale": ones, "bias": zeros, "mean": zeros, "var": ones}
        scale, bias, mean, var = (self.param(k, v, (x.shape[-1],)) for k, v in inits.items())
        return (x - mean) * (scale * jax.lax.rsqrt(var + BATCH_NORM_EPS)) + bias


class Unit3D(nn.Module):
    """Returns a convolution without bias, normed, after ReLU; padded as TensorFlow's `SAME`."""

    features: int
    kernel: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w D"]:
        sizes = (self.kernel,) * 3
        conv = nn.Conv(
            self.features, sizes, strides=(self.stride,) * 3, use_bias=False, name="conv3d"
        )
        return nn.relu(BatchNorm(name="bn")(conv(x)))


class Mixed(nn.Module):
    """Returns the four branches of a block, side by side."""

    widths: tuple[int, int, int, int, int, int]

    @nn.compact
    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W D"]:
        first, b1, b1b, b2, b2b, pooled = self.widths
        branches = [
            Unit3D(first, 1, name="b0")(x),
            Unit3D(b1b, 3, name="b1b")(Unit3D(b1, 1, name="b1a")(x)),
            Unit3D(b2b, 3, name="b2b")(Unit3D(b2, 1, name="b2a")(x)),
            Unit3D(pooled, 1, name="b3b")(max_pool(x, (3, 3, 3), (1, 1, 1))),
        ]
        return jnp.concatenate(branches, axis=-1)


def max_pool(
    x: Float[Array, "B T H W C"], window: Axes, strides: Axes
) -> Float[Array, "B t h w C"]:
    """Returns maxima; what lies outside does not count (all values here are 0 or more)."""
    return nn.max_pool(x, window, strides=strides, padding="SAME")


class I3D(nn.Module):
    """The network of FVD; `video_input` makes its input.

    `model.apply({"params": params}, x)` gives a dict of `pool [B, classes]`, the logits averaged over
    time.
    """

    num_classes: int = NUM_CLASSES

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct]:
        """Returns the shape of one input, for tracing shapes."""
        return (jax.ShapeDtypeStruct((1, 16, INPUT_SIZE, INPUT_SIZE, 3), jnp.float32),)

    @nn.compact
    def __call__(self, x: Float[AnyArray, "B T 224 224 3"]) -> dict[str, Array]:
        found: Array = Unit3D(64, 7, 2, name="Conv3d_1a_7x7")(jnp.asarray(x))
        found = max_pool(found, (1, 3, 3), (1, 2, 2))
        found = Unit3D(64, 1, name="Conv3d_2b_1x1")(found)
        found = Unit3D(192, 3, name="Conv3d_2c_3x3")(found)
        for name, widths in BLOCKS.items():
            if name in POOLS:
                found = max_pool(found, *POOLS[name])
            found = Mixed(widths, name=name)(found)
        found = nn.avg_pool(found, (2, 7, 7), strides=(1, 1, 1))
        logits = LastUnit(self.num_classes, name="logits")(found)
        return {"pool": logits.mean((1, 2, 3))}


class LastUnit(nn.Module):
    """Returns the classes' logits of every position: a convolution of one position, with bias."""

    num_classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W N"]:
        return nn.Conv(self.num_classes, (1, 1, 1), name="conv3d")(x)


def video_input(videos: UInt8[AnyArray, "B T H W C"]) -> Float[Array, "B T 224 224 3"]:
    """Returns the network's input for uint8 videos; gray ones are repeated to three channels.

    Bilinear resizing, sample `i` at `(i + 0.5) * H / 224 - 0.5`, no smoothing; then `x / 127.5 - 1`.

    Raises:
        ValueError: if there are neither 1 nor 3 channels, or fewer than 9 frames.
    """
    if videos.ndim != 5 or videos.shape[-1] not in (1, 3) or videos.shape[1] < LEAST_FRAMES:
        raise ValueError(
            f"videos have shape {videos.shape}; I3D takes [B, T, H, W, 1 or 3] with {LEAST_FRAMES} "
            "frames or more."
        )
    x = jnp.broadcast_to(jnp.asarray(videos, jnp.float32), (*videos.shape[:4], 3))
    rows, columns = (resize_matrix(n, half_pixel=True, to=INPUT_SIZE) for n in videos.shape[2:4])
    precision = jax.lax.Precision.HIGHEST
    x = jnp.einsum("ih,bthwc,jw->btijc", rows, x, columns, precision=precision)
    return x / 127.5 - 1
