"""Sampling several models from the same noise, labels and steps, and measuring them in pairs.

The first contender is the reference of the others. Every batch is a shard on disk
(see `store`), so that a killed run resumes without repeating or losing a sample.
Dimensions: N samples, B samples of a batch, S steps, H, W, C an image or latent.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qdit_jax import diffusion, metrics
from qdit_jax.checkpoint import Checkpoint, digest
from qdit_jax.errors import UserError
from qdit_jax.evaluation.store import (
    forget_unbegun,
    locked,
    missing_shards,
    open_run,
    shard_ranges,
    write_shard,
)
from qdit_jax.files import AnyPath, PathLike, as_path
from qdit_jax.kernels import implementations_used
from qdit_jax.models import rows_per_sample
from qdit_jax.report import to_uint8
from qdit_jax.sampling import (
    PUBLISHED,
    check_seed,
    conditions_in_turn,
    decode,
    default_batch_size,
    denoiser,
    device_mesh,
    filled_batch,
    initial_noise,
)

NUM_PROBED = 16  # samples whose single network calls are compared as well


@dataclasses.dataclass(frozen=True)
class Contender:
    """A checkpoint that takes part, under a title for people."""

    title: str
    checkpoint: Checkpoint


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How every contender is sampled: all that a sample depends on besides the network.

    `record` says in JSON which sampler it is; `batch_size` None takes the device's default;
    `conditions` are labels or prompts that the samples take in turn, every class by default.
    """

    sampler: diffusion.Sampler
    record: dict[str, Any]
    num_samples: int
    seed: int = 0
    guidance: float = 1.5
    guidance_channels: int | str | None = PUBLISHED
    numerics: str = "simulated"
    batch_size: int | None = None
    conditions: Any = None


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its folder, the samples of each shard in it, and its settings."""

    folder: AnyPath
    ranges: list[tuple[int, int]]
    settings: dict[str, Any]


def run_evaluation(
    contenders: Sequence[Contender],
    protocol: Protocol,
    folder: PathLike,
    progress_fn: Callable[[int], Any] | None = None,
) -> Run:
    """Samples what `folder` lacks and returns the finished run.

    `progress_fn` is called with the number of samples that are done, first with those found.

    Raises:
        UserError: if the contenders cannot be paired, the folder holds another run, or a sample
            is not finite.
    """
    if protocol.num_samples < 2:
        raise UserError(f"{protocol.num_samples} samples are too few; use at least 2.")
    if protocol.batch_size is not None and protocol.batch_size < 1:
        raise UserError(f"batch_size={protocol.batch_size} must be at least 1.")
    check_seed(protocol.seed)
    check_pairable(contenders)
    folder = as_path(folder)
    with locked(folder), unless_unbegun(folder):
        default = {"batch_size": default_batch_size()}
        settings = open_run(folder, settings_of(contenders, protocol), default)
        ranges = shard_ranges(protocol.num_samples, settings["batch_size"])
        missing = missing_shards(folder, ranges)
        report = progress_fn or (lambda count: None)
        report(protocol.num_samples - sum(stop - start for start, stop in missing))
        for start, arrays in shards(contenders, protocol, missing, settings["batch_size"]):
            write_shard(folder, start, arrays)
            report(int(arrays["stop"]) - start)
    return Run(folder, ranges, settings)


@contextmanager
def unless_unbegun(folder: AnyPath) -> Iterator[None]:
    """Leaves no folder behind where what is done inside fails before anything is computed."""
    try:
        yield
    except BaseException:
        forget_unbegun(folder)
        raise


def check_pairable(contenders: Sequence[Contender]) -> None:
    """Raises `UserError` if the contenders do not take the same noise, labels and schedule."""
    first = contenders[0]
    for other in contenders[1:]:
        facts = (inputs_of(c.checkpoint.model) for c in (first, other))
        for name, (a, b) in zip(INPUTS, zip(*facts, strict=True), strict=True):
            if a != b:
                raise UserError(
                    f"{first.title} has {name} {a} and {other.title} has {name} {b}; only models "
                    "of the same inputs can be compared."
                )
        a, b = (c.checkpoint.metadata.get("scheduler") for c in (first, other))
        if a != b:
            raise UserError(
                f"{first.title} and {other.title} were trained on different schedules; their "
                "samples cannot be paired."
            )


INPUTS = ("sample shape", "prediction", "condition", "conditions in all", "null condition")


def inputs_of(model: Any) -> tuple[Any, ...]:
    """Returns what two networks must agree in to be given the same inputs, see `INPUTS`."""
    every = model.all_conditions()
    return (
        model.sample_shape(),
        model.prediction,
        str(model.example_condition(1)),
        None if every is None else jax.tree.leaves(every)[0].shape[0],
        model.has_null,
    )


def settings_of(contenders: Sequence[Contender], protocol: Protocol) -> dict[str, Any]:
    """Returns what decides every value of the run, in JSON's types."""
    channels = protocol.guidance_channels
    return {
        "models": [content_of(c.checkpoint) for c in contenders],
        "sampler_content": digest(protocol.sampler),
        "conditions": None if protocol.conditions is None else digest(protocol.conditions),
        **protocol.record,
        "num_samples": protocol.num_samples,
        "seed": protocol.seed,
        "guidance": protocol.guidance,
        "guidance_channels": "all" if channels is None else channels,
        "numerics": protocol.numerics,
        "batch_size": protocol.batch_size,
    }


