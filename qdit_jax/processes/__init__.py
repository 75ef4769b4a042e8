"""Several processes that share one computation: who does what, how they meet, and who is lost."""

from qdit_jax.processes.folders import SEEN_WITHIN, check_shared, shared_folder
from qdit_jax.processes.joining import join, leave
from qdit_jax.processes.lost import LostWorkerError, naming_lost_workers
from qdit_jax.processes.sharing import ALONE, Notes, Processes, comes_true
from qdit_jax.processes.watch import Watch

__all__ = [
    "ALONE",
    "SEEN_WITHIN",
    "LostWorkerError",
    "Notes",
    "Processes",
    "Watch",
    "check_shared",
    "comes_true",
    "join",
    "leave",
    "naming_lost_workers",
    "shared_folder",
]
