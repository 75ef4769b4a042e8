"""From latents to images and back, by a checkpoint's autoencoder.

Dimensions: B batch, T frames, h, w, Z one latent, H, W, C one image.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from qdit_jax.checkpoint import Checkpoint
from qdit_jax.types import AnyArray, Params


def decode(vae: Checkpoint, latents: Float[Array, "B *lead Z"]) -> Float[Array, "B *pixels C"]:
    """Returns the images of a diffusion model's latents, after undoing their scaling.

    Latents of videos, `[B, T, h, w, Z]`, are decoded frame by frame by an autoencoder of images, in no
    more memory than one frame of every sample needs.
    """
    return _decoded(vae.model, vae.params, latents)


@jax.jit(static_argnames=("model",))
def _decoded(
    model: nn.Module, params: Params, latents: Float[Array, "B *lead Z"]
) -> Float[Array, "B *pixels C"]:
    latents = latents / model.scaling_factor + model.shift_factor

    def images_of(latents: Float[Array, "B *lead Z"]) -> Float[Array, "B *pixels C"]:
        return cast(Array, model.apply({"params": params}, latents, method="decode"))

    if latents.ndim == 4 or decodes_video(model):
        return images_of(latents)
    # One frame of every sample at a time, so that memory is that of decoding so many images.
    return jnp.moveaxis(jax.lax.map(images_of, jnp.moveaxis(latents, 1, 0)), 0, 1)


def encode(vae: Checkpoint, images: Float[AnyArray, "B *pixels C"]) -> Float[Array, "B *lead Z"]:
    """Returns the latents of images or videos in [-1, 1] as a diffusion model has them: means, scaled.

    Videos `[B, T, H, W, C]` are encoded frame by frame by an autoencoder of images.

    Raises:
        ValueError: as the autoencoder's `encode`, for sizes or numbers of frames that do not fit.
    """
    return _encoded(vae.model, vae.params, images)


@jax.jit(static_argnames=("model",))
def _encoded(
    model: nn.Module, params: Params, images: Float[AnyArray, "B *pixels C"]
) -> Float[Array, "B *lead Z"]:
    def means_of(images: Float[Array, "B *pixels C"]) -> Float[Array, "B *lead Z"]:
        return cast(Array, model.apply({"params": params}, images, method="encode")[0])

    if images.ndim == 4 or decodes_video(model):
        means = means_of(jnp.asarray(images))
    else:
        frames = jnp.moveaxis(jnp.asarray(images), 1, 0)
        means = jnp.moveaxis(jax.lax.map(means_of, frames), 0, 1)
    return (means - model.shift_factor) * model.scaling_factor


def decodes_video(model: nn.Module) -> bool:
    """Returns whether an autoencoder takes latents of videos as a whole, not frame by frame."""
    return bool(getattr(model, "decodes_video", False))
