"""The parts that every transformer here is built from.

Dimensions: B batch, T tokens, D width, K input channels, N output channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Num

from qdit_jax.kernels import GELU, Gated, Modulated, attention
from qdit_jax.models.linear import Layers, optional, stored, xavier
from qdit_jax.quant import QTensor, select_columns, weight_rows
from qdit_jax.types import AnyArray


class PatchEmbed(nn.Module):
    """Returns one token per `patch_size x patch_size` patch, row-major: `[B, T, D]`.

    Of a video `[B, F, H, W, C]` these are the tokens of every frame, `[B, F, T, D]`.
    """

    hidden_size: int
    patch_size: int
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, x: Float[Array, "B *F H W C"]) -> Float[Array, "B *F T D"]:
        p, c = self.patch_size, x.shape[-1]
        patches = rearrange(x, "... (h p) (w q) c -> ... (h w) (p q c)", p=p, q=p)
        return self.layers.linear(
            self.hidden_size,
            kernel_init=flat_xavier,
            kernel_shape=(p, p, c, self.hidden_size),
            wide_output=True,
            name="proj",
        )(patches)


def flat_xavier(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Returns Xavier-uniform values for a convolution kernel seen as a matrix `[p*p*C, D]`."""
    flat = (math.prod(shape[:-1]), shape[-1])
    return xavier(key, flat, dtype).reshape(shape)


class TimestepEmbedder(nn.Module):
    """Returns the conditioning vector of timesteps, through sinusoids and a two-layer MLP."""

    hidden_size: int
    frequency_shift: int = 0
    layers: Layers = Layers()
    width: int = 256

    @nn.compact
    def __call__(self, timestep: Num[Array, "*batch"]) -> Float[Array, "*batch D"]:
        features = timestep_features(timestep, self.width, self.frequency_shift)
        return silu_mlp(features, self.hidden_size, self.layers)


class VectorEmbedder(nn.Module):
    """Returns the conditioning vector of a vector, through a two-layer MLP with SiLU."""

    hidden_size: int
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch K"]) -> Float[Array, "*batch D"]:
        return silu_mlp(x, self.hidden_size, self.layers)


def silu_mlp(
    x: Float[Array, "*batch K"], hidden_size: int, layers: Layers
) -> Float[Array, "*batch D"]:
    """Returns `mlp_2(silu(mlp_0(x)))`; the layers belong to the module that calls."""
    init = nn.initializers.normal(0.02)
    hidden = layers.linear(hidden_size, init, name="mlp_0")(x)
    return layers.linear(hidden_size, init, wide_output=True, name="mlp_2")(nn.silu(hidden))


def timestep_features(
    timestep: Num[Array, "*batch"], width: int = 256, frequency_shift: int = 0
) -> Float[Array, "*batch width"]:
    """Returns sinusoidal features, cosines first, with frequencies `1e4 ** (-i / (width/2 - shift))`.

    `frequency_shift` is 0 in the published DiT and 1 in the diffusers port.
    """
    half = width // 2
    exponent = -math.log(10_000) * np.arange(half, dtype=np.float32) / (half - frequency_shift)
    angles = timestep.astype(jnp.float32)[..., None] * jnp.exp(jnp.asarray(exponent))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class LabelEmbedder(nn.Module):
    """Returns the embedding of class labels; the last row is the null class when there is one.

    `embedding_table` is an array `[rows, D]`, or a `QTensor` `[D, rows]`. A label that is not a row is
    refused, or, where it is traced, embedded as NaN: it is never another class.
    """

    num_rows: int
    hidden_size: int

    @nn.compact
    def __call__(self, label: Num[Array, " B"]) -> Float[Array, "B D"]:
        init = nn.initializers.normal(0.02)
        table = stored(self, "embedding_table", init, (self.num_rows, self.hidden_size))
        label = jnp.asarray(label)
        is_row = (label >= 0) & (label < self.num_rows)
        if not isinstance(is_row, jax.core.Tracer) and not bool(is_row.all()):
            raise ValueError(f"label {label} is out of range; rows are 0 to {self.num_rows - 1}.")
        row = jnp.clip(label, 0, self.num_rows - 1)
        if isinstance(table, QTensor):
            found = weight_rows(select_columns(table, row))
        else:
            found = jnp.asarray(table)[row]
        return jnp.where(is_row[:, None], found, jnp.nan)


