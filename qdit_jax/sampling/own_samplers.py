"""The sampler of a checkpoint: its own scheduler's, or what its network was published with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn

from qdit_jax import diffusion
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.errors import UserError

# What a sampler of a velocity takes by default: the units of SiT.
BY_STEPS = "tokens and steps"  # a network's `flow_shift`
OF_SIT: dict[str, Any] = {"flow_times": (0.0, 1.0), "velocity_to": "data"}


def own_scheduler(metadata: Mapping[str, Any]) -> diffusion.Scheduler | None:
    """Returns the scheduler that a checkpoint came with, or None.

    Raises:
        UserError: naming the setting and its value, if it cannot be understood.
    """
    config = metadata.get("scheduler")
    return diffusion.read_scheduler(config) if config else None


def checkpoint_sampler(
    checkpoint: Checkpoint,
    steps: int | str = 50,
    *,
    sampler: str | None = None,
    eta: float | int = 0.0,
    clip: float | int | None = None,
    shift: float | int | None = None,
    spacing: str | None = None,
    shape: Sequence[int] | None = None,
) -> diffusion.Sampler:
    """Returns the sampler of a checkpoint: its own scheduler's, or the published one.

    Without a scheduler that is the network's `default_sampler`, with the shift and the spacing that
    the network says.

    Args:
        steps: a number, or a published spacing (`"ddim25"`) in place of the scheduler's own.
        sampler: a row of `diffusion.SAMPLERS` that fits the network; None for its own.
        eta: noise of DDIM.
        clip: range of the predicted data, in place of the scheduler's own clipping.
        shift: of a flow's noise levels, in place of the scheduler's or the network's own.
        spacing: of timesteps or noise levels, as the sampler names it, in place of their own.
        shape: of one sample, where the shift depends on it; the network's own by default.

    Raises:
        ValueError: if the options do not fit the network, its scheduler or each other.
        UserError: if the scheduler needs what the network does not tell.
    """
    model, scheduler = checkpoint.model, own_scheduler(checkpoint.metadata)
    own = own_sampler(checkpoint)
    name = sampler or own
    row = diffusion.sampler_named(name)
    if model.prediction not in row.predictions:
        raise ValueError(f"sampler={name!r}: {fitting_samplers(model)}")
    given = row.chosen(eta=eta or None, clip=clip, shift=shift, spacing=spacing)
    size = tuple(model.sample_shape() if shape is None else shape)
    if row.is_flow:
        given |= units_of(model, row, scheduler)
    variance_fn = diffusion.learned_range if model.learned_variance else diffusion.fixed_large
    if scheduler is not None:
        dynamic = scheduler.settings.get("use_dynamic_shifting", False)
        return diffusion.scheduler_sampler(
            scheduler,
            steps,
            sampler=name,
            variance_fn=variance_fn,
            num_tokens=said(model, "num_tokens", size),
            flow_spacing=getattr(model, "flow_spacing", None),
            flow_shift=shift_by_steps(model, size, steps, scheduler.settings) if dynamic else None,
            **given,
        )
    if not row.spacings:
        if not str(steps).isdecimal():
            raise ValueError(f"steps={steps!r}: {name} takes a positive number.")
        return row.make_fn(int(steps), **own_levels(model, row, size, steps, given), **given)
    if "variance_fn" in row.options:
        given["variance_fn"] = variance_fn
    return row.make_fn(steps, predict_fn=diffusion.PREDICT_FNS[model.prediction], **given)


def units_of(
    model: nn.Module, row: diffusion.SamplerRow, scheduler: diffusion.Scheduler | None
) -> dict[str, Any]:
    """Returns the options of a flow's sampler that say a network's times and direction.

    Raises:
        ValueError: if the sampler knows only those of SiT and the network has others.
        UserError: if the scheduler counts other timesteps than the network.
    """
    units = {name: getattr(model, name, value) for name, value in OF_SIT.items()}
    if set(units) - set(row.options):
        if units != OF_SIT:
            raise ValueError(
                f"sampler={row.name!r} knows times from 0 at noise to 1 at the data only, and this "
                f"network has flow_times={units['flow_times']} and velocity_to="
                f"{units['velocity_to']!r}; use another sampler."
            )
        return {}
    span = abs(units["flow_times"][0] - units["flow_times"][1])
    count = None if scheduler is None else scheduler.settings["num_train_timesteps"]
    counted = span / getattr(model, "timestep_scale", 1.0)  # Sana's pipeline multiplies timesteps
    if span > 1 and count not in (None, counted):
        raise UserError(
            f"scheduler_config.json says num_train_timesteps={count}, but the network's time at noise "
            f"is {units['flow_times'][0]:g}; convert the pipeline again."
        )
    return units


def shift_by_steps(
    model: nn.Module, shape: tuple[int, ...], steps: int | str, settings: Mapping[str, Any]
) -> float | None:
    """Returns the shift by a sample's tokens and the steps; None where a network has no such one."""
    num_tokens = said(model, "num_tokens", shape)
    if getattr(model, "flow_shift", None) != BY_STEPS or num_tokens is None:
        return None
    if not str(steps).strip().isdecimal():
        return None  # who makes the sampler says what is wrong
    kind = settings.get("time_shift_type", "exponential")
    return diffusion.empirical_shift(num_tokens, int(steps), kind)


