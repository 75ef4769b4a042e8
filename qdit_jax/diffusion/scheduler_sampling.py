"""The process and the sampler that a diffusers scheduler describes.

Dimension letters: S = number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from qdit_jax.diffusion import posterior
from qdit_jax.diffusion.dpm_solver import multistep_timesteps, solver_over
from qdit_jax.diffusion.flow_matching import dynamic_shift, flow_match_sigmas
from qdit_jax.diffusion.posterior import Limit, LimitFn, VarianceFn
from qdit_jax.diffusion.samplers import Sampler, ddim_sampler, ddpm_sampler
from qdit_jax.diffusion.scheduler_settings import SAYS, Scheduler
from qdit_jax.diffusion.schedules import (
    Schedule,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    sigmoid_betas,
    zero_snr_betas,
)
from qdit_jax.diffusion.table import SamplerRow, sampler_named
from qdit_jax.errors import UserError

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


TITLES = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "dpm-solver++": "DPM-Solver++ (2M)",
    "flow-euler": "Euler's rule",
    "flow-dpm-solver++": "DPM-Solver++ (2M)",
    "unipc": "UniPC (order 2)",
}
# How diffusers spaces the noise levels of a flow's solvers that have a way of their own.
SPACING_OF = {"unipc": "unipc", "flow-dpm-solver++": "dpm"}


def scheduler_process(scheduler: Scheduler) -> Schedule:
    """Returns the process that the network was trained on.

    Raises:
        ValueError: if it is a flow, which has no betas.
    """
    if scheduler.is_flow:
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
    variance_fn: VarianceFn | None = None,
    num_tokens: int | None = None,
    flow_spacing: str | None = None,
    flow_shift: float | None = None,
    **given: Any,
) -> Sampler:
    """Returns the sampler that a scheduler describes: it draws the same samples as diffusers.

    Args:
        steps: how many, at the scheduler's own spacing; or a published spacing (`"ddim25"`,
            `"10,15,20"`) in place of its own.
        sampler: a row of `SAMPLERS` in place of the scheduler's own, on the same process.
        variance_fn: of an ancestral sampler, where the scheduler names no variance.
        num_tokens: of a sample: tokens of its image, from which a dynamic shift is computed.
        flow_spacing: of a flow's noise levels, as the pipeline of the network spaces them where
            the scheduler alone does not say; see `flow_match_sigmas`.
        flow_shift: of a flow's noise levels, where the pipeline of the network computes it.
        given: options of the sampler in place of the scheduler's, those that are None left out.
            `clip` replaces the scheduler's own clipping; `eps` is recomputed from the clipped data.

    Raises:
        ValueError: if the steps or `sampler` do not fit the scheduler, or an option does not fit
            the sampler.
        UserError: if the scheduler's shift depends on the number of tokens, which is not known.
    """
    row = sampler_named(sampler or scheduler.sampler)
    if row.is_flow != scheduler.is_flow:
        raise ValueError(f"sampler={row.name!r} does not fit a {scheduler.class_name}.")
    text = str(steps).strip()
    if not row.spacings and not text.isdecimal():
        raise ValueError(f"steps={steps!r} is not supported; {row.name} takes a positive number.")
    options = row.chosen(**given | {"eta": given.get("eta") or None})
    if row.is_flow:
        return _flow_sampler(
            scheduler, row, int(text), options, num_tokens, flow_spacing, flow_shift
        )
    return _sampler_of_betas(scheduler, row, text, options, variance_fn)


def _flow_sampler(
    scheduler: Scheduler,
    row: SamplerRow,
    steps: int,
    options: dict[str, Any],
    num_tokens: int | None,
    spacing: str | None,
    flow_shift: float | None,
) -> Sampler:
    settings = scheduler.settings
    if "sigmas" in options or "edges" in options:
        return row.make_fn(steps, **options)
    shift = options.pop("shift", flow_shift)
    sigmas = flow_match_sigmas(
        steps,
        shift=scheduler_shift(settings, num_tokens) if shift is None else shift,
        spacing=options.pop("spacing", None) or spacing or scheduler_spacing(scheduler),
        num_train_timesteps=settings["num_train_timesteps"],
        shift_terminal=settings["shift_terminal"],
    )
    levels = {"sigmas": sigmas} if "sigmas" in row.options else {"edges": 1 - sigmas}
    return row.make_fn(steps, **levels, **options)


def scheduler_shift(settings: Mapping[str, Any], num_tokens: int | None) -> float:
    """Returns the shift of a flow's noise levels.

    Raises:
        UserError: if it depends on the number of tokens and there is none.
    """
    if not settings["use_dynamic_shifting"]:
        return float(settings["shift"])
    if num_tokens is None:
        raise UserError(
            f"{SAYS} use_dynamic_shifting=True: its shift depends on the number of image tokens, "
            "which the network does not tell; give the shift."
        )
    return dynamic_shift(
        num_tokens,
        base_shift=settings["base_shift"],
        max_shift=settings["max_shift"],
        base_tokens=settings["base_image_seq_len"],
        max_tokens=settings["max_image_seq_len"],
        kind=settings["time_shift_type"],
    )


def scheduler_spacing(scheduler: Scheduler) -> str:
    """Returns how a flow's noise levels are spaced before the shift, see `flow_match_sigmas`.

    Pipelines with a dynamic shift give their scheduler evenly spaced levels down to `1 / steps`.
    """
    if scheduler.sampler in SPACING_OF:
        return SPACING_OF[scheduler.sampler]
    return "uniform" if scheduler.settings["use_dynamic_shifting"] else "trained"


def _sampler_of_betas(
    scheduler: Scheduler,
    row: SamplerRow,
    text: str,
    given: dict[str, Any],
    variance_fn: VarianceFn | None,
) -> Sampler:
    settings = scheduler.settings
    limit, limit_fn = limits(settings)
    if "clip" in given:
        limit_fn = posterior.consistent_clip
    process = scheduler_process(scheduler)
    predict_fn = PREDICT_FNS[settings["prediction_type"]]
    options = {"clip": limit, "limit_fn": limit_fn, "predict_fn": predict_fn, **given}
    if "variance_fn" in row.options:
        options["variance_fn"] = chosen_variance(settings, variance_fn)
    if scheduler.replaced or "spacing" in given or not text.isdecimal():
        return row.make_fn(text, schedule=process, **options)
    count, spaced = process.num_timesteps, (settings["timestep_spacing"], settings["steps_offset"])
    if row.name == scheduler.sampler == "dpm-solver++":
        visited = multistep_timesteps(count, int(text), *spaced)
        return solver_over(visited, process.alphas_cumprod[visited], **options)
    visited = scheduler_timesteps(count, int(text), *spaced)[::-1]
    if row.name != "ddim":
        between = _between(process, visited)
        if row.name == "ddpm":
            return ddpm_sampler(between, visited > 0, **options)
        return row.make_fn(between.num_timesteps, schedule=between, **options)
    # diffusers' step arrives one integer stride away, even where the next step starts elsewhere.
    arrived = visited - count // int(text)
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
    if scheduler.is_flow:
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
    settings, title = scheduler.settings, TITLES[scheduler.sampler]
    because = f" with {' and '.join(scheduler.because)}" if scheduler.because else ""
    instead = f" (in place of {scheduler.class_name}'s own{because})" if scheduler.replaced else ""
    if scheduler.is_flow:
        end = settings["shift_terminal"]
        ending = "" if end is None else f", the last noise level {end:g}"
        shift = f"shift {settings['shift']:g}"
        if settings["use_dynamic_shifting"]:
            shift = "shift by the number of image tokens"
        return f"{title}{instead}, {shift}{ending}"
    parts = [f"{title}{instead}"]
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
