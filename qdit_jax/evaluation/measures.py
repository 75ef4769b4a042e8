"""Measures of pairs: how far a trajectory is from the reference's, sample by sample.

Dimensions: B samples of a batch, S steps, T frames of a clip.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from qdit_jax import metrics
from qdit_jax.evaluation.trajectories import BatchSampler, Trajectory
from qdit_jax.sampling import kept_in_place, on_one_device
from qdit_jax.types import Condition

Tree = TypeVar("Tree")


def pair_measures(reference: Trajectory, other: Trajectory) -> dict[str, np.ndarray]:
    """Returns the paired measures of each sample: arrays `[B]`, and `drift_db [B, S]`.

    Images are compared as they are seen, clipped to [-1, 1]; latents as they are. Of videos, the errors
    of single frames are there too, `latent_frame_db` and `image_frame_db`, `[B, T]`.
    """
    found = {
        "latent_snr_db": metrics.signal_to_noise_db(reference.final, other.final),
        "latent_cosine": metrics.cosine(reference.final, other.final),
    }
    found |= of_frames("latent", reference.final, other.final)
    if reference.images is not None and other.images is not None:
        a, b = np.clip(reference.images, -1, 1), np.clip(other.images, -1, 1)
        found["image_snr_db"] = metrics.signal_to_noise_db(a, b)
        found["image_psnr_db"] = metrics.psnr(a, b)
        found["image_cosine"] = metrics.cosine(a, b)
        if min(a.shape[-3:-1]) >= 11:  # the window of SSIM
            frames = [images.reshape(-1, *images.shape[-3:]) for images in (a, b)]
            found["image_ssim"] = metrics.ssim(*frames).reshape(len(a), -1).mean(1)
        found |= of_frames("image", a, b)
        if has_motion(a):
            found["flicker_error"] = metrics.flicker_error(a, b)
    after = [
        metrics.signal_to_noise_db(x, y)
        for x, y in zip(
            [*reference.x[1:], reference.final], [*other.x[1:], other.final], strict=True
        )
    ]
    return {**found, "drift_db": np.stack(after, axis=1)}


def of_frames(kind: str, reference: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the error of every frame of videos, and that of each one's worst; empty for images."""
    if reference.ndim != 5:
        return {}
    by_frame = metrics.frame_snr_db(reference, other)
    return {f"{kind}_frame_db": by_frame, f"{kind}_worst_frame_db": by_frame.min(axis=1)}


def has_motion(images: np.ndarray) -> bool:
    """Returns whether samples are videos of several frames."""
    return images.ndim == 5 and images.shape[1] > 1


def first_of(tree: Tree, count: int) -> Tree:
    """Returns the first `count` entries of every array."""
    return jax.tree.map(lambda leaf: leaf[:count], tree)


def probe(
    reference: BatchSampler, other: BatchSampler, trajectory: Trajectory, condition: Condition
) -> np.ndarray:
    """Returns `[B, S]`: signal to error, in dB, of two networks' outputs for the same input.

    The inputs are those of the reference's trajectory, so that no earlier error counts; the
    channels of a learned variance do not count either.
    """
    homes = [w.mesh for w in (reference, other) if w.is_partitioned]
    fns: Any = [w.denoise_fn for w in (reference, other)]
    given: Any = (trajectory.x, trajectory.timestep, condition)
    if homes:  # where the parameters are
        fns, given = kept_in_place((fns, given), homes[0])
        powers = output_powers(*fns, *given)
    else:  # on one device: the few samples may not divide evenly among all
        fns, given = jax.device_put((fns, given), jax.local_devices()[0])
        with on_one_device():
            powers = output_powers(*fns, *given)
    signal, noise = (np.asarray(power) for power in powers)
    return metrics.decibels(signal, noise).T


@jax.jit
def output_powers(reference_fn, other_fn, x, timestep, condition):
    """Returns the powers `[S, B]` of the reference's outputs and of the difference to it."""

    def step(scanned):
        x, timestep = scanned
        at, axes = jnp.full(len(x), timestep, jnp.float32), tuple(range(1, x.ndim))
        a, b = (fn(x, at, condition)[..., : x.shape[-1]] for fn in (reference_fn, other_fn))
        return jnp.square(a).sum(axes), jnp.square(a - b).sum(axes)

    return jax.lax.map(step, (x, timestep))
