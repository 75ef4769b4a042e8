"""From a checkpoint to images: denoisers, a checkpoint's own scheduler, batched generation."""

from qdit_jax.diffusion import on_one_device
from qdit_jax.sampling.batch_denoisers import partitioned_denoisers
from qdit_jax.sampling.batches import (
    checked_batch_size,
    default_batch_size,
    device_mesh,
    filled_batch,
    token_mesh,
)
from qdit_jax.sampling.checks import (
    calls_per_step,
    check_diffusion_model,
    check_numerics,
    check_seed,
    fitting_guidance,
    num_guided_channels,
    sample_count,
)
from qdit_jax.sampling.condition_file import Conditions, read_conditions, write_conditions
from qdit_jax.sampling.conditions import (
    check_call,
    check_entries,
    check_takes,
    checked_conditions,
    cyclic_conditions,
    num_conditions,
    rows_of,
    sample_attention,
    sample_rows,
    shape_of_sample,
)
from qdit_jax.sampling.decoding import decode, decodes_video, encode
from qdit_jax.sampling.denoisers import Denoiser, denoiser
from qdit_jax.sampling.first_frames import checked_first_frames, takes_first_frames
from qdit_jax.sampling.generation import (
    generate,
    generated_batches,
    initial_noise,
)
from qdit_jax.sampling.hoisted import HoistedDenoiser, check_hoisting, hoisted, known_outputs
from qdit_jax.sampling.own_guidance import (
    DEFAULT_GUIDANCE,
    PUBLISHED,
    Guidance,
    by_expert,
    chosen_guidance,
    guidance_record,
    guidance_text,
    own_guidance,
    takes_embedded_guidance,
)
from qdit_jax.sampling.own_samplers import (
    checkpoint_sampler,
    fitting_samplers,
    own_sampler,
    own_scheduler,
    sampler_text,
    sampler_timesteps,
)
from qdit_jax.sampling.partitioned import (
    batch_parts,
    batch_spec,
    check_whole,
    kept_in_place,
    params_in_place,
    partition_mesh,
)
from qdit_jax.sampling.per_device import (
    BATCH,
    Layout,
    layout_of,
    on_each_device,
    run_per_device,
)
from qdit_jax.sampling.running import running_params, with_narrow_kernels, with_ready_kernels
from qdit_jax.sampling.sizes import size_unit, sized_shape, with_sizes

__all__ = [
    "BATCH",
    "DEFAULT_GUIDANCE",
    "PUBLISHED",
    "Conditions",
    "Denoiser",
    "Guidance",
    "HoistedDenoiser",
    "Layout",
    "batch_parts",
    "batch_spec",
    "by_expert",
    "calls_per_step",
    "check_call",
    "check_diffusion_model",
    "check_entries",
    "check_hoisting",
    "check_numerics",
    "check_seed",
    "check_takes",
    "check_whole",
    "checked_batch_size",
    "checked_conditions",
    "checked_first_frames",
    "checkpoint_sampler",
    "chosen_guidance",
    "cyclic_conditions",
    "decode",
    "decodes_video",
    "default_batch_size",
    "denoiser",
    "device_mesh",
    "encode",
    "filled_batch",
    "fitting_guidance",
    "fitting_samplers",
    "generate",
    "generated_batches",
    "guidance_record",
    "guidance_text",
    "hoisted",
    "initial_noise",
    "kept_in_place",
    "known_outputs",
    "layout_of",
    "num_conditions",
    "num_guided_channels",
    "on_each_device",
    "on_one_device",
    "own_guidance",
    "own_sampler",
    "own_scheduler",
    "params_in_place",
    "partition_mesh",
    "partitioned_denoisers",
    "read_conditions",
    "rows_of",
    "run_per_device",
    "running_params",
    "sample_attention",
    "sample_count",
    "sample_rows",
    "sampler_text",
    "sampler_timesteps",
    "shape_of_sample",
    "size_unit",
    "sized_shape",
    "takes_embedded_guidance",
    "takes_first_frames",
    "token_mesh",
    "with_narrow_kernels",
    "with_ready_kernels",
    "with_sizes",
    "write_conditions",
]
