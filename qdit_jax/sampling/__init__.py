"""From a checkpoint to pictures: denoisers, schedules of training, batched generation."""

from qdit_jax.sampling.generation import (
    Denoiser,
    check_seed,
    checkpoint_sampler,
    conditions_in_turn,
    decode,
    denoiser,
    generate,
    initial_noise,
    own_scheduler,
    own_walk,
    sampler_text,
    trained_schedule,
)

__all__ = [
    "Denoiser",
    "check_seed",
    "checkpoint_sampler",
    "conditions_in_turn",
    "decode",
    "denoiser",
    "generate",
    "initial_noise",
    "own_scheduler",
    "own_walk",
    "sampler_text",
    "trained_schedule",
]
