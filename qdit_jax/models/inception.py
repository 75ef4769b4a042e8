"""The Inception network behind FID: the 2015 TensorFlow graph, in the names of its PyTorch port.

It differs from the later InceptionV3 in its average pools, which leave the padding out, in a max
pool in the last block, and in 1,008 classes. Batch norm is not folded into the convolution: its
four vectors are parameters of their own.
Dimensions: B batch, H and W rows and columns, C channels.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from qdit_jax.types import AnyArray

INPUT_SIZE = 299
NUM_CLASSES = 1008
BATCH_NORM_EPS = 1e-3
SPATIAL_CHANNELS = 7

Kernel = tuple[int, int]
Layers = tuple[tuple[str, int, Kernel], ...]


class BatchNorm(nn.Module):
    """Returns `x` normed by stored statistics; `mean` and `var` are params, as nothing trains here."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        inits = {"scale": ones, "bias": zeros, "mean": zeros, "var": ones}
        scale, bias, mean, var = (self.param(k, v, (x.shape[-1],)) for k, v in inits.items())
        return (x - mean) * (scale * jax.lax.rsqrt(var + BATCH_NORM_EPS)) + bias


class ConvUnit(nn.Module):
    """Returns a convolution without bias, normed, after ReLU."""

    features: int
    kernel: Kernel
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        x = nn.Conv(
            self.features,
            self.kernel,
            strides=self.stride,
            padding=self.padding,
            use_bias=False,
            name="conv",
        )(x)
        return nn.relu(BatchNorm(name="bn")(x))


# Halves the size; the published graph pads nothing there.
Reduction = partial(ConvUnit, kernel=(3, 3), stride=2, padding="VALID")


def average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Returns means over 3x3 windows, at the border over the positions inside the map only."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Returns maxima over 3x3 windows, keeping the size."""
    return nn.max_pool(x, (3, 3), padding="SAME")


