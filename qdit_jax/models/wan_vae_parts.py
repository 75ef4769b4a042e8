"""The halves of Wan's video autoencoders, which code a clip piece by piece.

A convolution over time sees frames before, never after: frame 0 is coded alone, then a piece of
frames at a time, and each convolution keeps the two frames that it saw last, in the collection
`CACHE`.

Layer names follow diffusers' port; a list index becomes `_i`.
Dimensions: B batch, F frames of a piece, G frames of what is made of it, H and W rows and columns, h
and w latent ones, C channels, Z latent channels.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from qdit_jax.kernels import attention
from qdit_jax.models.linear import Linear

CACHE = "cache"  # the collection of variables that a piece leaves for the next one
KEPT = 2  # frames that a convolution of 3 frames keeps


class ChannelNorm(nn.Module):
    """Returns `x / |x| * sqrt(C) * gamma`, the norm over the channels of a position."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
        gamma = self.param("gamma", nn.initializers.ones_init(), (x.shape[-1],))
        length = jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))
        return x / jnp.maximum(length, 1e-12) * math.sqrt(x.shape[-1]) * gamma


class CausalConv(nn.Module):
    """Returns a convolution over the frames of a piece and those kept from before; zeros at first.

    With `waits` nothing is computed, and nothing seen: the next piece is the first one.
    """

    features: int
    size: tuple[int, int, int] = (3, 3, 3)

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W C"], waits: bool = False) -> Any:
        b, _, *rest = x.shape
        kept = self.variable(CACHE, "frames", jnp.zeros, (b, KEPT, *rest), x.dtype)
        if waits:
            return x
        shape = (*self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        seen = jnp.concatenate([kept.value, x], axis=1)
        kept.value = seen[:, -KEPT:]
        padding = [(0, 0), *((n // 2, n // 2) for n in self.size[1:])]
        order = ("NDHWC", "DHWIO", "NDHWC")
        return bias + jax.lax.conv_general_dilated(
            seen, kernel, (1, 1, 1), padding, dimension_numbers=order
        )


class ResidualBlock(nn.Module):
    """Returns `x` plus two normed convolutions; a shortcut where the width changes."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W C"]) -> Float[Array, "B F H W D"]:
        hidden = CausalConv(self.features, name="conv1")(nn.silu(ChannelNorm(name="norm1")(x)))
        hidden = CausalConv(self.features, name="conv2")(nn.silu(ChannelNorm(name="norm2")(hidden)))
        if x.shape[-1] != self.features:
            x = Linear(self.features, name="conv_shortcut")(x)
        return x + hidden


class FrameAttention(nn.Module):
    """Returns `x` plus single-head attention over the positions of each frame."""

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W C"]) -> Float[Array, "B F H W C"]:
        c = x.shape[-1]
        tokens = rearrange(ChannelNorm(name="norm")(x), "b f h w c -> (b f) (h w) 1 c")
        q, k, v = jnp.split(Linear(3 * c, name="to_qkv")(tokens), 3, axis=-1)
        out = Linear(c, name="proj")(attention(q, k, v))
        return x + out.reshape(x.shape)


class MidBlock(nn.Module):
    """Returns the narrowest feature map after a block, attention, and a block."""

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W C"]) -> Float[Array, "B F H W C"]:
        x = ResidualBlock(x.shape[-1], name="resnets_0")(x)
        x = FrameAttention(name="attentions_0")(x)
        return ResidualBlock(x.shape[-1], name="resnets_1")(x)


class Downsample(nn.Module):
    """Returns half the rows and columns, and with `time` half the frames but for the first one."""

    time: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W C"], first: bool) -> Float[Array, "B G h w C"]:
        c = x.shape[-1]
        x = nn.Conv(c, (3, 3), strides=2, padding=((0, 1), (0, 1)), name="resample_1")(x)
        if not self.time:
            return x
        b, _, *rest = x.shape
        kept = self.variable(CACHE, "frame", jnp.zeros, (b, 1, *rest), x.dtype)
        seen = jnp.concatenate([kept.value, x], axis=1)
        kept.value = x[:, -1:]
        if first:
            return x
        halve = nn.Conv(c, (3, 1, 1), strides=(2, 1, 1), padding="VALID", name="time_conv")
        return halve(seen)


class Upsample(nn.Module):
    """Returns twice the rows and columns, and with `time` twice the frames but for the first one."""

    features: int
    time: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B F h w C"], first: bool) -> Float[Array, "B G H W D"]:
        if self.time:
            doubled = CausalConv(2 * x.shape[-1], (3, 1, 1), name="time_conv")(x, waits=first)
            x = doubled if first else rearrange(doubled, "b f h w (n c) -> b (f n) h w c", n=2)
        x = x.repeat(2, axis=2).repeat(2, axis=3)
        return nn.Conv(self.features, (3, 3), padding=((1, 1), (1, 1)), name="resample_1")(x)


def averaged(
    x: Float[Array, "B F H W C"], features: int, time: int, side: int
) -> Float[Array, "B G h w D"]:
    """Returns neighbors as channels, averaged in groups to `features`: a shortcut of a downsampling."""
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    x = rearrange(x, "b (f t) (h p) (w q) c -> b f h w (c t p q)", t=time, p=side, q=side)
    return x.reshape(*x.shape[:-1], features, -1).mean(-1)


def repeated(
    x: Float[Array, "B F h w C"], features: int, time: int, side: int, first: bool
) -> Float[Array, "B G H W D"]:
    """Returns channels as neighbors, repeated to `features`: a shortcut of an upsampling."""
    x = x.repeat(features * time * side**2 // x.shape[-1], axis=-1)
    pattern = "b f h w (c t p q) -> b (f t) (h p) (w q) c"
    x = rearrange(x, pattern, t=time, p=side, q=side)
    return x[:, time - 1 :] if first else x


class DownBlock(nn.Module):
    """Returns a feature map of `features` channels after blocks, one downsampling and a shortcut."""

    features: int
    num_blocks: int
    time: bool
    last: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W C"], first: bool) -> Float[Array, "B G h w D"]:
        shortcut = averaged(x, self.features, 1 + self.time, 1 if self.last else 2)
        for i in range(self.num_blocks):
            x = ResidualBlock(self.features, name=f"resnets_{i}")(x)
        if not self.last:
            x = Downsample(self.time, name="downsampler")(x, first)
        return x + shortcut


class Encoder(nn.Module):
    """Returns the moments of a piece's latents before `quant_conv`; `first` for frame 0."""

    widths: tuple[int, ...]
    num_blocks: int
    temporal: tuple[bool, ...]
    moments: int
    residual: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W C"], first: bool) -> Float[Array, "B G h w M"]:
        x = CausalConv(self.widths[0], name="conv_in")(x)
        number = 0
        for i, features in enumerate(self.widths[1:]):
            last = i == len(self.widths) - 2
            time = not last and self.temporal[i]
            if self.residual:
                block = DownBlock(features, self.num_blocks, time, last, name=f"down_blocks_{i}")
                x = block(x, first)
                continue
            for _ in range(self.num_blocks):
                x = ResidualBlock(features, name=f"down_blocks_{number}")(x)
                number += 1
            if not last:
                x = Downsample(time, name=f"down_blocks_{number}")(x, first)
                number += 1
        x = MidBlock(name="mid_block")(x)
        return CausalConv(self.moments, name="conv_out")(nn.silu(ChannelNorm(name="norm_out")(x)))


class UpBlock(nn.Module):
    """Returns a feature map of `features` channels, upsampled unless it is the last."""

    features: int
    num_blocks: int
    time: bool
    last: bool
    residual: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B F h w C"], first: bool) -> Float[Array, "B G H W D"]:
        before = x
        # The decoder has one block more than the encoder.
        for i in range(self.num_blocks + 1):
            x = ResidualBlock(self.features, name=f"resnets_{i}")(x)
        if self.last:
            return x
        if not self.residual:
            return Upsample(self.features // 2, self.time, name="upsamplers_0")(x, first)
        x = Upsample(self.features, self.time, name="upsampler")(x, first)
        return x + repeated(before, self.features, 1 + self.time, 2, first)


class Decoder(nn.Module):
    """Returns the frames of a piece of latents after `post_quant_conv`; `first` for frame 0."""

    widths: tuple[int, ...]
    num_blocks: int
    temporal: tuple[bool, ...]
    out_channels: int
    residual: bool

    @nn.compact
    def __call__(self, z: Float[Array, "B F h w Z"], first: bool) -> Float[Array, "B G H W C"]:
        x = CausalConv(self.widths[0], name="conv_in")(z)
        x = MidBlock(name="mid_block")(x)
        for i, features in enumerate(self.widths[1:]):
            last = i == len(self.widths) - 2
            time = not last and self.temporal[i]
            block = UpBlock(
                features, self.num_blocks, time, last, self.residual, name=f"up_blocks_{i}"
            )
            x = block(x, first)
        hidden = nn.silu(ChannelNorm(name="norm_out")(x))
        return CausalConv(self.out_channels, name="conv_out")(hidden)
