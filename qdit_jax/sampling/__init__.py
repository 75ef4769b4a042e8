"""From a checkpoint to pictures: denoisers, schedules of training, batched generation."""

from qdit_jax.sampling.checks import (
    DEFAULT_GUIDANCE,
    check_diffusion_model,
    check_execution,
    fitting_guidance,
)
from qdit_jax.sampling.generation import (
    PUBLISHED_CHANNELS,
    Denoiser,
    checked_labels,
    decode,
    denoiser,
    generate,
    initial_noise,
    latent_shape,
    trained_schedule,
)

__all__ = [
    "DEFAULT_GUIDANCE",
    "PUBLISHED_CHANNELS",
    "Denoiser",
    "check_diffusion_model",
    "check_execution",
    "checked_labels",
    "decode",
    "denoiser",
    "fitting_guidance",
    "generate",
    "initial_noise",
    "latent_shape",
    "trained_schedule",
]
