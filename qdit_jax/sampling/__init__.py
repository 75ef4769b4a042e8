"""From a checkpoint to pictures: denoisers, schedules of training, batched generation."""

from qdit_jax.sampling.generation import (
    Denoiser,
    conditions_in_turn,
    decode,
    denoiser,
    generate,
    initial_noise,
    trained_schedule,
)

__all__ = [
    "Denoiser",
    "conditions_in_turn",
    "decode",
    "denoiser",
    "generate",
    "initial_noise",
    "trained_schedule",
]