def content_of(checkpoint: Checkpoint) -> str:
    """Returns a digest of a network and all parameters, the autoencoder's included."""
    vae = checkpoint.vae
    return digest((checkpoint.model, checkpoint.params, vae and (vae.model, vae.params)))


def shards(
    contenders: Sequence[Contender],
    protocol: Protocol,
    missing: Sequence[tuple[int, int]],
    batch_size: int,
) -> Iterable[tuple[int, dict[str, Any]]]:
    """Yields the first sample and the arrays of every shard that is missing."""
    if not missing:
        return
    mesh = device_mesh()
    padded = -(-batch_size // mesh.size) * mesh.size
    batch_samplers = [batch_sampler(c.checkpoint, protocol, mesh) for c in contenders]
    device = jax.local_devices()[0]
    place = f"{mesh.size} x {device.platform} ({device.device_kind})"
    used = {
        f"{i}/implementations": json.dumps(used_by(c.checkpoint, protocol.numerics, padded))
        for i, c in enumerate(contenders)
    }
    for start, stop in missing:
        index = filled_batch(start, padded, protocol.num_samples)
        condition = conditions_in_turn(contenders[0].checkpoint.model, protocol.conditions, index)
        arrays: dict[str, Any] = {"stop": stop, "device": place, **used}
        trajectories = []
        for i, (contender, sample_batch) in enumerate(zip(contenders, batch_samplers, strict=True)):
            found = sample_batch(index.astype(np.int32), condition).head(stop - start)
            check_finite(found, contender.title, start)
            arrays |= {f"{i}/{name}": value for name, value in found.stored().items()}
            trajectories.append(found)
        for i, other in enumerate(trajectories[1:], 1):
            arrays |= {
                f"{i}/{name}": v for name, v in pair_measures(trajectories[0], other).items()
            }
            if start < NUM_PROBED:
                probed = probe(
                    batch_samplers[0],
                    batch_samplers[i],
                    trajectories[0],
                    first_of(condition, stop - start),
                )
                arrays[f"{i}/output_db"] = probed
        yield start, arrays


def used_by(checkpoint: Checkpoint, numerics: str, batch_size: int) -> dict[str, int]:
    """Returns how many quantized layers each implementation computes, by its name."""
    rows = {path: n * batch_size for path, n in rows_per_sample(checkpoint.model).items()}
    return implementations_used(checkpoint.params, numerics, rows=rows)


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A batch's trajectory in one network, on the host, and how long it took.

    `x [S, B, H, W, C]` is what the network was given at each of the `timestep [S]`, `final` what
    the last step gave, `images` that decoded, or None where nothing decodes latents.
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
        """Returns what a shard keeps of it."""
        samples = (
            {"latents": self.final} if self.images is None else {"images": to_uint8(self.images)}
        )
        times = {"seconds": self.seconds, "compile_seconds": self.compile_seconds}
        return {**samples, **times, "timestep": self.timestep}


class BatchSampler:
    """Samples batches with one network: compiled once, timed without compilation."""

    def __init__(self, denoise_fn: Any, vae: Checkpoint | None, protocol: Protocol, split: Any):
        self.denoise_fn = denoise_fn
        self.vae = vae
        self.protocol = protocol
        self.split = split
        self.compiled: Any = None

    def __call__(self, index: np.ndarray, condition: Any) -> Trajectory:
        """Returns the trajectories of the samples numbered `index`."""
        model = network(self.denoise_fn).model
        numbers, condition = jax.device_put((index, condition), self.split)
        key = jax.random.key(self.protocol.seed)
        given = (self.denoise_fn, self.protocol.sampler, key, numbers, condition)
        compile_seconds, began = 0.0, time.perf_counter()
        if self.compiled is None:
            self.compiled = compiled_trajectory.lower(*given, shape=model.sample_shape()).compile()
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


@jax.jit(static_argnames=("shape",))
def compiled_trajectory(denoise_fn, sampler, key, index, condition, shape):
    """Returns timesteps `[S]`, inputs `[S, B, H, W, C]` and final latents `[B, H, W, C]`."""
    noise, keys = initial_noise(key, index, shape)
    final, (timestep, x) = diffusion.sample_trajectory(
        denoise_fn, sampler, noise, condition, keys, collect_fn=timestep_and_input
    )
    return timestep, x, final


def timestep_and_input(step: diffusion.Step) -> tuple[Any, Any]:
    return step.timestep, step.x


def network(denoise_fn: Any) -> Any:
    """Returns the `Denoiser` inside a guided or plain `denoise_fn`."""
    return getattr(denoise_fn, "denoise_fn", denoise_fn)


def batch_sampler(checkpoint: Checkpoint, protocol: Protocol, mesh: Any) -> BatchSampler:
    """Returns the sampler of a checkpoint with its parameters on every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    model = checkpoint.model.clone(numerics=protocol.numerics)
    guidance, channels = protocol.guidance, protocol.guidance_channels
    denoise_fn = denoiser(model, checkpoint.params, guidance, channels)
    vae = checkpoint.vae
    if vae is not None:
        vae = dataclasses.replace(vae, params=jax.device_put(vae.params, whole))
    split = NamedSharding(mesh, PartitionSpec("batch"))
    return BatchSampler(jax.device_put(denoise_fn, whole), vae, protocol, split)


def check_finite(trajectory: Trajectory, title: str, start: int) -> None:
    """Raises `UserError` if a sample has a value that is no finite number."""
    for values in (trajectory.final, trajectory.images):
        if values is None:
            continue
        bad = np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
        if bad.size:
            raise UserError(
                f"{title}: sample {start + bad[0]} is not finite; this model cannot be scored "
                "with these settings."
            )


def pair_measures(reference: Trajectory, other: Trajectory) -> dict[str, np.ndarray]:
    """Returns the paired measures of each sample: arrays `[B]`, and `drift_db [B, S]`.

    Images are compared as they are seen, clipped to [-1, 1]; latents as they are.
    """
    found = {
        "latent_snr_db": metrics.signal_to_noise_db(reference.final, other.final),
        "latent_cosine": metrics.cosine(reference.final, other.final),
    }
    if reference.images is not None and other.images is not None:
        a, b = np.clip(reference.images, -1, 1), np.clip(other.images, -1, 1)
        found["image_snr_db"] = metrics.signal_to_noise_db(a, b)
        found["image_psnr_db"] = metrics.psnr(a, b)
        found["image_cosine"] = metrics.cosine(a, b)
        if min(a.shape[1:3]) >= 11:  # the window of SSIM
            found["image_ssim"] = metrics.ssim(a, b)
    after = [
        metrics.signal_to_noise_db(x, y)
        for x, y in zip(
            [*reference.x[1:], reference.final], [*other.x[1:], other.final], strict=True
        )
    ]
    return {**found, "drift_db": np.stack(after, axis=1)}


def first_of(tree: Any, count: int) -> Any:
    """Returns the first `count` entries of every array."""
    return jax.tree.map(lambda leaf: leaf[:count], tree)


def probe(
    reference: BatchSampler, other: BatchSampler, trajectory: Trajectory, condition: Any
) -> np.ndarray:
    """Returns `[B, S]`: how close two networks' outputs are for the same input, in dB (signal to error).

    The inputs are those of the reference's trajectory, so that no earlier error is in it; the
    channels of a learned variance are left out.
    """
    # One device: the few samples may not divide evenly among all.
    device = jax.local_devices()[0]
    fns = [jax.device_put(w.denoise_fn, device) for w in (reference, other)]
    given = jax.device_put((trajectory.x, trajectory.timestep, condition), device)
    signal, noise = (np.asarray(power) for power in output_powers(*fns, *given))
    return metrics.decibels(signal, noise).T


@jax.jit
def output_powers(reference_fn, other_fn, x, timestep, condition):
    """Returns the powers `[S, B]` of the reference's outputs and of the difference to it."""

    def step(scanned):
        x, timestep = scanned
        at, axes = jnp.full(len(x), timestep, jnp.float32), tuple(range(1, x.ndim))
        a, b = (fn(x, at, condition)[..., : x.shape[-1]] for fn in (reference_fn, other_fn))
        return jnp.square(a).sum(axes), jnp.square(a - b).sum(axes)

    return jax.lax.map(step, (x, timestep))
