"""The dtype that a checkpoint's network computes in: how it runs, not what it is."""

from __future__ import annotations

import dataclasses

import jax

from qdit_jax.checkpoint.description import Checkpoint
from qdit_jax.models import check_dtype


def default_dtype() -> str:
    """Returns the dtype that suits JAX's default backend: bfloat16 on accelerators, else float32."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def with_dtype(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    """Returns the checkpoint with a network that computes in `dtype`; None leaves it as it is.

    Raises:
        ValueError: if the dtype is not one of `models.DTYPES`, or the network has no choice.
    """
    if dtype is None:
        return checkpoint
    check_dtype(dtype)
    if hasattr(checkpoint.model, "dtype"):
        return dataclasses.replace(checkpoint, model=checkpoint.model.clone(dtype=dtype))
    if dtype != "float32":
        kind = type(checkpoint.model).__name__
        raise ValueError(f"dtype={dtype!r}: a {kind} computes in float32 only; use that.")
    return checkpoint


def dtype_of(checkpoint: Checkpoint) -> str:
    """Returns the dtype that the checkpoint's network computes in."""
    return getattr(checkpoint.model, "dtype", "float32")
