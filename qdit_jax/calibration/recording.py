"""Calibration: what the inputs of a network's layers look like while it samples."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from qdit_jax import diffusion
from qdit_jax.calibration.collect import (
    State,
    add_call,
    add_part,
    empty_state,
    observed,
    packed,
    read_state,
    stats_of,
    unpacked,
    write_state,
)
from qdit_jax.calibration.parts import Parts
from qdit_jax.calibration.statistics import HALVES, Stats, input_rows
from qdit_jax.checkpoint import Checkpoint, fingerprint
from qdit_jax.errors import check_counts, check_pattern
from qdit_jax.files import AnyPath, PathLike, as_path
from qdit_jax.models import (
    at_timestep,
    check_all_run,
    null_condition_of,
    with_guidance,
    without_null,
)
from qdit_jax.processes import ALONE, Processes
from qdit_jax.quant import check_finite
from qdit_jax.recipes import layer_paths
from qdit_jax.sampling import (
    PUBLISHED,
    Guidance,
    check_diffusion_model,
    check_takes,
    checkpoint_sampler,
    cyclic_conditions,
    denoiser,
    fitting_guidance,
    initial_noise,
    params_in_place,
    sampler_timesteps,
    shape_of_sample,
)
from qdit_jax.types import AnyArray, Condition, Key, Params, Progress, ProgressFn, untold


def calibrate(
    checkpoint: Checkpoint,
    key: Key,
    num_samples: int = 256,
    *,
    conditions: Condition = None,
    sampler: diffusion.Sampler | None = None,
    guidance: Guidance | None = PUBLISHED,
    batch_size: int = 16,
    shape: Sequence[int] | None = None,
    hessians: str | None = None,
    num_tokens: int = 0,
    unfinished: PathLike | None = None,
    progress_fn: ProgressFn = untold,
    processes: Processes = ALONE,
) -> Stats:
    """Returns the range of every linear layer's input, per channel, at every timestep sampled.

    The full-precision sampler draws `num_samples` samples, conditions assigned cyclically; at each of its
    steps the network sees them with their condition and, where it has one, with the null condition
    (the release of Q-DiT, arXiv:2406.17343, records the conditional half only). Operands of attention products
    are recorded as well. A layer that runs at some timesteps only, as an expert's, has at the others
    the ranges of the nearest one where it runs. Memory holds the statistics twice, of all batches and of
    one, and one batch's latents at all steps.

    Args:
        key: used once; sample i starts from `fold_in(key, i)`.
        conditions: labels or prompts, assigned to the samples cyclically; every class by default.
        sampler: 50 steps of the checkpoint's own sampler by default, see `checkpoint_sampler`.
        guidance: of the trajectories; the network's own by default, none without a null condition.
        shape: of one sample, channels last; the network's own by default.
        hessians: a pattern of layer paths whose mean `x xᵀ` to keep, float32 `[K, K]` each.
        num_tokens: inputs to keep of every layer from each call of the network.
        unfinished: a file that is written after every batch; where it exists, the calibration
            resumes from it and gives the same result. The caller deletes it, and the folder
            `parts_folder(unfinished)`, in which several processes keep their batches.
        processes: that share the batches, each on its own devices; all need the same `unfinished` on a
            disk that they see, and all return the same.
        progress_fn: called with the number of samples finished, batch by batch.

    Raises:
        ValueError: if a count is not positive, guidance does not fit the network, `hessians` is no
            pattern or matches no layer, a layer's input is not finite, or an expert never runs.
        UserError: if `unfinished` was written with other settings.
    """
    check_diffusion_model(checkpoint.model)
    checkpoint = dataclasses.replace(checkpoint, params=params_in_place(checkpoint.params))
    check_counts(num_samples=num_samples, batch_size=batch_size)
    check_counts(0, num_tokens=num_tokens)
    model, params = checkpoint.model, checkpoint.params
    guidance = fitting_guidance(model, guidance)
    if hessians is not None:
        check_hessians(hessians, params)
    sampler = default_sampler(checkpoint, shape=shape) if sampler is None else sampler
    settings = fingerprint(
        params=params,
        model=model,
        sampler=sampler,
        key=key,
        num_samples=num_samples,
        guidance=guidance,
        batch_size=batch_size,
        conditions=conditions,
        hessians=hessians,
        num_tokens=num_tokens,
        **({} if shape is None else {"shape": tuple(shape)}),
    )
    state = empty_state(settings) if unfinished is None else read_state(unfinished, settings)
    if state["num_done"]:
        progress_fn(Progress(state["num_done"]))
    denoise_fn = denoiser(model, params, guidance)
    check_takes(denoise_fn, model, shape, conditions)
    check_all_run(model, sampler_timesteps(sampler), "the sampler")
    record_fn = partial(
        recorded,
        checkpoint,
        key,
        conditions=conditions,
        sampler=sampler,
        denoise_fn=denoise_fn,
        guidance=guidance,
        shape=shape,
        hessians=hessians,
        num_tokens=num_tokens,
    )

    def compute(start: int) -> State:
        return packed(record_fn(np.arange(start, min(start + batch_size, num_samples))))

    folder = None if unfinished is None else parts_folder(unfinished)
    parts = Parts(folder, settings, compute, processes, progress_fn)
    starts = range(state["num_done"], num_samples, batch_size)
    for _, part in parts.joined(starts, num_samples):
        add_part(state, unpacked(part))
        if unfinished is not None and not processes.are_several:
            write_state(unfinished, state)
    return stats_of(state)


def parts_folder(unfinished: PathLike) -> AnyPath:
    """Returns the folder in which several processes keep the batches of an unfinished calibration."""
    return as_path(unfinished).with_suffix(".parts")


def recorded(
    checkpoint: Checkpoint,
    key: Key,
    index: Int[np.ndarray, " B"],
    *,
    conditions: Condition,
    sampler: diffusion.Sampler,
    denoise_fn: Callable[..., Array],
    guidance: Guidance | None,
    shape: Sequence[int] | None,
    hessians: str | None,
    num_tokens: int,
) -> State:
    """Returns what is seen in the trajectories of the samples `index`, as a state of their own."""
    model, params = checkpoint.model, checkpoint.params
    condition = with_guidance(model, cyclic_conditions(model, conditions, index), guidance)
    x, timestep = trajectory(denoise_fn, sampler, model, key, index, condition, shape)
    halves = conditional_and_null(model, params, condition)
    state: State = {"timesteps": np.asarray(timestep), "num_done": len(index), "num_rows": {}}
    for step, at in enumerate(state["timesteps"]):
        running, held = at_timestep(model, params, float(at))
        for call, (half, seen) in enumerate(halves.items()):
            times = jnp.full(len(index), at, jnp.float32)
            found = observe_call(
                held, x[step], times, seen, model=running, hessians=hessians, num_tokens=num_tokens
            )
            add_call(state, found, half, step, len(state["timesteps"]), call)
    return state


def check_hessians(hessians: str, params: Params) -> None:
    """Raises `ValueError` if the pattern cannot be read or matches no layer."""
    check_pattern("hessians", hessians)
    paths = layer_paths(params)
    if not any(re.fullmatch(hessians, path) for path in paths):
        raise ValueError(
            f"hessians={hessians!r} matches no layer; layers are named like {paths[0]}, {paths[-1]}."
        )


def default_sampler(
    checkpoint: Checkpoint, num_steps: int = 50, shape: Sequence[int] | None = None
) -> diffusion.Sampler:
    """Returns the sampler of a checkpoint for samples of a shape, see `checkpoint_sampler`."""
    return checkpoint_sampler(checkpoint, num_steps, shape=shape)


def conditional_and_null(
    model: nn.Module, params: Params, condition: Condition
) -> dict[str, Condition]:
    """Returns the condition, and the null condition where the network has one, keyed by half (`"conditional"`, `"null"`)."""
    halves = {HALVES[0]: without_null(condition)}
    if model.has_null:
        halves[HALVES[1]] = null_condition_of(model, params, condition)
    return halves


def trajectory(
    denoise_fn: Callable[..., Array],
    sampler: diffusion.Sampler,
    model: nn.Module,
    key: Key,
    index: Int[np.ndarray, " B"],
    condition: Condition,
    shape: Sequence[int] | None = None,
) -> tuple[Array, AnyArray]:
    """Returns the network's inputs `[S, B, ...]` and timesteps `[S]` of samples `index`.

    `shape` is that of one sample, the network's own if None.

    Raises:
        ValueError: if the samples are not finite.
    """
    size = shape_of_sample(model, shape)
    noise, keys = initial_noise(key, jnp.asarray(index, jnp.int32), size)
    final, (x, timestep) = diffusion.sample_trajectory(
        denoise_fn, sampler, noise, condition, keys, collect_fn=model_inputs
    )
    check_finite("the samples of the network that is to be calibrated", final)
    return x, timestep


def model_inputs(step: diffusion.Step) -> tuple[Array, AnyArray]:
    return step.x, step.timestep


@partial(jax.jit, static_argnames=("model", "hessians", "num_tokens"))
def observe_call(
    params: Params,
    x: Float[Array, "B ..."],
    timestep: Float[Array, " B"],
    condition: Condition,
    *,
    model: nn.Module,
    hessians: str | None,
    num_tokens: int,
) -> dict[str, AnyArray]:
    """Returns what `observed` finds in one call of the network."""
    rows = input_rows(lambda: model.apply({"params": params}, x, timestep, condition))
    return observed(rows, hessians, num_tokens)