def own_levels(
    model: nn.Module,
    row: diffusion.SamplerRow,
    shape: tuple[int, ...],
    steps: int | str,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the shift and the spacing of noise levels that a network says, unless they are given.

    Raises:
        ValueError: if its shift follows from what it does not tell of a sample.
    """
    if "shift" not in row.options:
        return {}
    spacing = {"spacing": getattr(model, "flow_spacing", None)}
    found = {name: value for name, value in spacing.items() if name not in given}
    if "shift" in given:
        return found
    shift = getattr(model, "flow_shift", 1.0)
    if shift == "tokens":
        num_tokens = said(model, "num_tokens", shape)
        shift = None if num_tokens is None else diffusion.dynamic_shift(num_tokens)
    elif shift == BY_STEPS:
        shift = shift_by_steps(model, shape, steps, {})
    elif shift == "resolution":
        resolution = said(model, "resolution_of", shape)
        shift = None if resolution is None else diffusion.resolution_shift(*resolution)
    if shift is None:
        raise ValueError(
            f"this network's flow_shift={model.flow_shift!r} follows from a sample's size, which it "
            "does not tell; give shift."
        )
    return {"shift": shift, **found}


def said(model: nn.Module, name: str, shape: tuple[int, ...]) -> Any:
    """Returns what a network's method says of a sample's shape; None if it has no such method."""
    method = getattr(model, name, None)
    return None if method is None else method(shape)


def fitting_samplers(model: nn.Module) -> str:
    """Returns a sentence that names the samplers that fit a network."""
    what = model.prediction
    kind = {"velocity": "a velocity", "epsilon": "noise"}.get(what, what)
    return f"this model predicts {kind}; use {' or '.join(diffusion.samplers_of(what))}."


def own_sampler(checkpoint: Checkpoint) -> str:
    """Returns the name in `diffusion.SAMPLERS` of a checkpoint's own sampler.

    Raises:
        UserError: if the network does not return what its scheduler reads.
    """
    model, scheduler = checkpoint.model, own_scheduler(checkpoint.metadata)
    if scheduler is None:
        return model.default_sampler
    is_flow = model.prediction == "velocity"
    diffusion.check_fit(is_flow, model.learned_variance, scheduler)
    return scheduler.sampler


def sampler_timesteps(sampler: diffusion.Sampler) -> tuple[float, ...]:
    """Returns the timesteps at which a sampler calls the network, one per step, in its order."""
    return tuple(np.asarray(sampler.table.timestep, np.float32).tolist())


def called_timesteps(sampler: diffusion.Sampler) -> tuple[float, ...]:
    """Returns every timestep at which a sampler may call the network: of each step, and where else its rule looks.

    They are the columns of its table whose names begin with `timestep`.
    """
    names = [name for name in dir(sampler.table) if name.startswith("timestep")]
    columns = [np.asarray(getattr(sampler.table, name), np.float32).ravel() for name in names]
    more = {float(timestep) for column in columns for timestep in column}
    return (*(first := sampler_timesteps(sampler)), *sorted(more - set(first)))


def has_known_calls(sampler: diffusion.Sampler) -> bool:
    """Returns whether a sampler is known to call the network at `called_timesteps` only: those of this library."""
    rule = getattr(sampler, "solve_fn", type(sampler))
    own = diffusion.__name__ + "."
    return all(one.__module__.startswith(own) for one in (rule, type(sampler)))


def sampler_text(checkpoint: Checkpoint) -> str | None:
    """Returns a description of the checkpoint's own scheduler, or None if it has none."""
    scheduler = own_scheduler(checkpoint.metadata)
    if scheduler is None:
        return None
    return (
        f"{scheduler.class_name}: {diffusion.process_text(scheduler)}; "
        f"sampler: {diffusion.sampling_text(scheduler)}"
    )
