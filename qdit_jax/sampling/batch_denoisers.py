"""Who denoises each batch: one denoiser for all of them, or one for each whose modulation is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from qdit_jax import diffusion
from qdit_jax.sampling.denoisers import denoiser
from qdit_jax.sampling.hoisted import check_hoisting, hoisting, unhoistable_reason
from qdit_jax.sampling.own_guidance import Guidance
from qdit_jax.sampling.own_samplers import called_timesteps, has_known_calls
from qdit_jax.sampling.partitioned import kept_in_place
from qdit_jax.sampling.per_device import on_each_device
from qdit_jax.sampling.running import running_params
from qdit_jax.sampling.spare_memory import MOST_BYTES, spare_bytes
from qdit_jax.types import Condition, Params

DenoiseFn = Callable[..., Array]
# (conditions of a batch, its size) -> its denoiser.
DenoiserOf = Callable[[Condition, int], DenoiseFn]


def batch_denoisers(
    model: nn.Module,
    params: Params,
    sampler: diffusion.Sampler,
    guided: tuple[Guidance | None, int | str | None],
    mesh: Mesh,
    size: tuple[int, ...],
    first_frames: object,
    shard_tokens: int,
    hoist: bool | None,
) -> tuple[DenoiseFn, DenoiserOf]:
    """Returns a denoiser for checks, and the function that has that of a batch, on the devices of `mesh`.

    The arguments are as in `generated_batches`; `size` is the shape of a sample.

    Raises:
        ValueError: if `hoist` is true and nothing can be computed before the loop.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    most_bytes = MOST_BYTES
    if hoist:
        check_hoisting(model, params, first_frames=first_frames, shard_tokens=shard_tokens)
    if falls_back := hoist is None:
        reason = unhoistable_reason(model, params, first_frames, shard_tokens)
        most_bytes = spare_bytes(params)
        hoist = reason is None and has_known_calls(sampler) and most_bytes > 0
    if not hoist:
        shared = None if shard_tokens == 1 else mesh
        with diffusion.on_one_device():  # as each of them computes
            running = running_params(model, params)
        fn = denoiser(model, running, *guided, shared)
        return fn, always(on_each_device(fn, mesh))
    params, timesteps = jax.device_put(params, whole), called_timesteps(sampler)
    settings: Any = {"most_bytes": most_bytes, "shape": size, "falls_back": falls_back}
    denoiser_of = hoisting(model, params, timesteps, *guided, mesh=mesh, **settings)
    return denoiser(model, params, *guided), denoiser_of


def partitioned_denoisers(
    model: nn.Module,
    params: Params,
    guided: tuple[Guidance | None, int | str | None],
    mesh: Mesh,
) -> tuple[DenoiseFn, DenoiserOf]:
    """Returns the same of parameters that are split over a mesh, where they stay."""
    running = running_params(model, kept_in_place(params, mesh))
    fn = denoiser(model, running, *guided)
    return fn, always(fn)


def always(denoise_fn: DenoiseFn) -> DenoiserOf:
    """Returns the function that has the same denoiser for every batch."""
    return lambda condition, num_samples: denoise_fn
