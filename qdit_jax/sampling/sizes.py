"""The shape of a sample from a size that a user asks for: pixels where an autoencoder is known.

Dimensions: T frames, h, w, Z one latent, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdit_jax.checkpoint import Checkpoint
from qdit_jax.sampling.conditions import num_conditions
from qdit_jax.sampling.decoding import decode, decodes_video

Size = tuple[int, int]
SIZES = (
    "size",
    "aspect_ratio",
    "height",
    "width",
    "fps",
)  # entries that follow from a sample's size


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


def with_sizes(
    checkpoint: Checkpoint,
    condition: Mapping[str, Any],
    shape: Sequence[int] | None = None,
    fps: float | int | None = None,
) -> dict[str, Any]:
    """Returns a condition with the sizes that the network takes and the condition lacks.

    They are those of what comes out, in pixels: `size` (rows, columns), `aspect_ratio` (rows by columns),
    `height`, `width`; and `fps`, if it is given.

    Args:
        shape: of one sample of the network; its own by default.

    Raises:
        ValueError: if pixels are unknown, `fps` is missing, or it is given beside the condition's own or
            to a network that takes none.
    """
    taken = checkpoint.model.example_condition(1)
    wanted = [n for n in SIZES if isinstance(taken, Mapping) and n in taken and n not in condition]
    if fps is not None and "fps" not in wanted:
        why = "the conditions have their own" if "fps" in condition else "this network takes none"
        raise ValueError(f"fps={fps:g} has no effect: {why}; leave it out.")
    if not wanted:
        return dict(condition)
    found = dict(condition)
    if "fps" in wanted:
        if fps is None:
            raise ValueError(
                "fps=None: this network takes frames per second; give fps, such as 24."
            )
        found["fps"] = same_rows(condition, [fps])[:, 0]
        wanted.remove("fps")
    if wanted and checkpoint.vae is None:
        raise ValueError(
            f"the condition lacks {', '.join(wanted)}, of which pixels are counted, and the checkpoint has no "
            "autoencoder that tells them; write them into the file of conditions, or give one (--vae)."
        )
    if wanted:
        own = checkpoint.model.sample_shape() if shape is None else tuple(shape)
        *_, rows, columns, _ = decoded_shape(checkpoint, own)
        both = same_rows(condition, [rows, columns])
        values = {
            "size": both,
            "aspect_ratio": both[:, :1] / both[:, 1:],
            "height": both[:, 0],
            "width": both[:, 1],
        }
        found |= {name: values[name] for name in wanted}
    return found


def same_rows(condition: Mapping[str, Any], values: Sequence[float | int]) -> np.ndarray:
    """Returns the values for each of the conditions, float32."""
    return np.tile(np.array(values, np.float32), (num_conditions(condition) or 1, 1))


def decoded_shape(checkpoint: Checkpoint, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of what comes of one sample: that of its images, or itself without autoencoder."""
    vae = checkpoint.vae
    if vae is None:
        return tuple(shape)
    latents = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return jax.eval_shape(lambda z: decode(vae, z), latents).shape[1:]
