"""Finished batches of a calibration, a file each, which several processes compute and one joins."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qdit_jax.calibration.collect import read_unfinished
from qdit_jax.checkpoint import first_difference
from qdit_jax.errors import UserError
from qdit_jax.files import AnyPath, write_arrays
from qdit_jax.processes import SEEN_WITHIN, Processes, check_shared, comes_true
from qdit_jax.types import Progress, ProgressFn

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Parts:
    """The batches of a calibration: those in `folder`, and those that are still to be computed.

    Attributes:
        folder: where finished batches are kept; None to keep none.
        settings: that identify the calibration.
        compute_fn: `start -> arrays` of the batch of that first sample.
        processes: that share the batches; several need a folder, which all of them see.
        progress_fn: told of the samples of every batch that this process has computed.
    """

    folder: AnyPath | None
    settings: dict[str, Any]
    compute_fn: Callable[[int], Arrays]
    processes: Processes
    progress_fn: ProgressFn

    def joined(self, starts: Sequence[int], num_samples: int) -> Iterator[tuple[int, Arrays]]:
        """Yields the first sample of each batch and its arrays, in the order of `starts`.

        Batches are told of when the caller asks for the next one, and has kept what it got.

        Raises:
            UserError: if the folder holds the batches of another calibration, or another process
                was started with other settings or does not see the folder.
            LostWorkerError: if another process is gone.
        """
        sizes = dict(zip(starts, sizes_of(starts, num_samples), strict=True))
        if self.processes.are_several:
            self.share(starts, sizes)
        for start in starts:
            if self.folder is not None and self.path(start).exists():
                arrays = read_unfinished(self.path(start), self.settings)
            else:
                arrays = self.compute_fn(start)
            yield start, {k: v for k, v in arrays.items() if k != "settings"}
            if not self.processes.are_several:  # who told of their own batches already
                self.progress_fn(Progress(sizes[start]))

    def share(self, starts: Sequence[int], sizes: dict[int, int]) -> None:
        """Computes this process's share of the batches that are missing; returns when all are there."""
        if self.folder is None:
            raise ValueError("several processes need unfinished, a path that all of them see.")
        self.check_same()
        check_shared(self.folder, self.processes)
        missing = [start for start in starts if not self.path(start).exists()]
        done = sum(sizes[start] for start in starts if start not in set(missing))
        self.processes.meet("it is known which batches are missing")
        mine = list(self.processes.mine(missing))
        self.progress_fn(Progress(done, total=done + sum(sizes[start] for start in mine)))
        for start in mine:
            arrays = self.compute_fn(start)
            self.processes.check()
            self.write(start, arrays)
            self.progress_fn(Progress(sizes[start]))
        self.processes.meet("all batches are written")
        for start in starts:
            if not comes_true(self.path(start).exists, SEEN_WITHIN):
                raise UserError(
                    f"{self.path(start)} was written by another process, but process "
                    f"{self.processes.index} does not see it; start all processes again with the same "
                    "command."
                )

    def check_same(self) -> None:
        """Raises `UserError` if this process was started with other settings than the first one."""
        first = json.loads(self.processes.told("settings", json.dumps(self.settings)))
        if (other := first_difference(first, self.settings)) is not None:
            raise UserError(
                f"process {self.processes.index} was started with other settings than process 0 (its "
                f"{other} is not the same); use the same command for all."
            )

    def keep(self, start: int, arrays: Arrays) -> None:
        """Writes a finished batch to the folder, if there is one and it lacks it."""
        if self.folder is not None and not self.path(start).exists():
            self.write(start, arrays)

    def path(self, start: int) -> AnyPath:
        """Returns the file of the batch of that first sample."""
        assert self.folder is not None
        return self.folder / f"{start:08d}.npz"

    def write(self, start: int, arrays: Arrays) -> None:
        """Writes a finished batch; a reader never sees half of it."""
        settings = json.dumps(self.settings, sort_keys=True)
        write_arrays(self.path(start), {**arrays, "settings": settings})


def sizes_of(starts: Sequence[int], num_samples: int) -> list[int]:
    """Returns how many samples there are from each start to the next."""
    ends = [*starts[1:], num_samples]
    return [end - start for start, end in zip(starts, ends, strict=True)]
