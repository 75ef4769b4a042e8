"""The process and the sampler that a diffusers scheduler describes.

Dimension letters: S = number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from qdit_jax.diffusion import posterior
from qdit_jax.diffusion.flow_matching import flow_match
from qdit_jax.diffusion.posterior import Limit, LimitFn, VarianceFn
from qdit_jax.diffusion.samplers import Sampler, ddim_sampler, ddpm_sampler
from qdit_jax.diffusion.scheduler_settings import Scheduler
from qdit_jax.diffusion.schedules import (
    Schedule,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    sigmoid_betas,
    zero_snr_betas,
)
from qdit_jax.diffusion.table import sampler_named

PREDICT_FNS = {
    "epsilon": posterior.eps_prediction,
    "v_prediction": posterior.v_prediction,
    "sample": posterior.x0_prediction,
}
VARIANCE_FNS = {
    "fixed_small": posterior.fixed_small,
    "fixed_small_log": posterior.fixed_small,  # the same variance, by way of its logarithm
    "fixed_large": posterior.fixed_large,
    "learned_range": posterior.learned_range,
}


def scheduler_process(scheduler: Scheduler) -> Schedule:
    """Returns the process that the network was trained on.

    Raises:
        ValueError: if it is a flow, which has no betas.
    """
    if scheduler.sampler == "flow":
        raise ValueError(
            f"a {scheduler.class_name} describes a flow, which has no schedule of betas."
        )
    settings = scheduler.settings
    betas = _betas(settings)
    return Schedule(zero_snr_betas(betas) if settings["rescale_betas_zero_snr"] else betas)


def _betas(settings: Mapping[str, Any]) -> Float[np.ndarray, " S"]:
    if settings["trained_betas"] is not None:
        return np.asarray(settings["trained_betas"], np.float64)
    count, name = settings["num_train_timesteps"], settings["beta_schedule"]
    if name == "squaredcos_cap_v2":
        return cosine_betas(count)
    functions = {
        "linear": linear_betas,
        "scaled_linear": scaled_linear_betas,
        "sigmoid": sigmoid_betas,
    }
    return functions[name](count, float(settings["beta_start"]), float(settings["beta_end"]))


def scheduler_timesteps(
    num_timesteps: int, steps: int, spacing: str, offset: int = 0
) -> Int[np.ndarray, " S"]:
    """Returns the timesteps that diffusers visits, descending.

    Raises:
        ValueError: if there are not as many, or `offset` leads beyond the last one.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(
            f"steps={steps} is not supported; the process has {num_timesteps} timesteps, use 1 to "
            f"{num_timesteps}."
        )
    if spacing == "linspace":
        return np.linspace(0, num_timesteps - 1, steps).round().astype(np.int64)[::-1]
    if spacing == "trailing":
        found = np.arange(num_timesteps, 0, -num_timesteps / steps)[:steps]
        return found.round().astype(np.int64) - 1
    found = np.arange(steps)[::-1] * (num_timesteps // steps) + offset
    if found[0] >= num_timesteps:
        raise ValueError(
            f"steps={steps} with steps_offset={offset} lead to timestep {found[0]}, but the last is "
            f"{num_timesteps - 1}; use fewer steps."
        )
    return found


def scheduler_sampler(
    scheduler: Scheduler,
    steps: int | str = 50,
    *,
    sampler: str | None = None,
    eta: float | int = 0.0,
    clip: float | int | None = None,
    variance_fn: VarianceFn | None = None,
) -> Sampler:
    """Returns the sampler that a scheduler describes: it draws the same samples as diffusers.

    Args:
        steps: how many, at the scheduler's own spacing; or a published spacing (`"ddim25"`,
            `"10,15,20"`) in place of its own.
        sampler: a row of `SAMPLERS` in place of the scheduler's own, on the same process.
        clip: range of the predicted data in place of the scheduler's own clipping; `eps` is
            recomputed from the clipped data.
        variance_fn: of an ancestral sampler, where the scheduler names no variance.

    Raises:
        ValueError: if the steps or `sampler` do not fit the scheduler, or an option does not fit
            the sampler.
    """
    settings, row = scheduler.settings, sampler_named(sampler or scheduler.sampler)
    if row.is_flow != (scheduler.sampler == "flow"):
        raise ValueError(f"sampler={row.name!r} does not fit a {scheduler.class_name}.")
    text = str(steps).strip()
    if not row.spacings and not text.isdecimal():
        raise ValueError(f"steps={steps!r} is not supported; {row.name} takes a positive number.")
    given = row.chosen(eta=eta or None, clip=clip)
    if row.is_flow:
        return flow_match(int(text), make_fn=row.make_fn, **settings)
    limit, limit_fn = limits(settings) if clip is None else (clip, posterior.consistent_clip)
    process = scheduler_process(scheduler)
    options: dict[str, Any] = {
        **given,
        "clip": limit,
        "limit_fn": limit_fn,
        "predict_fn": PREDICT_FNS[settings["prediction_type"]],
    }
    if "variance_fn" in row.options:
        options["variance_fn"] = chosen_variance(settings, variance_fn)
    if scheduler.replaced or not text.isdecimal():
        return row.make_fn(text, schedule=process, **options)
    visited = scheduler_timesteps(
        process.num_timesteps, int(text), settings["timestep_spacing"], settings["steps_offset"]
    )[::-1]
    if row.name != "ddim":
        between = _between(process, visited)
        if row.name == "ddpm":
            return ddpm_sampler(between, visited > 0, **options)
        return row.make_fn(between.num_timesteps, schedule=between, **options)
    # diffusers' step arrives one integer stride away, even where the next step starts elsewhere.
    arrived = visited - process.num_timesteps // int(text)
    last = 1.0 if settings.get("set_alpha_to_one", True) else process.alphas_cumprod[0]
    target = np.where(arrived >= 0, process.alphas_cumprod[np.maximum(arrived, 0)], last)
    return ddim_sampler(visited, process.alphas_cumprod[visited], target, **options)


def _between(process: Schedule, visited: Int[np.ndarray, " S"]) -> Schedule:
    """Returns the process that visits only some timesteps, ascending."""
    kept = process.alphas_cumprod[visited]
    return Schedule(1 - kept / np.append(1.0, kept[:-1]), visited)


def limits(settings: Mapping[str, Any]) -> tuple[Limit | None, LimitFn]:
    """Returns the limit of the predicted data (or None) and its rule."""
    if settings.get("thresholding"):
        limit = settings["dynamic_thresholding_ratio"], settings["sample_max_value"]
        return limit, posterior.dynamic_threshold
    if settings.get("clip_sample"):
        return settings["clip_sample_range"], posterior.data_clip
    return None, posterior.data_clip


def chosen_variance(settings: Mapping[str, Any], otherwise: VarianceFn | None) -> VarianceFn:
    """Returns the variance of an ancestral sampler: the scheduler's, where it names one."""
    if "variance_type" in settings:
        return VARIANCE_FNS[settings["variance_type"]]
    return posterior.fixed_large if otherwise is None else otherwise


def process_text(scheduler: Scheduler) -> str:
    """Returns the process in words."""
    settings = scheduler.settings
    if scheduler.sampler == "flow":
        return f"a flow with times up to {settings['num_train_timesteps']}"
    if settings["trained_betas"] is not None:
        betas = f"{len(settings['trained_betas'])} betas of its own"
    elif settings["beta_schedule"] == "squaredcos_cap_v2":
        betas = f"{settings['num_train_timesteps']} squaredcos_cap_v2 betas"
    else:
        betas = (
            f"{settings['num_train_timesteps']} {settings['beta_schedule']} betas from "
            f"{settings['beta_start']:g} to {settings['beta_end']:g}"
        )
    zero = ", rescaled to zero terminal SNR" if settings["rescale_betas_zero_snr"] else ""
    return f"{betas}{zero}; the network predicts {settings['prediction_type']}"


def sampling_text(scheduler: Scheduler) -> str:
    """Returns in words how samples are drawn."""
    settings = scheduler.settings
    instead = f" (in place of {scheduler.class_name}'s own)" if scheduler.replaced else ""
    if scheduler.sampler == "flow":
        end = settings["shift_terminal"]
        ending = "" if end is None else f", the last noise level {end:g}"
        return f"Euler's rule{instead}, shift {settings['shift']:g}{ending}"
    parts = [f"{scheduler.sampler.upper()}{instead}"]
    if scheduler.replaced:
        parts.append("steps evenly spaced from first to last")
    else:
        offset = settings["steps_offset"] if settings["timestep_spacing"] == "leading" else 0
        parts.append(f"{settings['timestep_spacing']} spacing" + (f" + {offset}" if offset else ""))
    if not settings.get("set_alpha_to_one", True):
        parts.append("last step to the first timestep's alpha")
    if settings.get("thresholding"):
        parts.append(
            f"data thresholded at quantile {settings['dynamic_thresholding_ratio']:g}, at most "
            f"{settings['sample_max_value']:g}"
        )
    elif settings.get("clip_sample"):
        parts.append(f"data clipped to {settings['clip_sample_range']:g}")
    if scheduler.sampler == "ddpm":
        parts.append(f"variance {settings['variance_type']}")
    return ", ".join(parts)
