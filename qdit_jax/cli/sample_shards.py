"""Samples on their way to a file: finished batches in a folder beside it, so that a run goes on.

The folder is that of an evaluation (`evaluation.store`): settings, and one archive a batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qdit_jax import evaluation, report, sampling
from qdit_jax.errors import UserError
from qdit_jax.files import AnyPath, check_space, is_remote, remove_folder

REMEDY = "use the same to go on, another --out, or --force to begin again"


@contextmanager
def unfinished_folder(out: AnyPath) -> Iterator[AnyPath]:
    """Yields the folder of batches beside `out`, held for this process; it is gone on success.

    It is gone as well where nothing was finished, or a sample is not what it should be.
    """
    target = out if is_remote(out) else Path(os.path.realpath(out))
    folder = target.with_name(f".{target.name}.unfinished")
    with evaluation.locked(folder), evaluation.unless_unbegun(folder):
        try:
            yield folder
        except NotFiniteError:
            remove_folder(folder)
            raise
    remove_folder(folder)


class NotFiniteError(UserError):
    """A network gave values that are no finite numbers; the same run would give them again."""


def make_shards(
    folder: AnyPath,
    batches_fn: Callable[[list[int], int], Iterator[tuple[int, np.ndarray]]],
    settings: dict[str, Any],
    progress_fn: Callable[[int], Any],
    *,
    latents: bool,
    force: bool,
) -> list[tuple[int, int]]:
    """Makes the batches that `folder` lacks and returns the samples of each.

    Args:
        batches_fn: from the first samples of batches, and their size, to the batches.
        progress_fn: called with the number of samples made.
        latents: keep values as they are; images are kept as uint8.
        force: begin again where the folder holds a run with other settings.

    Raises:
        UserError: if it does and `force` is off, or a sample is not finite.
    """
    count = settings["num_samples"]
    default = {"batch_size": sampling.checked_batch_size(count, None)}
    try:
        settings = evaluation.open_run(folder, settings, default, REMEDY)
    except UserError:
        if not force:
            raise
        remove_folder(folder, keep="lock")
        settings = evaluation.open_run(folder, settings, default, REMEDY)
    size = settings["batch_size"]
    ranges = evaluation.shard_ranges(count, size)
    missing = evaluation.missing_shards(folder, ranges)
    done = count - sum(stop - start for start, stop in missing)
    if done:
        print(f"going on from {done:,} of {count:,} samples", flush=True)
        progress_fn(done)
    for start, images in batches_fn([start for start, _ in missing], size):
        check_finite(images, start, count)
        kept = {"latents": images} if latents else {"images": report.to_uint8(images)}
        evaluation.write_shard(folder, start, kept)
        progress_fn(len(images))
    return ranges


def check_finite(images: np.ndarray, start: int, count: int) -> None:
    """Raises `NotFiniteError` if a sample is not a finite number everywhere."""
    bad = int((~np.isfinite(images).all(axis=tuple(range(1, images.ndim)))).sum())
    if bad:
        which = (
            f"samples {start} to {start + len(images) - 1}" if len(images) < count else "samples"
        )
        raise NotFiniteError(f"{bad} of {len(images)} {which} are not finite; nothing was written.")


def check_room(out: AnyPath, shape: tuple[int, ...], count: int, itemsize: int) -> None:
    """Raises `UserError` if the disk cannot hold the samples twice: in batches, and in the end."""
    check_space(out, 2 * count * int(np.prod(shape)) * itemsize)
