"""Checkpoints for verbs: loaded and checked, with an error of one sentence."""

from __future__ import annotations

from qdit_jax.checkpoint import Checkpoint, default_dtype, load, with_dtype
from qdit_jax.errors import UserError
from qdit_jax.files import PathLike
from qdit_jax.sampling import check_diffusion_model


def diffusion_checkpoint(path: PathLike, dtype: str | None = None) -> Checkpoint:
    """Returns the checkpoint at `path`, to compute in `dtype`: that of the platform if None.

    Raises:
        ValueError: if it is not a diffusion model.
    """
    checkpoint = load(path)
    check_diffusion_model(checkpoint.model, path)
    return with_dtype(checkpoint, dtype or default_dtype())


def full_precision_checkpoint(path: PathLike, why: str, dtype: str | None = None) -> Checkpoint:
    """Returns the diffusion model at `path`, which must not be quantized; `why` ends the sentence.

    Raises:
        UserError: if it is quantized.
    """
    checkpoint = diffusion_checkpoint(path, dtype)
    if checkpoint.recipe is not None:
        raise UserError(
            f"{path} is quantized already ({checkpoint.recipe.name}); {why}: give the "
            f"full-precision checkpoint{source_of(checkpoint)}."
        )
    return checkpoint


def source_of(checkpoint: Checkpoint) -> str:
    """Returns what a checkpoint was quantized from, in words, if it says so."""
    source = checkpoint.metadata.get("quantized_from")
    return f" (it was quantized from {source})" if source else ""
