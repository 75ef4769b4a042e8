"""What a process knows of those it shares a computation with, and how they agree.

All of them run the same code in the same order. They meet, and tell each other small texts, by notes
that all can read; arrays lie in files that all can read.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar, runtime_checkable

Item = TypeVar("Item")

PAUSE = 0.1  # seconds between two looks at the notes


@runtime_checkable
class Notes(Protocol):
    """Texts by name that every process reads and writes."""

    def write(self, name: str, text: str) -> None:
        """Writes a text under a name that no other process uses."""

    def read(self, name: str) -> dict[str, str]:
        """Returns the texts whose names begin with `name/`, by the rest of their names."""

    def check(self) -> None:
        """Raises `LostWorkerError` if another process is gone."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes that share one computation, and which of them this is.

    Attributes:
        index: the number of this process; the first one, 0, writes what is written once.
        count: how many there are.
        notes: by which they agree; None of one process alone.
    """

    index: int = 0
    count: int = 1
    notes: Notes | None = None
    # How often they have met or agreed: no name is used twice.
    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.index == 0

    @property
    def are_several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def mine(self, items: Sequence[Item]) -> Sequence[Item]:
        """Returns this process's share of the items: every `count`-th."""
        return items[self.index :: self.count]

    def check(self) -> None:
        """Raises `LostWorkerError` if another process is gone."""
        if self.notes is not None:
            self.notes.check()

    def meet(self, name: str) -> None:
        """Returns when all processes have come here; `name` tells the place from others.

        Raises:
            LostWorkerError: if one is gone.
        """
        self.said(name, "")

    def told(self, name: str, text: str) -> str:
        """Returns the `text` of the first process; what the others give is ignored.

        Raises:
            LostWorkerError: if one is gone.
        """
        return self.said(name, text)[0]

    def said(self, name: str, text: str) -> list[str]:
        """Returns what each process has said here, in their order, once all have.

        Raises:
            LostWorkerError: if one is gone.
        """
        if self.notes is None:
            return [text]
        place = f"{next(self.numbers)} {name}"
        self.notes.write(f"{place}/{self.index}", text)
        while len(found := self.notes.read(place)) < self.count:
            self.notes.check()
            time.sleep(PAUSE)
        return [found[str(index)] for index in range(self.count)]


ALONE = Processes()


def comes_true(is_so: Callable[[], bool], seconds: float | int) -> bool:
    """Returns whether something becomes so within that time."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(PAUSE)
    return True
