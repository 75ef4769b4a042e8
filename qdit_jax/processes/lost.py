"""The error of a process whose others are gone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

REMEDY = (
    "what was computed so far is kept: start all processes again with the same command; there may be "
    "more or fewer of them."
)


class LostWorkerError(ConnectionError):
    """Another process of a shared computation is gone; what it had finished is on disk."""


@contextlib.contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Raises `LostWorkerError` for what JAX raises in one of several processes."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise LostWorkerError(
            f"process {jax.process_index()} of {jax.process_count()} lost another one "
            f"({reason}); {REMEDY}"
        ) from error
