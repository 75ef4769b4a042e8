"""The layers that every transformer here is built from.

`Linear` is the only place where a kernel leaf, array or `QTensor`, is consumed.
Dimensions: B batch, T tokens, D width, K input channels, N output channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Num

from qdit_jax.kernels import quantized_matmul
from qdit_jax.quant import QTensor, dequantize, select_columns

Initializer = Callable[..., Any]


class Linear(nn.Module):
    """Returns `x @ kernel + bias` over the last axis, full precision or quantised.

    Params: `kernel` (array `[..., N]` whose leading axes flatten to K, or a `QTensor`), `bias [N]`,
    and optionally `act_quant` (an `ActQuant`), which quantises the input first.
    `execution` is `"simulated"` (float arithmetic on the quantised grid) or `"integer"`.
    """

    features: int
    execution: str = "simulated"
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    kernel_shape: tuple[int, ...] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch K"]) -> Float[Array, "*batch N"]:
        shape = self.kernel_shape or (x.shape[-1], self.features)
        kernel = stored(self, "kernel", self.kernel_init, shape)
        bias = stored(self, "bias", nn.initializers.zeros_init(), (self.features,))
        act_quant = optional(self, "act_quant")
        if isinstance(kernel, QTensor):
            y = quantized_matmul(x, kernel, act_quant, execution=self.execution)
            return y + bias.astype(y.dtype)
        if act_quant is not None:
            x = act_quant(x)
        # Two axes: on CPU the gradient of a product over [B, T, K] is twice as slow.
        rows = x.reshape(-1, x.shape[-1]) @ kernel.reshape(-1, self.features).astype(x.dtype)
        return (rows + bias.astype(x.dtype)).reshape(*x.shape[:-1], self.features)


def stored(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...]) -> Any:
    """Returns the param `name` as it is stored, whatever its type; creates it during `init`.

    Differs from `module.param` in that a quantised leaf's shape is not compared with `shape`.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape)


def optional(module: nn.Module, name: str) -> Any:
    """Returns the entry `name` beside a layer's params, or None when it is absent."""
    return module.get_variable("params", name) if module.has_variable("params", name) else None


class PatchEmbed(nn.Module):
    """Returns one token per `patch_size x patch_size` patch, row-major: `[B, T, D]`."""

    hidden_size: int
    patch_size: int
    execution: str = "simulated"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B T D"]:
        b, h, w, c = x.shape
        p = self.patch_size
        patches = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(b, (h // p) * (w // p), p * p * c)  # [B, T, p*p*C]
        return Linear(
            self.hidden_size,
            execution=self.execution,
            kernel_init=flat_xavier,
            kernel_shape=(p, p, c, self.hidden_size),
            name="proj",
        )(patches)


def flat_xavier(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Returns Xavier-uniform values for a convolution kernel seen as a matrix `[p*p*C, D]`."""
    flat = (math.prod(shape[:-1]), shape[-1])
    return nn.initializers.xavier_uniform()(key, flat, dtype).reshape(shape)


class TimestepEmbedder(nn.Module):
    """Returns the conditioning vector of timesteps, through sinusoids and a two-layer MLP."""

    hidden_size: int
    frequency_shift: int = 0
    execution: str = "simulated"

    @nn.compact
    def __call__(self, timestep: Num[Array, " B"]) -> Float[Array, "B D"]:
        init = nn.initializers.normal(0.02)
        hidden = timestep_features(timestep, frequency_shift=self.frequency_shift)
        hidden = Linear(self.hidden_size, self.execution, init, name="mlp_0")(hidden)
        return Linear(self.hidden_size, self.execution, init, name="mlp_2")(nn.silu(hidden))


def timestep_features(
    timestep: Num[Array, " B"], width: int = 256, frequency_shift: int = 0
) -> Float[Array, "B width"]:
    """Returns sinusoidal features, cosines first, with frequencies `1e4 ** (-i / (width/2 - shift))`.

    `frequency_shift` is 0 in the published DiT and 1 in the diffusers port.
    """
    half = width // 2
    exponent = -math.log(10_000) * np.arange(half, dtype=np.float32) / (half - frequency_shift)
    angles = timestep.astype(jnp.float32)[:, None] * jnp.exp(jnp.asarray(exponent))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class LabelEmbedder(nn.Module):
    """Returns the embedding of class labels; the last row is the null class when there is one.

    `embedding_table` is an array `[rows, D]`, or a `QTensor` `[D, rows]`. A label that is no row is
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
            found = dequantize(select_columns(table, row)).T
        else:
            found = jnp.asarray(table)[row]
        return jnp.where(is_row[:, None], found, jnp.nan)


class Attention(nn.Module):
    """Returns multi-head self-attention with the published names `qkv` and `proj`.

    `q_quant`, `k_quant`, `v_quant` and `softmax_quant` entries beside the params, where present,
    quantise the four operands of the two products (per head and token).
    """

    num_heads: int
    execution: str = "simulated"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        b, t, d = x.shape
        qkv = Linear(3 * d, self.execution, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(b, t, 3, self.num_heads, d // self.num_heads), 2, 0)
        q, k, v = (self.operand(name, a) for name, a in (("q", q), ("k", k), ("v", v)))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (d // self.num_heads) ** -0.5
        weights = self.operand("softmax", jax.nn.softmax(logits, axis=-1))
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, d)
        return Linear(d, self.execution, name="proj")(out)

    def operand(self, name: str, x: Array) -> Array:
        quantizer = optional(self, f"{name}_quant")
        return x if quantizer is None else quantizer(x)


class Mlp(nn.Module):
    """Returns `fc2(gelu(fc1(x)))` with the tanh form of GELU."""

    hidden_size: int
    execution: str = "simulated"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        hidden = nn.gelu(Linear(self.hidden_size, self.execution, name="fc1")(x), approximate=True)
        return Linear(x.shape[-1], self.execution, name="fc2")(hidden)


def layer_norm(x: Float[Array, "B T D"], eps: float = 1e-6) -> Float[Array, "B T D"]:
    """Returns `x` normalised over its last axis, without affine parameters."""
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + eps)


def modulate(
    x: Float[Array, "B T D"], shift: Float[Array, "B D"], scale: Float[Array, "B D"]
) -> Float[Array, "B T D"]:
    """Returns `x * (1 + scale) + shift`, one shift and scale per sample and channel."""
    return x * (1 + scale[:, None]) + shift[:, None]


def sincos_positions(width: int, height_width: tuple[int, int]) -> np.ndarray:
    """Returns the 2-D sin-cos table `[T, D]`: first half the column, second the row; tokens row-major."""
    rows, columns = np.meshgrid(
        *(np.arange(n, dtype=np.float64) for n in height_width), indexing="ij"
    )
    frequencies = 10_000 ** -(np.arange(width // 4, dtype=np.float64) / (width / 4))
    halves = []
    for position in (columns, rows):
        angles = position.reshape(-1, 1) * frequencies
        halves += [np.sin(angles), np.cos(angles)]
    return np.concatenate(halves, axis=1).astype(np.float32)
