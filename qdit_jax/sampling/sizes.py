"""The shape of a sample from a size that a user asks for: pixels where an autoencoder is known.

Dimensions: T frames, h, w, Z one latent, H, W pixels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qdit_jax.checkpoint import Checkpoint
from qdit_jax.sampling.decoding import decode, decodes_video

Size = tuple[int, int]


def sized_shape(
    checkpoint: Checkpoint, size: Size | None = None, frames: int | None = None
) -> tuple[int, ...] | None:
    """Returns the shape of a sample of the network for a size and a number of frames.

    Both are of what comes out: pixels and frames of the autoencoder where the checkpoint has one, else
    rows, columns and frames of the network's own samples. None of both is None: the network's default.

    Args:
        size: rows and columns.

    Raises:
        ValueError: if frames are asked of a network of images, or the autoencoder makes no such size.
    """
    if size is None and frames is None:
        return None
    shape = list(checkpoint.model.sample_shape())
    if frames is not None and len(shape) != 4:
        raise ValueError(f"frames={frames} does not fit: this network makes images; leave it out.")
    if size is not None:
        rows, columns = pixels_per_latent(checkpoint)
        for axis, given, factor in ((-3, size[0], rows), (-2, size[1], columns)):
            if given % factor:
                raise ValueError(
                    f"size={size[0]}x{size[1]}: the autoencoder makes {rows}x{columns} pixels of every "
                    f"latent; use multiples, such as {nearest(size[0], rows)}x{nearest(size[1], columns)}."
                )
            shape[axis] = given // factor
    if frames is not None:
        shape[0] = latent_frames(checkpoint, frames)
    return tuple(shape)


def nearest(given: int, factor: int) -> int:
    return max(1, round(given / factor)) * factor


def size_unit(checkpoint: Checkpoint) -> str:
    """Returns what a size counts, in words."""
    if checkpoint.vae is not None or checkpoint.model.sample_shape()[-1] in (1, 3):
        return "pixels"
    return "rows x columns of latents, as the checkpoint has no autoencoder"


def pixels_per_latent(checkpoint: Checkpoint) -> Size:
    """Returns how many rows and columns of pixels the autoencoder makes of one latent's."""
    shape = checkpoint.model.sample_shape()
    found = decoded_shape(checkpoint, shape)
    return found[-3] // shape[-3], found[-2] // shape[-2]


def latent_frames(checkpoint: Checkpoint, frames: int) -> int:
    """Returns the frames of latents that an autoencoder makes so many frames of.

    Raises:
        ValueError: if it makes no such number.
    """
    if checkpoint.vae is None or not decodes_video(checkpoint.vae.model):
        return frames
    _, *rest = checkpoint.model.sample_shape()
    one, two = (decoded_shape(checkpoint, (count, *rest))[0] for count in (1, 2))
    step = max(two - one, 1)
    if frames < one or (frames - one) % step:
        raise ValueError(
            f"frames={frames}: the autoencoder makes {one} frame{'s' * (one > 1)} of the first latent and "
            f"{step} of each further one; use {one + step * max(0, round((frames - one) / step))}."
        )
    return 1 + (frames - one) // step


def decoded_shape(checkpoint: Checkpoint, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of what comes of one sample: that of its images, or itself without autoencoder."""
    vae = checkpoint.vae
    if vae is None:
        return tuple(shape)
    latents = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return jax.eval_shape(lambda z: decode(vae, z), latents).shape[1:]
