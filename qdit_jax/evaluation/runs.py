"""Sampling several models from the same noise, labels and steps, and measuring them in pairs.

The first contender is the reference of the others. Every batch is a shard on disk
(see `store`), so that a killed run resumes without repeating or losing a sample.
Dimensions: N samples, B samples of a batch, S steps, H, W, C an image or latent.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np

from qdit_jax.checkpoint import Checkpoint, digest, dtype_of
from qdit_jax.errors import UserError
from qdit_jax.evaluation.measures import first_of, pair_measures, probe
from qdit_jax.evaluation.shared_run import (
    begun,
    held,
    meet_at_the_shards,
    shares,
    unless_unbegun_alone,
)
from qdit_jax.evaluation.store import open_run, write_shard
from qdit_jax.evaluation.trajectories import (
    NUM_PROBED,
    BatchSampler,
    Contender,
    Protocol,
    batch_sampler,
    check_finite,
)
from qdit_jax.files import AnyPath, PathLike, as_path
from qdit_jax.kernels import implementations_used
from qdit_jax.models import Network
from qdit_jax.processes import ALONE, Processes
from qdit_jax.sampling import (
    batch_parts,
    check_seed,
    check_takes,
    default_batch_size,
    denoiser,
    device_mesh,
    filled_batch,
    guidance_record,
    on_one_device,
    partition_mesh,
    sample_attention,
    sample_rows,
)
from qdit_jax.types import Progress, ProgressFn, untold


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
    progress_fn: ProgressFn = untold,
    processes: Processes = ALONE,
) -> Run:
    """Samples what `folder` lacks and returns the finished run.

    `progress_fn` is told the number of samples just done, first of those on disk. Each of several
    `processes` computes every so-many-th missing shard on its own devices.

    Raises:
        UserError: if the contenders cannot be paired, the folder holds another run, or a sample
            is not finite.
        LostWorkerError: if another process is gone; finished shards are kept.
    """
    if protocol.num_samples < 2:
        raise UserError(f"{protocol.num_samples} samples are too few; use at least 2.")
    if protocol.batch_size is not None and protocol.batch_size < 1:
        raise UserError(f"batch_size={protocol.batch_size} must be at least 1.")
    check_seed(protocol.seed)
    check_pairable(contenders)
    protocol = protocol.resolved(contenders[0].checkpoint.model)
    check_inputs(contenders, protocol)
    folder = as_path(folder)
    with held(folder, processes), unless_unbegun_alone(folder, processes):
        default = {"batch_size": default_batch_size()}
        given = settings_of(contenders, protocol)
        open_fn = partial(open_run, folder, given, default)
        settings = begun(folder, given, default, processes, open_fn)
        size = settings["batch_size"]
        ranges, mine, done = shares(folder, protocol.num_samples, size, processes)
        progress_fn(Progress(done, total=done + sum(stop - start for start, stop in mine)))
        for start, arrays in shards(contenders, protocol, mine, size):
            processes.check()
            write_shard(folder, start, arrays)
            progress_fn(Progress(int(arrays["stop"]) - start))
        meet_at_the_shards(folder, ranges, processes)
        return Run(folder, ranges, settings)


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


def check_inputs(contenders: Sequence[Contender], protocol: Protocol) -> None:
    """Raises `ValueError` if a network cannot take the conditions, or samples of that shape."""
    for contender in contenders:
        model, params = contender.checkpoint.model, contender.checkpoint.params
        denoise_fn = denoiser(model, params, protocol.guidance, protocol.guidance_channels)
        check_takes(denoise_fn, model, protocol.shape, protocol.conditions)


INPUTS = ("sample shape", "prediction", "condition", "conditions in all", "null condition")


def inputs_of(model: Network) -> tuple[object, ...]:
    """Returns what two networks must have in common to take the same inputs, see `INPUTS`."""
    every = model.all_conditions()
    return (
        model.sample_shape(),
        model.prediction,
        str(model.example_condition(1)),
        None if every is None else jax.tree.leaves(every)[0].shape[0],
        model.has_null,
    )


def settings_of(contenders: Sequence[Contender], protocol: Protocol) -> dict[str, Any]:
    """Returns the settings that determine every value of the run, in JSON's types."""
    channels = protocol.guidance_channels
    dtypes = [dtype_of(contender.checkpoint) for contender in contenders]
    return {
        **({} if set(dtypes) == {"float32"} else {"dtypes": dtypes}),
        "models": [content_of(c.checkpoint) for c in contenders],
        "sampler_content": digest(protocol.sampler),
        "conditions": None if protocol.conditions is None else digest(protocol.conditions),
        **({} if protocol.shape is None else {"shape": list(protocol.shape)}),
        **({} if protocol.num_probed == NUM_PROBED else {"num_probed": protocol.num_probed}),
        **protocol.record,
        "num_samples": protocol.num_samples,
        "seed": protocol.seed,
        "guidance": guidance_record(protocol.guidance),
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
    batch_samplers = [batch_sampler(c.checkpoint, protocol, mesh) for c in contenders]
    check_same_devices(batch_samplers)
    parts = math.lcm(*(batch_parts(one.mesh) for one in batch_samplers))
    padded = -(-batch_size // parts) * parts
    device = jax.local_devices()[0]
    place = f"{mesh.size} x {device.platform} ({device.device_kind})"
    used = {}
    for i, c in enumerate(contenders):
        used[f"{i}/implementations"] = json.dumps(used_by(c.checkpoint, protocol, padded))
        model, params = c.checkpoint.model, c.checkpoint.params
        attention = sample_attention(model, params, protocol.shape, protocol.conditions)
        used[f"{i}/attention"] = json.dumps(attention)
    for start, stop in missing:
        index = filled_batch(start, padded, protocol.num_samples)
        condition = protocol.condition_of(contenders[0].checkpoint.model, index)
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
            if start < protocol.num_probed:
                probed = probe(
                    batch_samplers[0],
                    batch_samplers[i],
                    trajectories[0],
                    first_of(condition, stop - start),
                )
                arrays[f"{i}/output_db"] = probed
        yield start, arrays


def used_by(checkpoint: Checkpoint, protocol: Protocol, batch_size: int) -> dict[str, int]:
    """Returns how many quantized layers each implementation computes, by its name."""
    found = sample_rows(checkpoint.model, protocol.shape, protocol.conditions)
    rows = {path: n * batch_size for path, n in found.items()}
    is_whole, dtype = partition_mesh(checkpoint.params) is None, dtype_of(checkpoint)
    with on_one_device() if is_whole else nullcontext():  # as each of them computes
        return implementations_used(checkpoint.params, protocol.numerics, dtype=dtype, rows=rows)


def check_same_devices(batch_samplers: Sequence[BatchSampler]) -> None:
    """Raises `ValueError` if the parameters of two networks are split over different devices."""
    meshes = [one.mesh for one in batch_samplers if one.is_partitioned]
    if any(set(mesh.devices.flat) != set(meshes[0].devices.flat) for mesh in meshes):
        raise ValueError(
            "the parameters of two checkpoints are split over different devices, where their outputs cannot "
            "be compared; split them over the same ones."
        )
