"""Calibration: what the inputs of a network's layers look like while it samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Int

from qdit_jax import diffusion
from qdit_jax.calibration.collect import (
    add_call,
    empty_state,
    observed,
    read_state,
    stats_of,
    write_state,
)
from qdit_jax.calibration.statistics import HALVES, Stats, input_ranges, input_rows
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.files import PathLike
from qdit_jax.models import Linear
from qdit_jax.sampling import denoiser, initial_noise, latent_shape, trained_schedule


def calibrate(
    checkpoint: Checkpoint,
    key: Any,
    num_samples: int = 256,
    *,
    sampler: diffusion.Sampler | None = None,
    guidance: Any = 1.5,
    batch_size: int = 16,
    hessians: str | None = None,
    num_tokens: int = 0,
    unfinished: PathLike | None = None,
    progress_fn: Callable[[int], Any] | None = None,
) -> Stats:
    """Returns the range of every linear layer's input, by channel, at every timestep sampled.

    The full-precision sampler draws `num_samples` images with labels in turn; at each of its steps
    the network sees them with their label and, where it has one, with the null class (the release
    of Q-DiT, arXiv:2406.17343, records the conditional half only). Operands of attention products
    are recorded as well. Memory holds the statistics and one batch's latents at all steps.

    Args:
        key: used once; sample i starts from `fold_in(key, i)`.
        sampler: DDIM with 50 steps of the checkpoint's schedule by default, 50 steps of the flow
            for a velocity model.
        guidance: of the trajectories; ignored without a null class.
        hessians: a pattern of layer paths whose mean `x xᵀ` to keep, float32 `[K, K]` each.
        num_tokens: inputs to keep of every layer from each call of the network.
        unfinished: a file that is written after every batch; where it exists, the calibration
            goes on from it, to the same result. The caller deletes it.
        progress_fn: called with the number of samples finished, batch by batch.

    Raises:
        ValueError: if `num_samples` is not positive.
        UserError: if `unfinished` was written with other settings.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be 1 or more.")
    model, params = checkpoint.model, checkpoint.params
    sampler = default_sampler(checkpoint) if sampler is None else sampler
    settings = fingerprint(params, sampler, key) | {
        "model": repr(model),
        "num_samples": num_samples,
        "guidance": str(guidance),
        "batch_size": batch_size,
        "hessians": hessians,
        "num_tokens": num_tokens,
    }
    state = empty_state(settings) if unfinished is None else read_state(unfinished, settings)
    if state["num_done"] and progress_fn is not None:
        progress_fn(state["num_done"])
    denoise_fn = denoiser(model, params, guidance if model.null_class else None)
    observe = partial(observe_call, params, model=model, hessians=hessians, num_tokens=num_tokens)
    labels = HALVES if model.null_class else HALVES[:1]
    for start in range(state["num_done"], num_samples, batch_size):
        index = np.arange(start, min(start + batch_size, num_samples))
        label, x, timestep = trajectory(denoise_fn, sampler, model, key, index)
        state["timesteps"] = np.asarray(timestep)
        for step, at in enumerate(state["timesteps"]):
            for i, half in enumerate(labels):
                seen = label if half == "conditional" else jnp.full_like(label, model.num_classes)
                found = observe(x[step], jnp.full(len(index), at, jnp.float32), seen)
                call = start // batch_size * len(labels) + i
                add_call(state, found, half, step, len(state["timesteps"]), call)
        state["num_done"] = start + len(index)
        if unfinished is not None:
            write_state(unfinished, state)
        if progress_fn is not None:
            progress_fn(len(index))
    return stats_of(state)


def fingerprint(params: Any, sampler: diffusion.Sampler, key: Any) -> dict[str, str]:
    """Returns digests of a sampler, a key and the first values of every parameter."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    heads = [np.asarray(leaf).reshape(-1)[:256] for leaf in jax.tree.leaves(params)]
    named = {"params": heads, "sampler": jax.tree.leaves(sampler), "key": [key]}
    return {name: digest(arrays) for name, arrays in named.items()}


def digest(arrays: Iterable[Any]) -> str:
    """Returns the SHA-256 of the arrays' bytes, one after another."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def default_sampler(checkpoint: Checkpoint, num_steps: int = 50) -> diffusion.Sampler:
    """Returns DDIM on the checkpoint's schedule, or the flow for a velocity model."""
    if checkpoint.model.velocity:
        return diffusion.flow(steps=num_steps)
    return diffusion.ddim(steps=num_steps, schedule=trained_schedule(checkpoint.metadata))


def trajectory(
    denoise_fn: Callable,
    sampler: diffusion.Sampler,
    model: nn.Module,
    key: Any,
    index: Int[np.ndarray, " B"],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns labels `[B]`, the network's inputs `[S, B, H, W, C]` and timesteps `[S]`."""
    label = jnp.asarray(index % model.num_classes, jnp.int32)
    noise, keys = initial_noise(key, jnp.asarray(index), latent_shape(model))
    _, (x, timestep) = diffusion.sample_trajectory(
        denoise_fn, sampler, noise, label, keys, collect_fn=model_inputs
    )
    return label, x, timestep


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
        index = np.arange(start, min(start + batch_size, num_samples))
        label, x, timestep = trajectory(denoise_fn, sampler, model, key, index)
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


@partial(jax.jit, static_argnames=("model", "hessians", "num_tokens"))
def observe_call(
    params: Any,
    x: Any,
    timestep: Any,
    label: Any,
    *,
    model: nn.Module,
    hessians: str | None,
    num_tokens: int,
) -> Any:
    """Returns what `ptq.collect.observed` finds in one call of the network."""
    rows = input_rows(lambda: model.apply({"params": params}, x, timestep, label), Linear)
    return observed(rows, hessians, num_tokens)
