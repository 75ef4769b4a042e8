"""The diffusion process: schedules, samplers, guidance, and the sampling loop.

Names are imported from their files when they are first used, so that the table of samplers can be
read without importing JAX.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from qdit_jax.diffusion.table import SAMPLERS, SamplerRow, sampler_named, samplers_of

if TYPE_CHECKING:
    from qdit_jax.diffusion.dpm_solver import DPMSolver, dpm_solver_pp
    from qdit_jax.diffusion.dpm_solver_flow import FlowSolver, flow_dpm_solver_pp
    from qdit_jax.diffusion.flow_matching import (
        dynamic_shift,
        empirical_shift,
        flow_euler,
        flow_match_sigmas,
        resolution_shift,
        shifted,
    )
    from qdit_jax.diffusion.guidance import (
        SteppedScale,
        check_condition,
        guided,
        guided_doubled,
        of_samples,
    )
    from qdit_jax.diffusion.kept_frames import KeepsFrames, keeping_frames
    from qdit_jax.diffusion.loop import sample, sample_trajectory
    from qdit_jax.diffusion.posterior import (
        consistent_clip,
        data_clip,
        dynamic_threshold,
        eps_prediction,
        fixed_large,
        fixed_small,
        learned_range,
        v_prediction,
        x0_prediction,
    )
    from qdit_jax.diffusion.respacing import respaced, spaced_timesteps
    from qdit_jax.diffusion.samplers import (
        DDIM,
        DDPM,
        MultistepSampler,
        Sampler,
        SingleStepSampler,
        Step,
        ddim,
        ddpm,
        initial_state,
        reverse_ddim,
        take_step,
    )
    from qdit_jax.diffusion.scheduler_sampling import (
        PREDICT_FNS,
        process_text,
        sampling_text,
        scheduler_process,
        scheduler_sampler,
        scheduler_timesteps,
    )
    from qdit_jax.diffusion.scheduler_settings import Scheduler, check_fit, read_scheduler
    from qdit_jax.diffusion.schedules import (
        Schedule,
        cosine_betas,
        linear_betas,
        noised,
        scaled_linear_betas,
        sigmoid_betas,
        zero_snr_betas,
    )
    from qdit_jax.diffusion.settings import (
        HARMLESS,
        Setting,
        Table,
        check_setting,
        shown,
        understood,
    )
    from qdit_jax.diffusion.sharded import in_auto_axes, on_one_device
    from qdit_jax.diffusion.unipc_flow import UniPC, unipc
    from qdit_jax.diffusion.velocity_flow import Flow, euler, flow, heun

# File -> its public names.
LAZY = {
    "dpm_solver": ("DPMSolver", "dpm_solver_pp"),
    "dpm_solver_flow": ("FlowSolver", "flow_dpm_solver_pp"),
    "flow_matching": (
        "dynamic_shift",
        "empirical_shift",
        "flow_euler",
        "flow_match_sigmas",
        "resolution_shift",
        "shifted",
    ),
    "guidance": ("SteppedScale", "check_condition", "guided", "guided_doubled", "of_samples"),
    "kept_frames": ("KeepsFrames", "keeping_frames"),
    "loop": ("sample", "sample_trajectory"),
    "posterior": (
        "consistent_clip",
        "data_clip",
        "dynamic_threshold",
        "eps_prediction",
        "fixed_large",
        "fixed_small",
        "learned_range",
        "v_prediction",
        "x0_prediction",
    ),
    "respacing": ("respaced", "spaced_timesteps"),
    "samplers": (
        "DDIM",
        "DDPM",
        "MultistepSampler",
        "Sampler",
        "SingleStepSampler",
        "Step",
        "ddim",
        "ddpm",
        "initial_state",
        "reverse_ddim",
        "take_step",
    ),
    "scheduler_settings": ("Scheduler", "check_fit", "read_scheduler"),
    "scheduler_sampling": (
        "PREDICT_FNS",
        "process_text",
        "scheduler_process",
        "scheduler_sampler",
        "scheduler_timesteps",
        "sampling_text",
    ),
    "schedules": (
        "Schedule",
        "cosine_betas",
        "linear_betas",
        "noised",
        "scaled_linear_betas",
        "sigmoid_betas",
        "zero_snr_betas",
    ),
    "settings": ("HARMLESS", "Setting", "Table", "check_setting", "shown", "understood"),
    "sharded": ("in_auto_axes", "on_one_device"),
    "unipc_flow": ("UniPC", "unipc"),
    "velocity_flow": ("Flow", "euler", "flow", "heun"),
}
FILE_OF = {name: file for file, names in LAZY.items() for name in names}

__all__ = [
    "DDIM",
    "DDPM",
    "HARMLESS",
    "PREDICT_FNS",
    "SAMPLERS",
    "DPMSolver",
    "Flow",
    "FlowSolver",
    "KeepsFrames",
    "MultistepSampler",
    "Sampler",
    "SamplerRow",
    "Schedule",
    "Scheduler",
    "Setting",
    "SingleStepSampler",
    "Step",
    "SteppedScale",
    "Table",
    "UniPC",
    "check_condition",
    "check_fit",
    "check_setting",
    "consistent_clip",
    "cosine_betas",
    "data_clip",
    "ddim",
    "ddpm",
    "dpm_solver_pp",
    "dynamic_shift",
    "dynamic_threshold",
    "empirical_shift",
    "eps_prediction",
    "euler",
    "fixed_large",
    "fixed_small",
    "flow",
    "flow_dpm_solver_pp",
    "flow_euler",
    "flow_match_sigmas",
    "guided",
    "guided_doubled",
    "heun",
    "in_auto_axes",
    "initial_state",
    "keeping_frames",
    "learned_range",
    "linear_betas",
    "noised",
    "of_samples",
    "on_one_device",
    "process_text",
    "read_scheduler",
    "resolution_shift",
    "respaced",
    "reverse_ddim",
    "sample",
    "sample_trajectory",
    "sampler_named",
    "samplers_of",
    "sampling_text",
    "scaled_linear_betas",
    "scheduler_process",
    "scheduler_sampler",
    "scheduler_timesteps",
    "shifted",
    "shown",
    "sigmoid_betas",
    "spaced_timesteps",
    "take_step",
    "understood",
    "unipc",
    "v_prediction",
    "x0_prediction",
    "zero_snr_betas",
]


def __getattr__(name: str) -> object:
    """Returns a public name, imported from its file now."""
    if name not in FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{FILE_OF[name]}"), name)
    globals()[name] = value
    return value
