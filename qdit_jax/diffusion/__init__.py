"""The diffusion process: schedules, samplers, guidance and the loop that joins them."""

from qdit_jax.diffusion.flow_match import flow_match, flow_match_sigmas
from qdit_jax.diffusion.guidance import guided, guided_doubled
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
    Flow,
    Sampler,
    Step,
    ddim,
    ddpm,
    euler,
    flow,
    heun,
)
from qdit_jax.diffusion.scheduler_settings import Scheduler, check_fit, read_scheduler
from qdit_jax.diffusion.scheduler_walk import (
    process_text,
    scheduler_process,
    scheduler_sampler,
    scheduler_timesteps,
    walk_text,
)
from qdit_jax.diffusion.schedules import (
    Schedule,
    cosine_betas,
    linear_betas,
    noised,
    scaled_linear_betas,
    sigmoid_betas,
    zero_snr_betas,
)
from qdit_jax.diffusion.settings import HARMLESS, Setting, Table, check_setting, shown, understood
from qdit_jax.diffusion.sharded import in_auto_axes

__all__ = [
    "DDIM",
    "DDPM",
    "HARMLESS",
    "Flow",
    "Sampler",
    "Schedule",
    "Scheduler",
    "Setting",
    "Step",
    "Table",
    "check_fit",
    "check_setting",
    "consistent_clip",
    "cosine_betas",
    "data_clip",
    "ddim",
    "ddpm",
    "dynamic_threshold",
    "eps_prediction",
    "euler",
    "fixed_large",
    "fixed_small",
    "flow",
    "flow_match",
    "flow_match_sigmas",
    "guided",
    "guided_doubled",
    "heun",
    "in_auto_axes",
    "learned_range",
    "linear_betas",
    "noised",
    "process_text",
    "read_scheduler",
    "respaced",
    "sample",
    "sample_trajectory",
    "scaled_linear_betas",
    "scheduler_process",
    "scheduler_sampler",
    "scheduler_timesteps",
    "shown",
    "sigmoid_betas",
    "spaced_timesteps",
    "understood",
    "v_prediction",
    "walk_text",
    "x0_prediction",
    "zero_snr_betas",
]
