"""A run in a folder whose shards several processes compute, or one.

The first process locks the folder, chooses the settings, and joins the shards when all are there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from qdit_jax.errors import UserError
from qdit_jax.evaluation.store import (
    differences,
    forget_unbegun,
    locked,
    missing_shards,
    open_names,
    shard_path,
    shard_ranges,
)
from qdit_jax.files import AnyPath
from qdit_jax.processes import SEEN_WITHIN, Processes, check_shared, comes_true

Ranges = list[tuple[int, int]]
Settings = Mapping[str, Any]


@contextmanager
def held(folder: AnyPath, processes: Processes) -> Iterator[None]:
    """Locks `folder` once for all processes: the first one has the lock.

    Raises:
        UserError: if another run has it, or `folder` is a file or holds other things.
    """
    if not processes.is_first:
        processes.meet("the folder is locked")
        yield
        return
    with locked(folder):
        processes.meet("the folder is locked")
        yield


@contextmanager
def unless_unbegun(folder: AnyPath) -> Iterator[None]:
    """Removes the folder if the context fails before anything was computed."""
    try:
        yield
    except BaseException:
        forget_unbegun(folder)
        raise


def unless_unbegun_alone(
    folder: AnyPath, processes: Processes
) -> contextlib.AbstractContextManager[None]:
    """Returns `unless_unbegun`; of several processes nothing, as another may be writing a shard."""
    return contextlib.nullcontext() if processes.are_several else unless_unbegun(folder)


def begun(
    folder: AnyPath,
    settings: Settings,
    default: Settings,
    processes: Processes,
    open_fn: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Returns the settings of the run in `folder`, the same in all processes, see `open_run`.

    `open_fn` calls that, in the first process.

    Raises:
        UserError: as `open_run`; if a process does not see `folder`, or has other settings.
    """
    if not processes.are_several:
        return open_fn()
    if not processes.is_first:
        stored = json.loads(processes.told("settings", ""))
        check_shared(folder, processes)
        own = json.loads(json.dumps(settings))
        if differing := differences(own, stored, open_names(settings, default)):
            raise UserError(
                f"process {processes.index} was started with other settings than process 0 "
                f"({'; '.join(differing[:4])}); use the same command for all."
            )
        processes.meet("all have the same settings")
        return stored
    with unless_unbegun(folder):
        stored = open_fn()
        processes.told("settings", json.dumps(stored))
        check_shared(folder, processes)
        processes.meet("all have the same settings")
    return stored


def shares(
    folder: AnyPath, num_samples: int, batch_size: int, processes: Processes
) -> tuple[Ranges, Ranges, int]:
    """Returns the range of every shard, those that this process computes, and the samples that are done.

    Every missing shard is one process's; none is begun before all have looked.
    """
    ranges = shard_ranges(num_samples, batch_size)
    missing = missing_shards(folder, ranges)
    done = num_samples - sum(stop - start for start, stop in missing)
    processes.meet("it is known which shards are missing")
    return ranges, list(processes.mine(missing)), done


def meet_at_the_shards(
    folder: AnyPath, ranges: Sequence[tuple[int, int]], processes: Processes
) -> None:
    """Returns when every process has written its shards, and the first one sees them.

    Raises:
        UserError: if it does not see all.
        LostWorkerError: if a process is gone.
    """
    if not processes.are_several:
        return
    processes.meet("all shards are written")
    if not processes.is_first:
        return
    if comes_true(lambda: not missing_shards(folder, ranges), SEEN_WITHIN):
        return
    start, _ = missing_shards(folder, ranges)[0]
    raise UserError(
        f"{shard_path(folder, start)} was written by another process, but process 0 does not see it; "
        "start all processes again with the same command."
    )