def halving_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Returns maxima over 3x3 windows, every second one."""
    return nn.max_pool(x, (3, 3), strides=(2, 2))


def chain(x: Float[Array, "B H W C"], layers: Layers) -> Float[Array, "B H W D"]:
    """Returns `x` after units of the given names, widths and kernels; inside a compact method."""
    for name, features, kernel in layers:
        x = ConvUnit(features, kernel, name=name)(x)
    return x


class BlockA(nn.Module):
    """Returns the 35x35 block: 1x1, 5x5, double 3x3 and pooled branches."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        double = (
            ("branch3x3dbl_1", 64, (1, 1)),
            *((f"branch3x3dbl_{i}", 96, (3, 3)) for i in (2, 3)),
        )
        branches = [
            chain(x, (("branch1x1", 64, (1, 1)),)),
            chain(x, (("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5)))),
            chain(x, double),
            chain(average_pool(x), (("branch_pool", self.pool_features, (1, 1)),)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockB(nn.Module):
    """Returns the block from 35x35 to 17x17."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        double = chain(x, (("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3))))
        branches = [
            Reduction(384, name="branch3x3")(x),
            Reduction(96, name="branch3x3dbl_3")(double),
            halving_pool(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockC(nn.Module):
    """Returns the 17x17 block of factorized 7x7 convolutions, and its 1x1 branch alone."""

    width: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"]
    ) -> tuple[Float[Array, "B H W D"], Float[Array, "B H W E"]]:
        w, row, column = self.width, (1, 7), (7, 1)
        single = (("branch7x7_1", w, (1, 1)), ("branch7x7_2", w, row), ("branch7x7_3", 192, column))
        double = (
            ("branch7x7dbl_1", w, (1, 1)),
            ("branch7x7dbl_2", w, column),
            ("branch7x7dbl_3", w, row),
            ("branch7x7dbl_4", w, column),
            ("branch7x7dbl_5", 192, row),
        )
        branches = [
            chain(x, (("branch1x1", 192, (1, 1)),)),
            chain(x, single),
            chain(x, double),
            chain(average_pool(x), (("branch_pool", 192, (1, 1)),)),
        ]
        return jnp.concatenate(branches, axis=-1), branches[0]


class BlockD(nn.Module):
    """Returns the block from 17x17 to 8x8."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        factorized = (
            ("branch7x7x3_1", 192, (1, 1)),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
        )
        branches = [
            Reduction(320, name="branch3x3_2")(chain(x, (("branch3x3_1", 192, (1, 1)),))),
            Reduction(192, name="branch7x7x3_4")(chain(x, factorized)),
            halving_pool(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockE(nn.Module):
    """Returns the 8x8 block; its pooled branch averages, in the last block it takes maxima."""

    max_pooled: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        single = chain(x, (("branch3x3_1", 384, (1, 1)),))
        double = chain(x, (("branch3x3dbl_1", 448, (1, 1)), ("branch3x3dbl_2", 384, (3, 3))))
        pooled = max_pool(x) if self.max_pooled else average_pool(x)
        branches = [
            chain(x, (("branch1x1", 320, (1, 1)),)),
            chain(single, (("branch3x3_2a", 384, (1, 3)),)),
            chain(single, (("branch3x3_2b", 384, (3, 1)),)),
            chain(double, (("branch3x3dbl_3a", 384, (1, 3)),)),
            chain(double, (("branch3x3dbl_3b", 384, (3, 1)),)),
            chain(pooled, (("branch_pool", 192, (1, 1)),)),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV3(nn.Module):
    """The network of FID; `preprocess` makes its input.

    `model.apply({"params": params}, x)` gives a dict:
        `pool [B, 2048]`: pool_3, for FID, KID, precision and recall;
        `spatial [B, 2023]`: the first 7 channels of mixed_6/conv, 17x17, row-major, for sFID;
        `logits [B, 1008]`;
        `probabilities [B, 1008]`: the softmax *without* the classifier's bias, as the published
        evaluator computes its Inception Score.
    """

    num_classes: int = NUM_CLASSES

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct]:
        """Returns the shape of one input, for tracing shapes."""
        return (jax.ShapeDtypeStruct((1, INPUT_SIZE, INPUT_SIZE, 3), jnp.float32),)

    @nn.compact
    def __call__(self, x: Float[AnyArray, "B 299 299 3"]) -> dict[str, Array]:
        x = stem(jnp.asarray(x))
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = BlockA(pool_features, name=name)(x)
        x = BlockB(name="Mixed_6a")(x)
        columns = {}
        for name, width in (
            ("Mixed_6b", 128),
            ("Mixed_6c", 160),
            ("Mixed_6d", 160),
            ("Mixed_6e", 192),
        ):
            x, columns[name] = BlockC(width, name=name)(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(False, name="Mixed_7b")(x)
        x = BlockE(True, name="Mixed_7c")(x)
        pool = x.mean((1, 2))
        # The graph's "mixed_6/conv" is the 1x1 branch of the port's Mixed_6d, after ReLU.
        spatial = columns["Mixed_6d"][..., :SPATIAL_CHANNELS]
        classifier = nn.Dense(self.num_classes, name="fc")
        logits = classifier(pool)
        bias = classifier.variables["params"]["bias"]
        return {
            "pool": pool,
            "spatial": spatial.reshape(len(x), -1),
            "logits": logits,
            "probabilities": jax.nn.softmax(logits - bias, axis=-1),
        }


def stem(x: Float[Array, "B 299 299 3"]) -> Float[Array, "B 35 35 192"]:
    """Returns the feature map before the first block; inside a compact method."""
    x = ConvUnit(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
    x = ConvUnit(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
    x = halving_pool(ConvUnit(64, (3, 3), name="Conv2d_2b_3x3")(x))
    x = ConvUnit(80, (1, 1), 1, "VALID", name="Conv2d_3b_1x1")(x)
    return halving_pool(ConvUnit(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x))


def preprocess(
    images: UInt8[AnyArray, "B H W C"], *, half_pixel: bool = False
) -> Float[Array, "B 299 299 3"]:
    """Returns the network's input for uint8 images; gray ones are repeated to three channels.

    By default as the published evaluator: TensorFlow's first bilinear resizing, whose sample `i`
    lies at `i * H / 299`, and `(x - 128) / 128`. With `half_pixel`, as the common PyTorch port:
    sample `i` at `(i + 0.5) * H / 299 - 0.5`, and `x / 127.5 - 1`. Neither smooths when it shrinks.
    The two give different features; compare only scores of one kind.

    Raises:
        ValueError: if there are neither 1 nor 3 channels.
    """
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"images have shape {images.shape}; they must have 1 or 3 channels.")
    x = jnp.broadcast_to(jnp.asarray(images, jnp.float32), (*images.shape[:3], 3))
    rows, columns = (resize_matrix(n, half_pixel) for n in images.shape[1:3])
    precision = jax.lax.Precision.HIGHEST
    x = jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns, precision=precision)
    return x / 127.5 - 1 if half_pixel else (x - 128) / 128


def resize_matrix(
    size: int, half_pixel: bool, to: int = INPUT_SIZE
) -> Float[np.ndarray, "to size"]:
    """Returns the weights of `size` pixels in each of the `to` samples of bilinear resizing."""
    target = np.arange(to, dtype=np.float64)
    position = (target + 0.5) * (size / to) - 0.5 if half_pixel else target * (size / to)
    position = np.clip(position, 0, size - 1)
    lower = np.minimum(np.floor(position).astype(int), max(size - 2, 0))
    weights = np.zeros((to, size))
    rows = np.arange(to)
    weights[rows, lower] = 1 - (position - lower)
    weights[rows, np.minimum(lower + 1, size - 1)] += position - lower
    return weights.astype(np.float32)
