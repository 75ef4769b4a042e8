"""The causal video autoencoders of Wan 2.1 and of Wan 2.2's 5B network (arXiv:2503.20314).

A convolution over time sees frames before, never after. A clip is thus coded piece by piece: frame 0
alone, then four frames for every latent frame, and each convolution keeps the two frames that it saw
last. Memory holds those and one piece, whatever the length of the clip.

Dimensions: B batch, T frames, t latent frames, H and W rows and columns, h and w latent ones, C
channels, Z latent channels, D channels of an output.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from qdit_jax.models.linear import Linear
from qdit_jax.models.vae import LOGVAR_RANGE
from qdit_jax.models.wan_vae_parts import CACHE, Decoder, Encoder
from qdit_jax.types import AnyArray, Params

# Of the published 16 channels.
LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


class WanAutoencoder(nn.Module):
    """A video autoencoder; its fields are the configuration that a checkpoint stores.

    Call `model.apply({"params": params}, z, method="decode")`, likewise `"encode"`. Neither scales: a
    diffusion model's latents are `(mean - latents_mean) / latents_std`, per channel.

    Attributes:
        base_dim, decoder_base_dim: widths of the finest feature maps; `dim_mult` times these, finest
            first, are those of the others.
        num_res_blocks: of an encoder's level; the decoder has one more.
        temporal_downsample: which levels but the last halve the frames as well.
        residual: whether levels have shortcuts without parameters (Wan 2.2's 5B network).
        patch_size: rows and columns that make channels before the encoder.
    """

    base_dim: int = 96
    decoder_base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    in_channels: int = 3
    out_channels: int = 3
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD
    residual: bool = False
    patch_size: int = 1

    decodes_video = True

    @property
    def latent_channels(self) -> int:
        """Returns the channels of a latent."""
        return self.z_dim

    def setup(self) -> None:
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise ValueError(
                f"latents_mean has {len(self.latents_mean)} numbers and latents_std "
                f"{len(self.latents_std)}; z_dim={self.z_dim} channels need as many."
            )
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temporal_downsample={self.temporal_downsample} must have one entry fewer than "
                f"dim_mult={self.dim_mult}."
            )
        down = tuple(self.base_dim * n for n in (1, *self.dim_mult))
        up = tuple(self.decoder_base_dim * n for n in (self.dim_mult[-1], *self.dim_mult[::-1]))
        temporal, residual = tuple(self.temporal_downsample), self.residual
        shared = (self.num_res_blocks, temporal)
        self.encoder = Encoder(down, *shared, 2 * self.z_dim, residual)
        self.decoder = Decoder(up, self.num_res_blocks, temporal[::-1], self.out_channels, residual)
        self.quant_conv = Linear(2 * self.z_dim)
        self.post_quant_conv = Linear(self.z_dim)

    @property
    def scaling_factor(self) -> np.ndarray:
        """Returns what a diffusion model's latents are multiplied with, `[Z]`."""
        return 1 / np.asarray(self.latents_std, np.float32)

    @property
    def shift_factor(self) -> np.ndarray:
        """Returns what is subtracted from latents before, `[Z]`."""
        return np.asarray(self.latents_mean, np.float32)

    @property
    def frames_per_latent(self) -> int:
        """Returns how many frames a latent frame stands for, but for the first."""
        return int(2 ** sum(self.temporal_downsample))

    @property
    def side_factor(self) -> int:
        """Returns how many rows (and columns) of a picture a latent's row stands for."""
        return int(2 ** (len(self.dim_mult) - 1) * self.patch_size)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct]:
        """Returns a smallest clip that needs all layers, for tracing shapes."""
        side, channels = self.side_factor, self.in_channels // self.patch_size**2
        shape = (1, 1 + self.frames_per_latent, side, side, channels)
        return (jax.ShapeDtypeStruct(shape, jnp.float32),)

    def __call__(self, x: Float[AnyArray, "B T H W C"]) -> Float[Array, "B T H W D"]:
        """Returns the reconstruction of clips through the mean of their latents."""
        return self.decode(self.encode(x)[0])

    def encode(
        self, x: Float[AnyArray, "B T H W C"], pieces: int | None = None
    ) -> tuple[Float[Array, "B t h w Z"], Float[Array, "B t h w Z"]]:
        """Returns the mean and the log-variance (clamped to [-30, 20]) of the latents.

        `pieces` is how many pieces follow frame 0: by default one for every further latent frame.

        Raises:
            ValueError: if the channels, the frames or the size do not fit.
        """
        p, side, count = self.patch_size, self.side_factor, self.frames_per_latent
        channels = self.in_channels // p**2
        if (
            x.ndim != 5
            or x.shape[-1] != channels
            or (x.shape[1] - 1) % count
            or any(n % side for n in x.shape[2:4])
        ):
            raise ValueError(
                f"clips have shape {x.shape}; this encoder takes [B, T, H, W, {channels}] with "
                f"T = 1 + {count} k, and H and W divisible by {side}."
            )
        x = rearrange(jnp.asarray(x), "b t (h p) (w q) c -> b t h w (c q p)", p=p, q=p)
        pieces = (x.shape[1] - 1) // count if pieces is None else pieces
        moments = self.quant_conv(self.piece_by_piece(self.encoder, x, pieces))
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(
        self, z: Float[AnyArray, "B t h w Z"], pieces: int | None = None
    ) -> Float[Array, "B T H W C"]:
        """Returns clips in [-1, 1] (clamped) from latents of any size and length.

        `pieces` is how many pieces follow latent frame 0: by default one for every further frame.

        Raises:
            ValueError: if the number of latent channels differs from the configuration.
        """
        if z.ndim != 5 or z.shape[-1] != self.z_dim:
            raise ValueError(
                f"latents have shape {z.shape}; this decoder takes [B, T, h, w, {self.z_dim}]."
            )
        z, p = self.post_quant_conv(jnp.asarray(z)), self.patch_size
        pieces = z.shape[1] - 1 if pieces is None else pieces
        out = self.piece_by_piece(self.decoder, z, pieces)
        out = rearrange(out, "b t h w (c q p) -> b t (h p) (w q) c", p=p, q=p)
        return jnp.clip(out, -1.0, 1.0)

    def piece_by_piece(
        self, half: Encoder | Decoder, x: Float[Array, "B T H W C"], pieces: int
    ) -> Float[Array, "B t h w D"]:
        """Returns the output of the encoder or decoder: of frame 0, then of equal pieces of the rest."""
        head, rest = x[:, :1], x[:, 1:]
        if not rest.shape[1]:
            return self.of_first(half, head)[0]
        parts = rearrange(rest, "b (s f) ... -> s b f ...", s=pieces)
        if self.is_initializing():
            return jnp.concatenate([half(head, True), *(half(part, False) for part in parts)], 1)
        out, cache = self.of_first(half, head)
        alone, params = half.clone(parent=None), half.variables["params"]

        def step(cache: Params, part: Array) -> tuple[Params, Array]:
            given = {"params": params, CACHE: cache}
            out, after = alone.apply(given, part, False, mutable=[CACHE])
            return after[CACHE], out

        _, others = jax.lax.scan(step, cache, parts)
        return jnp.concatenate([out, rearrange(others, "s b f ... -> b (s f) ...")], axis=1)

    def of_first(
        self, half: Encoder | Decoder, head: Float[Array, "B 1 H W C"]
    ) -> tuple[Float[Array, "B 1 h w D"], Params]:
        """Returns the output of frame 0, and what it leaves for the next piece."""
        if self.is_initializing():
            return half(head, True), {}
        alone = half.clone(parent=None)
        params = {"params": half.variables["params"]}
        out, after = alone.apply(params, head, True, mutable=[CACHE])
        return out, after[CACHE]
