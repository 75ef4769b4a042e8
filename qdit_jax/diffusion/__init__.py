"""The diffusion process: schedules, samplers, guidance and the loop that joins them."""

from qdit_jax.diffusion.guidance import guided, guided_doubled
from qdit_jax.diffusion.loop import sample, sample_trajectory
from qdit_jax.diffusion.posterior import (
    eps_prediction,
    fixed_large,
    fixed_small,
    learned_range,
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
    reverse_ddim,
)
from qdit_jax.diffusion.schedules import (
    Schedule,
    cosine_betas,
    linear_betas,
    noised,
    scaled_linear_betas,
)

__all__ = [
    "DDIM",
    "DDPM",
    "Flow",
    "Sampler",
    "Schedule",
    "Step",
    "cosine_betas",
    "ddim",
    "ddpm",
    "eps_prediction",
    "euler",
    "fixed_large",
    "fixed_small",
    "flow",
    "guided",
    "guided_doubled",
    "heun",
    "learned_range",
    "linear_betas",
    "noised",
    "respaced",
    "reverse_ddim",
    "sample",
    "sample_trajectory",
    "scaled_linear_betas",
    "spaced_timesteps",
    "x0_prediction",
]
