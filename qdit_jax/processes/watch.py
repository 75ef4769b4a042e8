"""A watch over the other processes: each gives signs of life, and is lost when they cease."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from qdit_jax.processes.lost import REMEDY, LostWorkerError
from qdit_jax.processes.sharing import comes_true

LOST_AFTER = 30  # seconds without a sign of life
PERIOD = 2  # seconds between two signs
GRACE = 8  # seconds for the main thread to end by itself
ALIVE, ENDED = "qdit/alive", "qdit/ended"


class Watch:
    """Notes in JAX's coordination service, and a thread that watches the other processes there.

    Where one is lost, or has ended with an error, `check` raises; a process that does not check
    within `GRACE` seconds, as it computes or waits for the others' devices, is ended by `end_fn`.

    Args:
        client: of the coordination service, which lives in process 0.
        index, count: which process this is, of how many.
        end_fn: called with the sentence; ends the process.
    """

    def __init__(self, client: Any, index: int, count: int, end_fn: Callable[[str], None]) -> None:
        self.client, self.index, self.count, self.end_fn = client, index, count, end_fn
        self.lost: str | None = None
        self.gone: set[int] = set()
        self.has_left = self.has_ended = False
        self.is_over = threading.Event()
        began = time.monotonic()
        self.signs = {number: ("", began) for number in range(count) if number != index}
        self.sign(0)
        threading.Thread(target=self.run, daemon=True, name="watch").start()

    def write(self, name: str, text: str) -> None:
        """Writes a text under a name, see `Notes`."""
        self.set(f"qdit/notes/{name}", text)

    def read(self, name: str) -> dict[str, str]:
        """Returns the texts below a name, see `Notes`."""
        return self.below(f"qdit/notes/{name}")

    def check(self) -> None:
        """Raises `LostWorkerError` if another process is gone, once it is known."""
        if self.lost is not None:
            self.is_over.set()  # this thread ends the process now
            raise LostWorkerError(self.lost)

    def set(self, name: str, text: str) -> None:
        """Writes to the coordination service.

        Raises:
            LostWorkerError: if it is gone, and process 0 with it.
        """
        try:
            self.client.key_value_set(name, text, allow_overwrite=True)
        except Exception as error:  # JAX raises many kinds
            raise LostWorkerError(
                f"{self.named(0)} is gone ({first_line(error)}); {REMEDY}"
            ) from error

    def below(self, name: str) -> dict[str, str]:
        """Returns what the coordination service holds below a name; raises as `set`."""
        try:
            found = self.client.key_value_dir_get(name)
        except Exception as error:
            raise LostWorkerError(
                f"{self.named(0)} is gone ({first_line(error)}); {REMEDY}"
            ) from error
        return {key.rpartition("/")[2]: text for key, text in found}

    def sign(self, number: int) -> None:
        """Gives a sign of life."""
        self.set(f"{ALIVE}/{self.index}", str(number))

    def run(self) -> None:
        """Gives signs of life and looks for those of the others, until one is lost or all is over."""
        number = 0
        while self.lost is None:
            if self.is_over.wait(PERIOD):
                return
            number += 1
            try:
                self.sign(number)
                self.lost = self.found_lost()
            except LostWorkerError as error:
                self.lost = str(error)
        if not self.is_over.wait(GRACE):
            self.end_fn(self.lost)

    def found_lost(self) -> str | None:
        """Returns the sentence about a process that is gone, None if all are there."""
        for other, text in self.below(ENDED).items():
            if int(other) != self.index:
                return f"{self.named(int(other))} ended: {text}"
        alive, now = self.below(ALIVE), time.monotonic()
        for number, (sign, since) in self.signs.items():
            if (new := alive.get(str(number), "")) != sign:
                self.signs[number] = (new, now)
            elif now - since > LOST_AFTER:
                self.gone.add(number)
                return (
                    f"{self.named(number)} has given no sign of life for {LOST_AFTER} seconds: it was "
                    f"killed, or its host is lost; {REMEDY}"
                )
        return None

    def aborted(self) -> None:
        """Ends a process that JAX aborts: by the sentence, or quietly if all was done before."""
        if self.has_left:
            os._exit(0)
        if self.index == 0:
            return  # the service is here: JAX has another reason
        if self.has_ended:
            time.sleep(GRACE)  # the main thread says why
            os._exit(2)
        self.end_fn(
            f"JAX has ended this process with the message above, as it does when {self.named(0)} is gone; "
            f"{REMEDY}"
        )

    def leave(self) -> None:
        """Ceases to watch, as all is done."""
        self.has_left = True
        self.is_over.set()

    def named(self, number: int) -> str:
        """Returns what a process is called."""
        return f"process {number} of {self.count}"

    def end(self, text: str) -> None:
        """Tells the others that this process ends with an error, and lets them read it."""
        self.has_ended = True
        self.is_over.set()
        try:
            self.set(f"{ENDED}/{self.index}", text)
            if self.index == 0:  # which holds the notes
                others = self.count - len(self.gone)
                comes_true(lambda: len(self.below(ENDED)) >= others, GRACE + 2 * PERIOD)
        except LostWorkerError:
            pass


def first_line(error: Exception) -> str:
    """Returns the first line of an error, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
