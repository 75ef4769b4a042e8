"""Two processes in one, as threads with notes in a dict: what they share is tested without starting any."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from qdit_jax.processes import LostWorkerError, Processes


class DictNotes:
    """Notes that threads share; `lost` is what `check` says."""

    def __init__(self):
        self.texts, self.lost, self.lock = {}, None, threading.Lock()

    def write(self, name, text):
        with self.lock:
            self.texts[name] = text
        self.written(name)

    def written(self, name):
        """Called with every name."""

    def read(self, name):
        with self.lock:
            below = [key for key in self.texts if key.startswith(f"{name}/")]
            return {key.rpartition("/")[2]: self.texts[key] for key in below}

    def check(self):
        if self.lost is not None:
            raise LostWorkerError(self.lost)


def in_both(call, notes=None, count=2):
    """Returns what `call(processes)` returned or raised in each process."""
    notes = DictNotes() if notes is None else notes

    def run(index):
        try:
            return call(Processes(index, count, notes))
        except Exception as error:
            notes.lost = notes.lost or f"process {index} of {count} ended: {error}"
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
