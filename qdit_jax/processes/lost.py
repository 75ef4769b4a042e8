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
    """Raises `LostWorkerError` for what JAX raises in one of several processes, wrapped by others or not."""
    try:
        yield
    except Exception as error:
        cause = of_jax(error)
        if cause is None or jax.process_count() == 1:
            raise
        reason = str(cause).strip().splitlines()[0][:200]
        raise LostWorkerError(
            f"process {jax.process_index()} of {jax.process_count()} lost another one "
            f"({reason}); {REMEDY}"
        ) from error


def of_jax(error: BaseException | None) -> BaseException | None:
    """Returns the first error of JAX's runtime among an error and its causes, if there is one."""
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__ or error.__context__
    return error
