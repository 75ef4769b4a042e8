"""The layers that every transformer here is built from.

`Linear` is the only place where a kernel leaf, array or `QTensor`, is consumed.
Dimensions: B batch, T tokens, D width, K input channels, N output channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Num

from qdit_jax.kernels import attention, quantized_matmul
from qdit_jax.quant import QTensor, Role, dequantize, select_columns, slots

Initializer = Callable[..., Any]
xavier: Initializer = nn.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class Layers:
    """What a network builds its layers with: how they compute is said here and nowhere else.

    A network passes it on to its parts, which say `layers.linear(width, name="fc1")`.

    Attributes:
        numerics, implementation: of quantized products, see `kernels.quantized_matmul`.
    """

    numerics: str = "simulated"
    implementation: str | None = None

    def linear(
        self,
        features: int,
        kernel_init: Initializer = xavier,
        kernel_shape: tuple[int, ...] | None = None,
        *,
        name: str,
    ) -> Linear:
        """Returns a `Linear` that computes this way; the arguments are its fields."""
        return Linear(
            features, kernel_init, kernel_shape, self.numerics, self.implementation, name=name
        )


class NetworkModule(nn.Module, kw_only=True):
    """A network with linear layers: how it runs is not part of the configuration it stores.

    Attributes:
        numerics: what quantized layers compute, `"simulated"` or `"integer"`.
        implementation: who computes them, a name in `kernels.IMPLEMENTATIONS`; None: what fits.
    """

    numerics: str = "simulated"
    implementation: str | None = None

    @property
    def layers(self) -> Layers:
        """What the parts of the network are built with."""
        return Layers(self.numerics, self.implementation)


class Linear(nn.Module):
    """Returns `x @ kernel + bias` over the last axis, full precision or quantized.

    Params: `kernel` (array `[..., N]` whose leading axes flatten to K, or a `QTensor`), `bias [N]`,
    and the slots of `quant.LEAVES` that are present: `act_quant` (an `ActQuant`) quantizes the input.
    `numerics` is `"simulated"` (float arithmetic on the quantized grid) or `"integer"`, and
    `implementation` who computes it; see `kernels.quantized_matmul`.
    """

    features: int
    kernel_init: Initializer = xavier
    kernel_shape: tuple[int, ...] | None = None
    numerics: str = "simulated"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch K"]) -> Float[Array, "*batch N"]:
        shape = self.kernel_shape or (x.shape[-1], self.features)
        kernel = stored(self, "kernel", self.kernel_init, shape)
        bias = stored(self, "bias", nn.initializers.zeros_init(), (self.features,))
        x = mapped_input(self, x)
        if isinstance(kernel, QTensor):
            act_quant = optional(self, "act_quant")
            rest = input_left(self, x)
            y = quantized_matmul(rest, kernel, act_quant, self.numerics, self.implementation)
            return with_outputs(self, x, y + bias.astype(y.dtype))
        seen = quantized_input(self, x)
        # Two axes: on CPU the gradient of a product over [B, T, K] is twice as slow.
        rows = seen.reshape(-1, x.shape[-1]) @ kernel.reshape(-1, self.features).astype(x.dtype)
        y = (rows + bias.astype(x.dtype)).reshape(*x.shape[:-1], self.features)
        return with_outputs(self, x, y)


def mapped_input(module: nn.Module, x: Array) -> Array:
    """Returns a layer's input after its input leaves, if it has any."""
    for leaf in leaves_of(module, "input"):
        x = leaf(x)
    return x


def input_left(module: nn.Module, x: Array) -> Array:
    """Returns what the layer's output leaves leave of a mapped input to the kernel's product."""
    for leaf in leaves_of(module, "output"):
        x = leaf.rest(x)
    return x


def quantized_input(module: nn.Module, x: Array) -> Array:
    """Returns what the kernel is multiplied with: of a mapped input, after the quantizer if any."""
    x = input_left(module, x)
    for leaf in leaves_of(module, "quantizer"):
        x = leaf(x)
    return x


def with_outputs(module: nn.Module, x: Array, y: Array) -> Array:
    """Returns a layer's output `y` with what its output leaves make of the mapped input added."""
    for leaf in leaves_of(module, "output"):
        y = y + leaf(x).astype(y.dtype)
    return y


def leaves_of(module: nn.Module, role: Role) -> list[Any]:
    """Returns the leaves of that role that stand beside a layer's kernel, in the table's order."""
    found = (optional(module, slot) for slot in slots(role))
    return [leaf for leaf in found if leaf is not None]


def stored(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...]) -> Any:
    """Returns the param `name` as it is stored, whatever its type; creates it during `init`.

    Differs from `module.param` in that a quantized leaf's shape is not compared with `shape`.
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
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B T D"]:
        p, c = self.patch_size, x.shape[-1]
        patches = rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
        return self.layers.linear(
            self.hidden_size,
            kernel_init=flat_xavier,
            kernel_shape=(p, p, c, self.hidden_size),
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

    @nn.compact
    def __call__(self, timestep: Num[Array, " B"]) -> Float[Array, "B D"]:
        init = nn.initializers.normal(0.02)
        hidden = timestep_features(timestep, frequency_shift=self.frequency_shift)
        hidden = self.layers.linear(self.hidden_size, init, name="mlp_0")(hidden)
        return self.layers.linear(self.hidden_size, init, name="mlp_2")(nn.silu(hidden))


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
            found = dequantize(select_columns(table, row)).T
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
        q: Float[Array, "B Q H D"],
        k: Float[Array, "B T H D"],
        v: Float[Array, "B T H D"],
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "B Q H D"]:
        """Returns the attention of its operands, rounded where they have quantizers.

        `mask` is True where a query may look, as in `kernels.attention`.
        """
        q, k, v = (self.operand(name, a) for name, a in (("q", q), ("k", k), ("v", v)))
        weights_fn = partial(self.operand, "softmax") if self.sees_weights() else None
        return attention(q, k, v, mask, weights_fn=weights_fn)

    def operand(self, name: str, x: Array) -> Array:
        """Returns an operand of a product, rounded where it has a quantizer."""
        quantizer = optional(self, f"{name}_quant")
        return x if quantizer is None else quantizer(x)

    def sees_weights(self) -> bool:
        """Returns whether the softmax is rounded, or recorded by who intercepts this method."""
        return optional(self, "softmax_quant") is not None


class Attention(AttentionModule):
    """Returns multi-head self-attention with the published names `qkv` and `proj`."""

    num_heads: int
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        d = x.shape[-1]
        qkv = self.layers.linear(3 * d, name="qkv")(x)
        q, k, v = rearrange(qkv, "b t (qkv h d) -> qkv b t h d", qkv=3, h=self.num_heads)
        joined = rearrange(self.attend(q, k, v), "b t h d -> b t (h d)")
        return self.layers.linear(d, name="proj")(joined)


class Mlp(nn.Module):
    """Returns `fc2(gelu(fc1(x)))` with the tanh form of GELU."""

    hidden_size: int
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        hidden = nn.gelu(self.layers.linear(self.hidden_size, name="fc1")(x), approximate=True)
        return self.layers.linear(x.shape[-1], name="fc2")(hidden)


def layer_norm(x: Float[Array, "B T D"], eps: float = 1e-6) -> Float[Array, "B T D"]:
    """Returns `x` normalized over its last axis, without affine parameters."""
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
