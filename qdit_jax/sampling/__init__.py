"""From a checkpoint to pictures: denoisers, schedules of training, batched generation."""

from qdit_jax.sampling.batches import (
    checked_batch_size,
    default_batch_size,
    device_mesh,
    filled_batch,
)
from qdit_jax.sampling.checks import (
    DEFAULT_GUIDANCE,
    check_diffusion_model,
    check_numerics,
    fitting_guidance,
)
from qdit_jax.sampling.generation import (
    PUBLISHED,
    Denoiser,
    check_seed,
    checkpoint_sampler,
    conditions_in_turn,
    decode,
    denoiser,
    fitting_samplers,
    generate,
    generated_batches,
    initial_noise,
    num_guided_channels,
    own_sampler,
    own_scheduler,
    sampler_text,
)

__all__ = [
    "DEFAULT_GUIDANCE",
    "PUBLISHED",
    "Denoiser",
    "check_diffusion_model",
    "check_numerics",
    "check_seed",
    "checked_batch_size",
    "checkpoint_sampler",
    "conditions_in_turn",
    "decode",
    "default_batch_size",
    "denoiser",
    "device_mesh",
    "filled_batch",
    "fitting_guidance",
    "fitting_samplers",
    "generate",
    "generated_batches",
    "initial_noise",
    "num_guided_channels",
    "own_sampler",
    "own_scheduler",
    "sampler_text",
]