class AttentionModule(nn.Module):
    """A module with the two products of attention, of any projections.

    `q_quant`, `k_quant`, `v_quant` and `softmax_quant` entries beside the params, where present,
    quantize the four operands of the two products (per head and token).
    """

    def attend(
        self,
        q: Float[Array, "B *G Q H D"],
        k: Float[Array, "B *G T H D"],
        v: Float[Array, "B *G T H D"],
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "B *G Q H D"]:
        """Returns the attention of its operands, rounded where they have quantizers.

        `mask` is True where a query may look, as in `kernels.attention`. Axes between the batch and
        the positions, such as the frames of a video, are so many attentions without a mask.
        """
        q, k, v = (self.operand(name, a) for name, a in (("q", q), ("k", k), ("v", v)))
        lead, heads = q.shape[:-3], q.shape[-2]

        def weights_fn(weights: Float[Array, "N H Q T"]) -> Float[Array, "N H Q T"]:
            # A quantizer may have scales for each sample: the batch alone comes first.
            by_sample = weights.reshape(*lead, heads, *weights.shape[-2:])
            return self.operand("softmax", by_sample).reshape(weights.shape)

        seen = weights_fn if self.sees_weights() else None
        one, other, third = (a.reshape(-1, *a.shape[-3:]) for a in (q, k, v))
        found = attention(one, other, third, mask, weights_fn=seen)
        return found.reshape(*q.shape[:-1], v.shape[-1])

    def operand(self, name: str, x: Array) -> Array:
        """Returns an operand of a product, rounded where it has a quantizer."""
        quantizer = optional(self, f"{name}_quant")
        if quantizer is None:
            return x
        return quantizer(x.astype(jnp.promote_types(x.dtype, jnp.float32)))

    def sees_weights(self) -> bool:
        """Returns whether the softmax is rounded, or recorded by who intercepts this method."""
        return optional(self, "softmax_quant") is not None


class Attention(AttentionModule):
    """Returns multi-head self-attention with the published names `qkv` and `proj`.

    `gated` is what it is added to.
    """

    num_heads: int
    layers: Layers = Layers()

    @nn.compact
    def __call__(
        self, x: Float[Array, "B *G T D"] | Modulated, gated: Gated | None = None
    ) -> Float[Array, "B *G T D"]:
        d = x.shape[-1]
        qkv = self.layers.linear(3 * d, name="qkv").fused_parts(x, 3)
        q, k, v = (rearrange(a, "... t (h d) -> ... t h d", h=self.num_heads) for a in qkv)
        joined = rearrange(self.attend(q, k, v), "... h d -> ... (h d)")
        return self.layers.linear(d, name="proj").fused(joined, gated=gated)


class Mlp(nn.Module):
    """Returns `fc2(gelu(fc1(x)))` with the tanh form of GELU, or the `exact` one.

    `features` are the output's channels, by default the input's. `wide_output` as in `Linear`.
    `gated` is what the result is added to.
    """

    hidden_size: int
    layers: Layers = Layers()
    features: int | None = None
    wide_output: bool = False
    exact: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch D"] | Modulated, gated: Gated | None = None
    ) -> Float[Array, "*batch N"]:
        first = self.layers.linear(self.hidden_size, name="fc1")
        hidden = nn.gelu(first.fused(x), approximate=False) if self.exact else first.fused(x, GELU)
        features = self.features or x.shape[-1]
        second = self.layers.linear(features, wide_output=self.wide_output, name="fc2")
        return second.fused(hidden, gated=gated)


def modulate(
    x: Float[Array, "B *T D"], shift: Float[Array, "B D"], scale: Float[Array, "B D"]
) -> Float[Array, "B *T D"]:
    """Returns `x * (1 + scale) + shift`, one shift and scale per sample and channel."""
    return x * (1 + over_tokens(scale, x)) + over_tokens(shift, x)


def over_tokens(values: Float[Array, "B D"], x: Float[Array, "B *T D"]) -> Float[Array, "B *one D"]:
    """Returns one vector per sample with axes of length 1 for the token axes of `x`."""
    return values.reshape(values.shape[0], *(1,) * (x.ndim - 2), values.shape[-1])


def over_time(
    module: Callable[..., Array], x: Float[Array, "B F S D"], *args: Any
) -> Float[Array, "B F S D"]:
    """Returns `module(x, *args)` with the frames as the axis that attends, one attention a position."""
    return jnp.swapaxes(module(jnp.swapaxes(x, 1, 2), *args), 1, 2)


def line_positions(width: int, positions: AnyArray) -> np.ndarray:
    """Returns the 1-D sin-cos table `[T, width]` of `positions [T]`: sines, then cosines."""
    frequencies = 10_000 ** -(np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def sincos_positions(
    width: int, height_width: tuple[int, int], steps: tuple[float, float] = (1.0, 1.0)
) -> np.ndarray:
    """Returns the 2-D sin-cos table `[T, D]`: first half the column, second the row; tokens row-major.

    `steps` are the distances of neighboring rows and columns, for grids that are stretched.
    """
    rows, columns = np.meshgrid(
        *(np.arange(n) * step for n, step in zip(height_width, steps, strict=True)), indexing="ij"
    )
    frequencies = 10_000 ** -(np.arange(width // 4, dtype=np.float64) / (width / 4))
    halves = []
    for position in (columns, rows):
        angles = position.reshape(-1, 1) * frequencies
        halves += [np.sin(angles), np.cos(angles)]
    return np.concatenate(halves, axis=1).astype(np.float32)
