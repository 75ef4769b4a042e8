"""How far clips are apart frame by frame and from one frame to the next, and how much one clip flickers.

Clips are `[N, T, H, W, C]` with values in [-1, 1], unless `peak` says otherwise; latents `[N, T, h, w, Z]`
of any range can be compared by frame as well.

Dimensions: N samples, T frames, H and W rows and columns, C channels; M must equal N.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from qdit_jax.metrics.arrays import finite_array
from qdit_jax.metrics.paired import as_pairs, check_shapes, decibels
from qdit_jax.types import AnyArray


def frame_snr_db(
    reference: Float[AnyArray, "N ..."], other: Float[AnyArray, "M ..."]
) -> Float[np.ndarray, "N T"]:
    """Returns the power of each frame of the reference over the power of its error, in dB.

    The mean over frames is not the whole clip's `signal_to_noise_db`: that is dominated by the frames
    with the largest error.
    """
    check_clips(reference)
    x, y = as_pairs(reference, other, 2)
    return decibels(np.square(x).sum(-1), np.square(x - y).sum(-1))


def flicker_error(
    reference: Float[AnyArray, "N ..."],
    other: Float[AnyArray, "M ..."],
    *,
    peak: float | int = 2.0,
) -> Float[np.ndarray, " N"]:
    """Returns how much of the change between frames is wrong: 0 for none, 1 for the span of values.

    `mean |(y[t+1] - y[t]) - (x[t+1] - x[t])| / peak` over pixels and pairs of frames, x the reference:
    the difference of both clips' consecutive-frame differences. Motion that both clips share cancels,
    and so does an error that stands still: what is left was added between frames. Video coding measures
    flicker against a source in this way.

    Raises:
        ValueError: for clips of fewer than 2 frames.
    """
    check_clips(reference, least=2)
    check_shapes(reference, other)
    x, y = finite_array("reference", reference), finite_array("other", other)
    change = np.diff(y, axis=1) - np.diff(x, axis=1)
    return np.abs(change).mean((1, 2, 3, 4)) / peak


def temporal_flickering(
    clips: Float[AnyArray, "N ..."], *, peak: float | int = 2.0
) -> Float[np.ndarray, " N"]:
    """Returns VBench's temporal flickering of each clip (arXiv:2311.17982): 1 where nothing changes.

    `1 - mean |x[t+1] - x[t]| / peak`: the mean absolute difference of consecutive frames, of clips alone,
    without a reference; VBench computes it of 8-bit frames with `peak` 255. Motion lowers it as well, so
    VBench asks it of static scenes only; between two models it says more as a difference, on the same
    noise and prompts.

    Raises:
        ValueError: for clips of fewer than 2 frames.
    """
    check_clips(clips, least=2)
    x = finite_array("clips", clips)
    return 1 - np.abs(np.diff(x, axis=1)).mean((1, 2, 3, 4)) / peak


def check_clips(clips: AnyArray, least: int = 1) -> None:
    """Raises `ValueError` unless there are clips `[N, T, H, W, C]` of so many frames."""
    if clips.ndim != 5 or clips.shape[1] < least:
        raise ValueError(
            f"clips have shape {clips.shape}; use [N, T, H, W, C] with {least} frames or more."
        )
