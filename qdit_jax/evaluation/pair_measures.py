"""What `verify` measures on a pair of networks: samples, layers, one call, time and bytes.

Dimensions: N samples, B samples of a batch, S steps, I items, R rows of an item.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from qdit_jax import metrics
from qdit_jax.evaluation.layer_facts import LayerFacts, nbytes_of, own_path
from qdit_jax.evaluation.layer_powers import (
    Folded,
    Items,
    applied,
    call_powers,
    folded,
    items_of,
    linears_alone,
    operand_quantizers,
    table_powers,
)
from qdit_jax.evaluation.limits import Layer
from qdit_jax.evaluation.measures import first_of
from qdit_jax.evaluation.trajectories import (
    Contender,
    Protocol,
    Trajectory,
    batch_sampler,
    check_finite,
)
from qdit_jax.models import without_null
from qdit_jax.quant import kernel_of_other, other_kernel, with_weight_bits
from qdit_jax.sampling import Denoiser, device_mesh, filled_batch, on_one_device
from qdit_jax.types import Condition, Params, Progress, ProgressFn

NUM_TIMESTEPS, NUM_SAMPLES = 4, 4  # of the single calls in which layers are measured
NUM_TIMINGS = 5
FULL_PRECISION_DB = 40.0  # what a layer in full precision in both must reach


def paired_samples(
    pair: Sequence[Contender], protocol: Protocol, progress_fn: ProgressFn
) -> tuple[Trajectory, Condition, Float[np.ndarray, " N"]]:
    """Returns the reference's first batch with its conditions, and decibels of all final latents.

    Those of a sample that is not finite in the checkpoint are NaN.

    Raises:
        UserError: if a sample of the reference is not finite.
    """
    reference, other = (c.checkpoint for c in pair)
    mesh, size = device_mesh(), protocol.batch_size or 1
    samplers = [batch_sampler(checkpoint, protocol, mesh) for checkpoint in (reference, other)]
    kept: tuple[Trajectory, Condition] | None = None
    found = []
    for start in range(0, protocol.num_samples, size):
        count = min(size, protocol.num_samples - start)
        index = filled_batch(start, size, protocol.num_samples)
        condition = protocol.condition_of(reference.model, index)
        exact, ours = (draw(index.astype(np.int32), condition).head(count) for draw in samplers)
        check_finite(exact, pair[0].title, start)
        found.append(decibels_of_finite(exact.final, ours.final))
        kept = kept or (exact, first_of(condition, count))
        progress_fn(Progress(count))
    assert kept is not None  # there are 2 samples or more
    return *kept, np.concatenate(found)


def decibels_of_finite(reference: np.ndarray, other: np.ndarray) -> Float[np.ndarray, " B"]:
    """Returns the decibels of each sample, NaN for one that is not finite."""
    bad = ~np.isfinite(other).all(axis=tuple(range(1, other.ndim)))
    other = np.where(bad.reshape(-1, *(1,) * (other.ndim - 1)), 0, other)
    return np.where(bad, np.nan, metrics.signal_to_noise_db(reference, other))


def measured(
    denoise_fns: Sequence[Denoiser],
    facts: Sequence[LayerFacts],
    trajectory: Trajectory,
    condition: Condition,
) -> tuple[dict[str, Any], list[Layer], list[str]]:
    """Returns decibels of single calls' outputs, every layer with its decibels, and notes.

    Args:
        denoise_fns: the reference's and the checkpoint's, on one device.
        trajectory: of the reference; the calls take its inputs.
    """
    reference, other = denoise_fns
    model, where = reference.model, folded(other.params, reference.params)
    items = items_of(trajectory, condition, model, reference.params, NUM_TIMESTEPS, NUM_SAMPLES)
    alone = linears_alone(other.params, reference.params, model)
    operands = operand_quantizers(other.params, facts)
    given = jax.device_put((alone, operands, where.comparable, items), jax.local_devices()[0])
    with on_one_device():
        outputs, powers = jax.device_get(call_powers(reference, other, *given))
    sums = {path: np.asarray(both, np.float64).sum(0) for path, both in powers.items()}
    for bits in sorted({own[1] for layer in facts if (own := kernel_of_other(layer.path))}):
        changed = linears_alone(with_weight_bits(other.params, bits), reference.params, model)
        with on_one_device():
            found = jax.device_get(call_powers(reference, other, changed, *given[1:]))[1]
        for path, both in found.items():
            sums[f"{path}/{other_kernel(bits)}"] = np.asarray(both, np.float64).sum(0)
    sums |= table_powers(other.params, reference.params, facts)
    rows = [with_decibels(layer, sums, where) for layer in facts]
    left = {layer.path for layer in facts} | set(where.sources)
    others = {p: both for p, both in sums.items() if p not in left and kernel_of_other(p) is None}
    return output_decibels(outputs, items), rows, differing(others)


def with_decibels(layer: LayerFacts, sums: Mapping[str, np.ndarray], where: Folded) -> Layer:
    """Returns a layer with its decibels, and a note on what they leave out or count in."""
    path = own_path(layer.path)
    both, columns = sums.get(layer.path), where.columns.get(path, [])
    if both is None or (columns and both[0] == 0):
        reason = "folded, compared at the end" if columns else "not run alone, compared at the end"
        if layer.kind == "operand":
            reason = "not quantized"
        return Layer(**vars(layer), note=reason)
    notes = [f"without folded columns: {', '.join(columns)}"] if columns else []
    if path != layer.path:
        notes.append("at other timesteps")
    if sources := where.sources.get(path):
        notes.append(f"with the folded columns of {', '.join(sources)}")
    db = decibels_of(both)
    return Layer(**vars(layer), db=db, note="; ".join(notes) or None)


def decibels_of(both: Float[np.ndarray, " 2"]) -> float:
    """Returns the decibels of a power and that of its error."""
    return float(metrics.decibels(both[:1], both[1:])[0])


def differing(sums: Mapping[str, np.ndarray]) -> list[str]:
    """Returns a note on layers that are in full precision in both networks and yet differ."""
    found = {path: decibels_of(both) for path, both in sums.items() if both[0] > 0}
    bad = {path: db for path, db in found.items() if not db >= FULL_PRECISION_DB}
    if not bad:
        return []
    worst = min(bad, key=lambda path: bad[path])
    return [
        f"{len(bad)} layers in full precision differ from the reference's, {worst} the most "
        f"({bad[worst]:.1f} dB): was the checkpoint made from this reference?"
    ]


def output_decibels(outputs: Float[np.ndarray, "I 2 R"], items: Items) -> dict[str, Any]:
    """Returns the mean decibels of single calls, over all and by timestep, conditions and null."""
    db = metrics.decibels(
        np.asarray(outputs[:, 0], np.float64), np.asarray(outputs[:, 1], np.float64)
    )
    timestep = np.asarray(items.timestep)[:, 0]
    found: dict[str, Any] = {"mean": float(db.mean()), "num_calls": db.size, "timestep": []}
    names = ("conditional", "null")[: db.shape[1]]
    found |= {name: [] for name in names}
    for t in dict.fromkeys(timestep.tolist()):
        found["timestep"].append(t)
        for name, column in zip(names, db.T, strict=True):
            found[name].append(float(column[timestep == t].mean()))
    return found


def interval(final: Float[np.ndarray, " N"]) -> dict[str, Any]:
    """Returns the mean with its 95 % interval over samples; NaN if one is not finite."""
    if not np.isfinite(final).all():
        return {"estimate": math.nan, "low": math.nan, "high": math.nan}
    return dataclasses.asdict(metrics.bootstrap_interval(final))


def sizes(full: Params, ours: Params, facts: Sequence[LayerFacts]) -> dict[str, Any]:
    """Returns bytes of all parameters, their ratio, and bits per weight of the layers listed."""
    before, after = nbytes_of([full]), nbytes_of([ours])
    weights = sum(layer.num_weights for layer in facts)
    layer_bits = 8 * sum(layer.bytes_after for layer in facts)
    values = sum(leaf.size for leaf in jax.tree.leaves(full))
    return {
        "before": before,
        "after": after,
        "ratio": after / before,
        "bits_per_weight": layer_bits / weights if weights else None,
        "bits_per_parameter": 8 * after / values,
    }


def timed(
    denoise_fns: Sequence[Denoiser], trajectory: Trajectory, condition: Condition
) -> dict[str, Any]:
    """Returns the median milliseconds of one call of both networks without guidance, here and now.

    Compilation does not count, and the two take turns.
    """
    x, device = trajectory.x[0], jax.local_devices()[0]
    timestep = np.full(len(x), trajectory.timestep[0], np.float32)
    given = jax.device_put(Items(x, timestep, without_null(condition)), device)
    with on_one_device():
        compiled = [one_call.lower(fn, given).compile() for fn in denoise_fns]
    seconds: list[list[float]] = [[], []]
    for repeat in range(NUM_TIMINGS + 1):
        for fn, call, taken in zip(denoise_fns, compiled, seconds, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(call(fn, given))
            if repeat:  # the first warms up
                taken.append(time.perf_counter() - began)
    before, after = (1000 * statistics.median(taken) for taken in seconds)
    return {
        "before": before,
        "after": after,
        "ratio": after / before,
        "batch_size": len(x),
        "num_timings": NUM_TIMINGS,
        "device": f"1 x {device.platform} ({device.device_kind})",
    }


@jax.jit
def one_call(denoise_fn: Denoiser, given: Items) -> jax.Array:
    """Returns the output of one call."""
    return applied(denoise_fn, denoise_fn.params, given)
