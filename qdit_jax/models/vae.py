"""The autoencoder between images and latents (AutoencoderKL, as trained for latent diffusion).

Layer names follow the published checkpoints; a list index becomes `_i`.
Dimensions: B batch, H and W rows and columns, h and w latent rows and columns, C channels,
Z latent channels, T positions of a feature map.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from qdit_jax.kernels import attention
from qdit_jax.models.linear import Linear
from qdit_jax.types import AnyArray

EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


def group_norm(num_groups: int, name: str) -> nn.GroupNorm:
    """Returns the normalization layer used throughout, with a two-pass variance."""
    # The one-pass variance loses digits where a channel's mean exceeds its spread.
    return nn.GroupNorm(num_groups, epsilon=EPS, use_fast_variance=False, name=name)


def conv3x3(features: int, name: str) -> nn.Conv:
    """Returns a 3x3 convolution that keeps the size."""
    return nn.Conv(features, (3, 3), padding=((1, 1), (1, 1)), name=name)


class ResnetBlock(nn.Module):
    """Returns `x` plus two normed convolutions; a 1x1 shortcut where the width changes."""

    features: int
    num_groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        hidden = nn.silu(group_norm(self.num_groups, "norm1")(x))
        hidden = conv3x3(self.features, "conv1")(hidden)
        hidden = nn.silu(group_norm(self.num_groups, "norm2")(hidden))
        hidden = conv3x3(self.features, "conv2")(hidden)
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), name="conv_shortcut")(x)
        return x + hidden


class SpatialAttention(nn.Module):
    """Returns `x` plus single-head attention over all positions of the feature map."""

    num_groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        b, h, w, c = x.shape
        tokens = group_norm(self.num_groups, "group_norm")(x).reshape(b, h * w, c)
        q, k, v = (Linear(c, name=name)(tokens) for name in ("to_q", "to_k", "to_v"))
        q, k, v = (a[:, :, None] for a in (q, k, v))  # one head
        out = Linear(c, name="to_out_0")(attention(q, k, v)[:, :, 0])  # [B, T, C]
        return x + out.reshape(b, h, w, c)


class MidBlock(nn.Module):
    """Returns the narrowest feature map after a block, attention, and a block."""

    num_groups: int
    add_attention: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = ResnetBlock(x.shape[-1], self.num_groups, name="resnets_0")(x)
        if self.add_attention:
            x = SpatialAttention(self.num_groups, name="attentions_0")(x)
        return ResnetBlock(x.shape[-1], self.num_groups, name="resnets_1")(x)


class Downsample(nn.Module):
    """Returns half the rows and columns; the padding is on the right and bottom only."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        return nn.Conv(x.shape[-1], (3, 3), strides=2, padding=((0, 1), (0, 1)), name="conv")(x)


class Upsample(nn.Module):
    """Returns twice the rows and columns, by repetition and a convolution."""

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W C"]:
        return conv3x3(x.shape[-1], "conv")(x.repeat(2, axis=1).repeat(2, axis=2))


class DownBlock(nn.Module):
    """Returns a feature map of `features` channels, halved in size unless it is the last."""

    features: int
    num_layers: int
    num_groups: int
    downsample: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        for i in range(self.num_layers):
            x = ResnetBlock(self.features, self.num_groups, name=f"resnets_{i}")(x)
        return Downsample(name="downsamplers_0")(x) if self.downsample else x


class UpBlock(nn.Module):
    """Returns a feature map of `features` channels, doubled in size unless it is the last."""

    features: int
    num_layers: int
    num_groups: int
    upsample: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W D"]:
        for i in range(self.num_layers):
            x = ResnetBlock(self.features, self.num_groups, name=f"resnets_{i}")(x)
        return Upsample(name="upsamplers_0")(x) if self.upsample else x


