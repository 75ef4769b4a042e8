"""What comes before a product: a norm without parameters and its modulation, and a scale of every channel.

A network that says so (`Modulated`, in place of an array) lets a kernel compute it as it quantizes; XLA would
write it, in float32, and read it several times. So does a layer that scales its input's channels (`Mapped`).
All else computes them as ever (`plain`).

Dimensions: B samples, T tokens, K input channels.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qdit_jax.kernels.refs import Ref
from qdit_jax.quant import InputMap


def normalized(x: Float[Array, "*batch K"], eps: float) -> Float[Array, "*batch K"]:
    """Returns `x` less its mean and divided by its standard deviation, over the last axis."""
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + eps)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["x", "modulation"],
    meta_fields=["shift", "scale", "eps"],
)
@dataclasses.dataclass(frozen=True)
class Modulated:
    """The array `norm(x) * (1 + scale) + shift`, not yet computed.

    Attributes:
        x: `[B, *T, K]`.
        modulation: `[B, P K]`, for all tokens of a sample; P parts, such as shift, scale and gate.
        shift, scale: which parts they are.
        eps: of the norm.
    """

    # Any: `jax.tree.map` and `jax.eval_shape` put other leaves here than arrays.
    x: Any
    modulation: Any
    shift: int
    scale: int
    eps: float = 1e-6

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def dtype(self) -> np.dtype:
        """float32 or wider."""
        return np.dtype(jnp.promote_types(self.x.dtype, jnp.float32))

    @property
    def tokens_per_sample(self) -> int:
        """How many tokens have one modulation."""
        return self.x.size // self.x.shape[-1] // len(self.modulation)

    def array(self) -> Float[Array, "B *T K"]:
        """Returns it, computed by XLA."""
        parts = jnp.split(self.modulation, self.modulation.shape[-1] // self.shape[-1], axis=-1)
        lead = (len(self.modulation), *(1,) * (self.x.ndim - 2), -1)
        shift, scale = (parts[i].reshape(lead) for i in (self.shift, self.scale))
        return normalized(self.x.astype(self.dtype), self.eps) * (1 + scale) + shift


@partial(jax.tree_util.register_dataclass, data_fields=["x", "map"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Mapped:
    """What an `InputMap` makes of an array or of a norm, not yet computed.

    Attributes:
        x: `[*lead, K]`.
        map: of its channels.
    """

    # Any: `jax.tree.map` and `jax.eval_shape` put other leaves here than arrays.
    x: Any
    map: InputMap

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.x.dtype)

    def array(self) -> Float[Array, "*lead K"]:
        """Returns it, computed by XLA."""
        return self.map(plain(self.x))


# What is computed as it is quantized, in place of an array.
Pending = Modulated | Mapped


def plain(x: Array | Pending) -> Array:
    """Returns an array, computed if it was not."""
    return x.array() if isinstance(x, Modulated | Mapped) else x


def unmapped(x: Array | Pending) -> Array | Modulated:
    """Returns an input before its channels are mapped, if they are."""
    return x.x if isinstance(x, Mapped) else x


def norm_before(x: Array | Pending) -> Modulated | None:
    """Returns the norm that an input begins with, if there is one."""
    source = unmapped(x)
    return source if isinstance(source, Modulated) else None


def source_of(x: Array | Pending) -> Array:
    """Returns the array that an input begins with."""
    source = unmapped(x)
    return source.x if isinstance(source, Modulated) else source


class Norm(NamedTuple):
    """What is static of a `Modulated`, and how many tokens have one modulation."""

    shift: int
    scale: int
    eps: float
    tokens_per_sample: int


class Before(NamedTuple):
    """What is static of what comes before the quantizer: a norm, then arrays of an `InputMap`."""

    norm: Norm | None
    num_maps: int


def operands_of(x: Float[Array, "*lead K"] | Pending) -> list[Array]:
    """Returns what a kernel reads: tokens `[M, K]`, of a norm its modulation, and what maps channels `[K]`."""
    norm, num_channels = norm_before(x), x.shape[-1]
    modulation = [] if norm is None else [norm.modulation]
    maps = [jnp.asarray(values, jnp.float32) for values in maps_of(x)]
    return [source_of(x).reshape(-1, num_channels), *modulation, *maps]


def maps_of(x: Float[Array, "*lead K"] | Pending) -> list[Float[Array, " K"]]:
    """Returns the arrays of an `InputMap`: its scale of channels, and its shift if any."""
    if not isinstance(x, Mapped):
        return []
    return [x.map.inverse_scale, *([] if x.map.shift is None else [x.map.shift])]


def before_of(x: Float[Array, "*lead K"] | Pending) -> Before:
    """Returns what is static of what comes before the quantizer."""
    norm, num_maps = norm_before(x), len(maps_of(x))
    if norm is None:
        return Before(None, num_maps)
    return Before(Norm(norm.shift, norm.scale, norm.eps, norm.tokens_per_sample), num_maps)


def split_refs(refs: tuple[Ref, ...], before: Before) -> tuple[tuple[Ref, ...], ...]:
    """Returns the modulation (one or none), the arrays of a map, and the rest of what a kernel is given."""
    first = int(before.norm is not None)
    return refs[:first], refs[first : first + before.num_maps], refs[first + before.num_maps :]
