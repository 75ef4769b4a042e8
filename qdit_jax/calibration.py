"""Calibration: what the inputs of a network's layers look like while it samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from qdit_jax import diffusion
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.models.layers import Linear
from qdit_jax.ptq import Stats, collect_stats, input_ranges
from qdit_jax.sampling import denoiser, initial_noise, latent_shape, trained_schedule


def calibrate(
    checkpoint: Checkpoint,
    key: Any,
    num_samples: int = 256,
    *,
    sampler: diffusion.Sampler | None = None,
    guidance: Any = 1.5,
    batch_size: int = 16,
    progress_fn: Callable[[int], Any] | None = None,
) -> Stats:
    """Returns the range of every linear layer's input, by channel, at every timestep sampled.

    The full-precision sampler draws `num_samples` images with labels in turn; at each of its steps
    the network sees them with their label and, where it has one, with the null class (the release
    of Q-DiT, arXiv:2406.17343, records the conditional half only).

    Args:
        key: used once; sample i starts from `fold_in(key, i)`.
        sampler: DDIM with 50 steps of the checkpoint's schedule by default, 50 steps of the flow
            for a velocity model.
        guidance: of the trajectories; ignored without a null class.
        progress_fn: called with the number of samples finished, batch by batch.

    Raises:
        ValueError: if `num_samples` is not positive.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be 1 or more.")
    model, params = checkpoint.model, checkpoint.params
    if sampler is None:
        sampler = default_sampler(checkpoint)
    guided = denoiser(model, params, guidance if model.null_class else None)
    batches = trajectories(guided, sampler, model, key, num_samples, batch_size, progress_fn)
    return collect_stats(partial(layer_ranges, params, model=model), batches)


def default_sampler(checkpoint: Checkpoint, num_steps: int = 50) -> diffusion.Sampler:
    """Returns DDIM on the checkpoint's schedule, or the flow for a velocity model."""
    if checkpoint.model.velocity:
        return diffusion.flow(steps=num_steps)
    return diffusion.ddim(steps=num_steps, schedule=trained_schedule(checkpoint.metadata))


def trajectories(
    denoise_fn: Callable,
    sampler: diffusion.Sampler,
    model: nn.Module,
    key: Any,
    num_samples: int,
    batch_size: int,
    progress_fn: Callable[[int], Any] | None,
) -> Iterator[tuple[float, jax.Array, jax.Array]]:
    """Yields `(timestep, x, label)` of every step, conditional and (where it exists) null."""
    for start in range(0, num_samples, batch_size):
        index = jnp.arange(start, min(start + batch_size, num_samples))
        label = index % model.num_classes
        noise, keys = initial_noise(key, index, latent_shape(model))
        _, (x, timestep) = diffusion.sample_trajectory(
            denoise_fn, sampler, noise, label, keys, collect_fn=model_inputs
        )
        for at, seen in zip(np.asarray(timestep).tolist(), x, strict=True):
            yield at, seen, label
            if model.null_class:
                yield at, seen, jnp.full_like(label, model.num_classes)
        if progress_fn is not None:
            progress_fn(len(index))


def model_inputs(step: diffusion.Step) -> tuple[Any, Any]:
    return step.x, step.timestep


@partial(jax.jit, static_argnames="model")
def layer_ranges(params: Any, x: Any, timestep: Any, label: Any, *, model: nn.Module) -> Any:
    """Returns `{layer: (low [K], high [K])}` of one call of the network."""
    return input_ranges(lambda: model.apply({"params": params}, x, timestep, label), Linear)
