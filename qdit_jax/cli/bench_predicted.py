"""`qdit bench --dry-run`: what counting says of a checkpoint, or of a published network without its file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from qdit_jax.checkpoint import Checkpoint, open_checkpoint
from qdit_jax.cli.bench_run import recipes_of
from qdit_jax.cli.bench_table import aligned, megabytes
from qdit_jax.cli.guidance_option import guidance_of
from qdit_jax.models import published_named
from qdit_jax.sampling import calls_per_step, check_diffusion_model, fitting_guidance
from qdit_jax.speed import (
    BATCHES,
    DEVICES,
    HERE,
    Device,
    Predicted,
    abstract_checkpoint,
    devices_named,
    predicted,
)


def dry_run(options: Mapping[str, Any]) -> dict[str, Any]:
    """Prints what counting says of each network, and returns it."""
    checkpoint, calls, text = source_of(options)
    names = options["device"] or list(DEVICES)
    devices = devices_named(names)
    found = predicted(
        checkpoint,
        recipes_of(options, checkpoint),
        options["batch"] or BATCHES,
        calls,
        devices=devices,
        dtype="float32" if names == [HERE] else "bfloat16",
    )
    print(text, *predicted_lines(found, devices), sep="\n")
    return {
        "predicted": [dataclasses.asdict(row) for row in found],
        "devices": [dataclasses.asdict(device) for device in devices],
    }


def source_of(options: Mapping[str, Any]) -> tuple[Checkpoint, int, str]:
    """Returns the checkpoint, the calls of its network per sample, and what it is in words."""
    guidance = options["guidance"]
    if options["model"] is not None:
        row = published_named(options["model"])
        checkpoint = abstract_checkpoint(row.build())
        calls = (
            row.calls
            if guidance is None
            else calls_per_step(checkpoint.model, guidance_of(checkpoint, guidance))
        )
        what = f"{row.title}, samples of {row.samples}"
    else:
        checkpoint = open_checkpoint(options["checkpoint"])  # which reads no array
        check_diffusion_model(checkpoint.model, options["checkpoint"])
        given = guidance_of(checkpoint, guidance)
        calls = calls_per_step(checkpoint.model, fitting_guidance(checkpoint.model, given))
        what = str(options["checkpoint"])
    shape = " x ".join(map(str, checkpoint.model.sample_shape()))
    return checkpoint, calls, f"{what}: latents {shape}, {calls} call{'s' * (calls > 1)} per sample"


def predicted_lines(rows: Sequence[Predicted], devices: Sequence[Device]) -> list[str]:
    """Returns a table of what counting says, with ratios to the first network."""
    times = [f"ms {device.name}" for device in devices]
    header = ("batch", "network", "MB weights", "x", "MB beside", "G multiply-adds", *times)
    lines = [header]
    for row in rows:
        first = next(other for other in rows if other.batch == row.batch)
        lines.append(
            (
                str(row.batch),
                row.title,
                megabytes(row.weight_bytes),
                f"{row.weight_bytes / first.weight_bytes:.3f}",
                megabytes(max(row.live_bytes.values())),
                f"{row.multiply_adds / 1e9:.4g}",
                *(time_text(row, device) for device in devices),
            )
        )
    titles = "; ".join(
        f"{device.name}: {device.title}, float32 in {device.wide}" for device in devices
    )
    return [
        *aligned(lines),
        "predicted from shapes; nothing was run. Times are those of operations and bytes at the device's "
        "full rates, one layer after another, in integer numerics: programs take two to three times as long.",
        "(too large): weights and what a step needs beside them are more than the device's memory.",
        titles,
    ]


def time_text(row: Predicted, device: Device) -> str:
    """Returns the milliseconds on a device, and whether its memory holds the network."""
    fits = row.weight_bytes + row.live_bytes[device.name] <= device.memory
    return f"{row.milliseconds[device.name]:.4g}" + " (too large)" * (not fits)
