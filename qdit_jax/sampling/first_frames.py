"""The first frames of videos, given: checked, and as a sampler that keeps them.

Dimensions: N clips, B batch, T frames, F of them given, h, w, Z one latent.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np
from flax import linen as nn
from jaxtyping import Float, Int

from qdit_jax import diffusion
from qdit_jax.quant import check_finite
from qdit_jax.types import AnyArray, Condition


@dataclasses.dataclass(frozen=True)
class SeenBy:
    """Tells a network which frames are clean; equal for equal networks, so that nothing recompiles."""

    model: nn.Module

    def __call__(
        self, x: AnyArray, timestep: AnyArray, condition: Condition, mask: AnyArray
    ) -> tuple[AnyArray, Condition]:
        """Returns the timestep and the condition that the network is called with."""
        return cast(Any, self.model).seen_frames(x, timestep, condition, mask)


def takes_first_frames(model: nn.Module) -> bool:
    """Returns whether a network can be told that frames are clean."""
    return hasattr(model, "seen_frames")


def checked_first_frames(
    model: nn.Module, frames: AnyArray, shape: tuple[int, ...]
) -> Float[np.ndarray, "N F h w Z"]:
    """Returns given first frames in float32.

    Args:
        shape: of one sample of the network, `(T, h, w, Z)`.

    Raises:
        ValueError: if the network takes none, or they do not fit its samples or are not finite.
    """
    if not takes_first_frames(model):
        raise ValueError(
            f"first_frames: a {type(model).__name__} cannot be told which frames are clean; STDiT3 "
            "(Open-Sora 1.2) and Wan can."
        )
    found = np.asarray(frames)
    num_frames, *rest = shape
    fits = found.ndim == 5 and list(found.shape[2:]) == rest and 0 < found.shape[1] < num_frames
    if not fits or not len(found) or not np.issubdtype(found.dtype, np.floating):
        raise ValueError(
            f"first_frames are {found.dtype} {list(found.shape)}; samples are {list(shape)}: give "
            f"latents [N, F, {', '.join(map(str, rest))}] of F = 1 to {num_frames - 1} frames."
        )
    patch = getattr(model, "patch_size", 1)
    across = patch[0] if isinstance(patch, tuple | list) and len(patch) == 3 else 1
    if found.shape[1] % across:
        raise ValueError(
            f"first_frames are {found.shape[1]} frames, and a patch is {across} frames long; give a "
            "multiple."
        )
    check_finite("first_frames", found)
    return found.astype(np.float32)


def kept_rows(
    frames: Float[np.ndarray, "N F h w Z"], index: Int[np.ndarray, " B"], num_frames: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the clean latents `[B, T, h, w, Z]` of the samples `index`, cyclically, and their mask."""
    given = frames[np.asarray(index) % len(frames)]
    rest = [(0, 0), (0, num_frames - given.shape[1]), *((0, 0),) * (given.ndim - 2)]
    mask = np.broadcast_to(np.arange(num_frames) >= given.shape[1], (len(given), num_frames))
    return np.pad(given, rest), mask


def keeping(
    sampler: diffusion.Sampler, model: nn.Module, clean: AnyArray, mask: AnyArray
) -> diffusion.KeepsFrames:
    """Returns the sampler of a batch that keeps what `kept_rows` returned."""
    return diffusion.keeping_frames(sampler, clean, mask, SeenBy(model))  # type: ignore[arg-type]
