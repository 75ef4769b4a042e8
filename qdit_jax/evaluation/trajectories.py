"""Trajectories: the samples of a batch at every step in one network, timed without compilation.

Dimensions: B samples of a batch, S steps, H, W, C an image or latent.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from qdit_jax import diffusion
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.errors import UserError
from qdit_jax.metrics import temporal_flickering
from qdit_jax.models import Network, with_guidance
from qdit_jax.report import to_uint8
from qdit_jax.sampling import (
    BATCH,
    PUBLISHED,
    Denoiser,
    Guidance,
    batch_spec,
    chosen_guidance,
    cyclic_conditions,
    decode,
    denoiser,
    initial_noise,
    kept_in_place,
    layout_of,
    on_each_device,
    partition_mesh,
    partitioned_denoisers,
    run_per_device,
    running_params,
    shape_of_sample,
)
from qdit_jax.types import UNSAID, AnyArray, Condition

NUM_PROBED = 16
# (x [B, H, W, C], timestep [B], condition) -> output; a pytree of its parameters.
DenoiseFn: TypeAlias = Callable[[jax.Array, jax.Array, Condition], jax.Array]


@dataclasses.dataclass(frozen=True)
class Contender:
    """A checkpoint to compare, and its title in reports."""

    title: str
    checkpoint: Checkpoint


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How every contender is sampled: everything that a sample depends on beside the network.

    `record` says in JSON which sampler it is; `batch_size` None takes the device's default;
    `conditions` are labels or prompts, cycled over the samples; every class by default. `shape` is
    that of one sample, the network's own by default. `num_probed` is of how many samples single
    network calls are compared as well; 0 saves one more compiled program per contender.
    """

    sampler: diffusion.Sampler
    record: dict[str, Any]
    num_samples: int
    seed: int = 0
    guidance: Guidance | None = PUBLISHED
    guidance_channels: int | str | None = PUBLISHED
    numerics: str = "simulated"
    batch_size: int | None = None
    conditions: Condition = None
    shape: Sequence[int] | None = dataclasses.field(default=None, metadata=UNSAID)
    num_probed: int = dataclasses.field(default=NUM_PROBED, metadata=UNSAID)

    def resolved(self, model: Network) -> Protocol:
        """Returns the protocol with a network's own guidance, where it is left to that."""
        return dataclasses.replace(self, guidance=chosen_guidance(model, self.guidance))

    def shape_of(self, model: Network) -> tuple[int, ...]:
        """Returns the shape of one sample of a network."""
        return shape_of_sample(model, self.shape)

    def condition_of(self, model: Network, index: Int[np.ndarray, " B"]) -> Condition:
        """Returns the conditions of the samples `index`, with guidance where a network embeds it."""
        return with_guidance(model, cyclic_conditions(model, self.conditions, index), self.guidance)


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A batch's trajectory in one network, on the host, and how long it took.

    `x [S, B, H, W, C]` are the network's inputs at each `timestep [S]`, `final [B, H, W, C]` is the
    result of the last step, `images` are that decoded, or None for latents that nothing decodes.
    """

    timestep: np.ndarray
    x: np.ndarray
    final: np.ndarray
    images: np.ndarray | None
    seconds: float
    compile_seconds: float

    def head(self, count: int) -> Trajectory:
        """Returns the first `count` samples."""
        images = None if self.images is None else self.images[:count]
        return dataclasses.replace(
            self, x=self.x[:, :count], final=self.final[:count], images=images
        )

    def stored(self) -> dict[str, Any]:
        """Returns the arrays that a shard stores."""
        samples = (
            {"latents": self.final} if self.images is None else {"images": to_uint8(self.images)}
        )
        times = {"seconds": self.seconds, "compile_seconds": self.compile_seconds}
        clips = self.images
        if clips is not None and clips.ndim == 5 and clips.shape[1] > 1:
            samples["temporal_flickering"] = temporal_flickering(np.clip(clips, -1, 1))
        return {**samples, **times, "timestep": self.timestep}


class BatchSampler:
    """Samples batches with one network: compiled once, timed without compilation."""

    def __init__(
        self,
        denoise_fn: DenoiseFn,
        vae: Checkpoint | None,
        protocol: Protocol,
        mesh: Mesh,
        is_partitioned: bool = False,
    ) -> None:
        self.denoise_fn = denoise_fn
        self.vae = vae
        self.protocol = protocol
        self.mesh = mesh
        self.is_partitioned = is_partitioned  # parameters are split over the mesh
        self.compiled: jax.stages.Compiled | None = None

    def __call__(self, index: Int[np.ndarray, " B"], condition: Condition) -> Trajectory:
        """Returns the trajectories of the samples numbered `index`."""
        model = network(self.denoise_fn).model
        split = NamedSharding(self.mesh, batch_spec(self.mesh))
        numbers, condition = jax.device_put((index, condition), split)
        key = jax.random.key(self.protocol.seed)
        given = (self.denoise_fn, self.protocol.sampler, key, numbers, condition)
        compile_seconds, began = 0.0, time.perf_counter()
        if self.compiled is None:
            layout = None if self.is_partitioned else layout_of(given, self.mesh)
            self.compiled = compiled_trajectory.lower(
                *given, shape=self.protocol.shape_of(model), layout=layout
            ).compile()
            compile_seconds = time.perf_counter() - began
        began = time.perf_counter()
        found = jax.block_until_ready(self.compiled(*given))
        seconds = time.perf_counter() - began
        timestep, x, final = found
        images = None
        if self.vae is not None:
            images = np.asarray(decode(self.vae, final))
        elif model.sample_shape()[-1] in (1, 3):
            images = np.asarray(final)
        return Trajectory(
            np.asarray(timestep), np.asarray(x), np.asarray(final), images, seconds, compile_seconds
        )


@jax.jit(static_argnames=("shape", "layout"))
def compiled_trajectory(denoise_fn, sampler, key, index, condition, shape, layout=None):
    """Returns timesteps `[S]`, inputs `[S, B, H, W, C]` and final latents `[B, H, W, C]`."""

    def sampled(denoise_fn, sampler, key, index, condition):
        noise, keys = initial_noise(key, index, shape)
        final, (timestep, x) = diffusion.sample_trajectory(
            denoise_fn, sampler, noise, condition, keys, collect_fn=timestep_and_input
        )
        return timestep, x, final

    given = (denoise_fn, sampler, key, index, condition)
    specs = PartitionSpec(), PartitionSpec(None, BATCH), PartitionSpec(BATCH)
    return run_per_device(layout, sampled, given, specs)


def timestep_and_input(step: diffusion.Step) -> tuple[AnyArray, AnyArray]:
    return step.timestep, step.x


def network(denoise_fn: DenoiseFn) -> Denoiser:
    """Returns the `Denoiser` inside a guided or plain `denoise_fn`."""
    plain: Any = getattr(denoise_fn, "denoise_fn", denoise_fn)
    return plain


def batch_sampler(checkpoint: Checkpoint, protocol: Protocol, mesh: Mesh) -> BatchSampler:
    """Returns the sampler of a checkpoint with its parameters on every device; split ones stay on their own mesh."""
    home = partition_mesh(checkpoint.params)
    mesh = home or mesh
    model = checkpoint.model.clone(numerics=protocol.numerics)
    guidance, channels = protocol.guidance, protocol.guidance_channels
    denoise_fn: Any
    if home is None:
        with diffusion.on_one_device():  # as each of them computes
            params = running_params(model, checkpoint.params)
        denoise_fn = on_each_device(denoiser(model, params, guidance, channels), mesh)
    else:
        given = model, checkpoint.params, (guidance, channels), home
        denoise_fn, _ = partitioned_denoisers(*given)
    vae = checkpoint.vae
    if vae is not None:
        vae = dataclasses.replace(vae, params=kept_in_place(vae.params, mesh))
    return BatchSampler(denoise_fn, vae, protocol, mesh, home is not None)


def check_finite(trajectory: Trajectory, title: str, start: int) -> None:
    """Raises `UserError` if a sample has a value that is not finite."""
    for values in (trajectory.final, trajectory.images):
        if values is None:
            continue
        bad = np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
        if bad.size:
            raise UserError(
                f"{title}: sample {start + bad[0]} is not finite; this model cannot be scored "
                "with these settings."
            )
