"""Fewer steps from the same process: which timesteps to visit, and the schedule of these alone."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from qdit_jax.diffusion.schedules import Schedule


def spaced_timesteps(num_timesteps: int, spacing: int | str) -> Int[np.ndarray, " S"]:
    """Returns the timesteps to visit, ascending and distinct.

    `spacing` follows the published convention:
    - `50` or `"50"`: 50 timesteps from first to last, at a fractional stride that is rounded;
    - `"10,15,20"`: equal sections of the process with 10, 15 and 20 timesteps;
    - `"ddim25"`: 25 timesteps at one integer stride, from 0 (the DDIM paper's choice).
    A section with a single timestep has its first.

    Raises:
        ValueError: if the spacing cannot be read, or asks for more timesteps than there are.
    """
    text = str(spacing).strip()
    strided = text.startswith("ddim")
    counts = _counts(text.removeprefix("ddim"), spacing)
    if strided and len(counts) == 1:
        return _integer_stride(num_timesteps, counts[0], spacing)
    if strided:
        raise ValueError(f"spacing={spacing!r} cannot be read; 'ddim' takes one number of steps.")
    sizes = [
        num_timesteps // len(counts) + (i < num_timesteps % len(counts)) for i in range(len(counts))
    ]
    chosen, start = [], 0
    for size, count in zip(sizes, counts, strict=True):
        if count > size:
            raise ValueError(
                f"spacing={spacing!r} asks for {count} steps where the process has {size} "
                f"timesteps; use at most {size}."
            )
        chosen.append(start + _fractional_stride(size, count))
        start += size
    return np.concatenate(chosen)


def _counts(text: str, spacing: int | str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(
            f"spacing={spacing!r} cannot be read; use a positive number of steps such as 50, "
            "sections such as '10,15,20', or 'ddim25'."
        )
    return [int(part) for part in parts]


def _integer_stride(num_timesteps: int, count: int, spacing: int | str) -> np.ndarray:
    for stride in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, stride)) == count:
            return np.arange(0, num_timesteps, stride)
    raise ValueError(
        f"spacing={spacing!r}: no integer stride visits exactly {count} of {num_timesteps} "
        f"timesteps; use {count} without 'ddim' for a fractional stride."
    )


def _fractional_stride(size: int, count: int) -> np.ndarray:
    stride = 1.0 if count <= 1 else (size - 1) / (count - 1)
    # Summed step by step, not multiplied: a product rounds differently near one half.
    return np.round(np.cumsum([0.0] + [stride] * (count - 1))).astype(np.int64)


def respaced(schedule: Schedule, spacing: int | str) -> Schedule:
    """Returns the process that visits only some timesteps of `schedule`.

    Its `alphas_cumprod` equal the original's at the visited timesteps, and its `timestep_map`
    names them in the numbering that the model was trained with.

    Raises:
        ValueError: as `spaced_timesteps`.
    """
    chosen = spaced_timesteps(schedule.num_timesteps, spacing)
    kept = schedule.alphas_cumprod[chosen]
    betas = 1 - kept / np.append(1.0, kept[:-1])
    return Schedule(betas, schedule.timestep_map[chosen])
