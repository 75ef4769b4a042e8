"""From a checkpoint to pictures: denoisers, schedules of training, batched generation."""

from qdit_jax.sampling.generation import (
    Denoiser,
    checked_batch_size,
    checked_labels,
    decode,
    denoiser,
    generate,
    generated_batches,
    initial_noise,
    latent_shape,
    trained_schedule,
)

__all__ = [
    "Denoiser",
    "checked_batch_size",
    "checked_labels",
    "decode",
    "denoiser",
    "generate",
    "generated_batches",
    "initial_noise",
    "latent_shape",
    "trained_schedule",
]