class Encoder(nn.Module):
    """Returns the moments of the latents before `quant_conv`."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    num_groups: int
    moment_channels: int
    mid_attention: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w M"]:
        x = conv3x3(self.block_out_channels[0], "conv_in")(x)
        last = len(self.block_out_channels) - 1
        for i, features in enumerate(self.block_out_channels):
            x = DownBlock(
                features, self.layers_per_block, self.num_groups, i < last, name=f"down_blocks_{i}"
            )(x)
        x = MidBlock(self.num_groups, self.mid_attention, name="mid_block")(x)
        x = nn.silu(group_norm(self.num_groups, "conv_norm_out")(x))
        return conv3x3(self.moment_channels, "conv_out")(x)


class Decoder(nn.Module):
    """Returns images from latents after `post_quant_conv`."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    num_groups: int
    out_channels: int
    mid_attention: bool

    @nn.compact
    def __call__(self, z: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
        widths = self.block_out_channels[::-1]
        x = conv3x3(widths[0], "conv_in")(z)
        x = MidBlock(self.num_groups, self.mid_attention, name="mid_block")(x)
        last = len(widths) - 1
        for i, features in enumerate(widths):
            # The decoder has one resnet more in each block than the encoder.
            x = UpBlock(
                features,
                self.layers_per_block + 1,
                self.num_groups,
                i < last,
                name=f"up_blocks_{i}",
            )(x)
        x = nn.silu(group_norm(self.num_groups, "conv_norm_out")(x))
        return conv3x3(self.out_channels, "conv_out")(x)


class AutoencoderKL(nn.Module):
    """An image autoencoder; its fields are the configuration that a checkpoint stores.

    Call `model.apply({"params": params}, z, method="decode")`, likewise `"encode"`. Neither scales:
    a diffusion model's latents are `mean * scaling_factor` (after `- shift_factor`, where set), so
    images are `decode(latents / scaling_factor + shift_factor)`.

    Attributes:
        block_out_channels: widths, finest first; each step but the last halves the size.
        layers_per_block: resnets in an encoder block; the decoder has one more.
        scaling_factor: 0.18215 for the published models whose config lacks it.
    """

    block_out_channels: tuple[int, ...] | list[int] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        # A list, as JSON gives it, would leave the module without a hash.
        self.block_out_channels = tuple(self.block_out_channels)
        super().__post_init__()

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct]:
        """Returns the smallest input, for tracing shapes."""
        size = 2 ** (len(self.block_out_channels) - 1)
        return (jax.ShapeDtypeStruct((1, size, size, self.in_channels), jnp.float32),)

    def setup(self) -> None:
        widths = tuple(self.block_out_channels)
        check_widths(widths, self.norm_num_groups)
        moment_channels = 2 * self.latent_channels
        shared = (widths, self.layers_per_block, self.norm_num_groups)
        self.encoder = Encoder(*shared, moment_channels, self.mid_block_add_attention)
        self.decoder = Decoder(*shared, self.out_channels, self.mid_block_add_attention)
        if self.use_quant_conv:
            self.quant_conv = nn.Conv(moment_channels, (1, 1))
        if self.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1))

    def __call__(self, x: Float[AnyArray, "B H W C"]) -> Float[Array, "B H W D"]:
        """Returns the reconstruction of images through the mean of their latents."""
        return self.decode(self.encode(x)[0])

    def encode(
        self, x: Float[AnyArray, "B H W C"]
    ) -> tuple[Float[Array, "B h w Z"], Float[Array, "B h w Z"]]:
        """Returns the mean and the log-variance (clamped to [-30, 20]) of the latents.

        Raises:
            ValueError: if the channels differ from the configuration, or the size does not divide.
        """
        factor = 2 ** (len(self.block_out_channels) - 1)
        if x.shape[-1] != self.in_channels or x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"images have shape {x.shape}; this encoder takes [B, H, W, {self.in_channels}] "
                f"with H and W divisible by {factor}."
            )
        moments = self.encoder(jnp.asarray(x))
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, z: Float[AnyArray, "B h w Z"]) -> Float[Array, "B H W C"]:
        """Returns images of about [-1, 1] (not clamped) from latents of any size.

        Raises:
            ValueError: if the number of latent channels differs from the configuration.
        """
        if z.shape[-1] != self.latent_channels:
            raise ValueError(
                f"latents have shape {z.shape}; this decoder takes [B, h, w, {self.latent_channels}]."
            )
        z = jnp.asarray(z)
        return self.decoder(self.post_quant_conv(z) if self.use_post_quant_conv else z)


def check_widths(widths: tuple[int, ...], num_groups: int) -> None:
    """Raises `ValueError` if a width cannot be normed in `num_groups` groups."""
    if not widths or any(width % num_groups for width in widths):
        raise ValueError(
            f"block_out_channels={widths} must all be divisible by norm_num_groups={num_groups}."
        )
