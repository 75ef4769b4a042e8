"""From latents to images, by a checkpoint's autoencoder.

Dimensions: B batch, T frames, h, w, Z one latent, H, W, C one image.
"""

from __future__ import annotations

from typing import cast

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from qdit_jax.checkpoint import Checkpoint
from qdit_jax.types import Params


def decode(vae: Checkpoint, latents: Float[Array, "B *lead Z"]) -> Float[Array, "B *pixels C"]:
    """Returns the images of a diffusion model's latents, after undoing their scaling.

    Latents of videos, `[B, T, h, w, Z]`, are decoded frame by frame by an autoencoder of images.
    """
    return _decoded(vae.model, vae.params, latents)


@jax.jit(static_argnames=("model",))
def _decoded(
    model: nn.Module, params: Params, latents: Float[Array, "B *lead Z"]
) -> Float[Array, "B *pixels C"]:
    latents = latents / model.scaling_factor + model.shift_factor
    frames = latents if decodes_video(model) else latents.reshape(-1, *latents.shape[-3:])
    images = cast(Array, model.apply({"params": params}, frames, method="decode"))
    if decodes_video(model):
        return images
    return images.reshape(*latents.shape[:-3], *images.shape[1:])


def decodes_video(model: nn.Module) -> bool:
    """Returns whether an autoencoder takes latents of videos as a whole, not frame by frame."""
    return bool(getattr(model, "decodes_video", False))
