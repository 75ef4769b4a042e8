"""The autoencoder of a checkpoint that has none, such as one that was converted from a `.pt`."""

from __future__ import annotations

import dataclasses

from qdit_jax.checkpoint import Checkpoint, load
from qdit_jax.errors import UserError
from qdit_jax.files import PathLike


def with_autoencoder(checkpoint: Checkpoint, path: PathLike | None) -> Checkpoint:
    """Returns the checkpoint with the autoencoder at `path`, if one is given.

    Raises:
        UserError: if it is not an autoencoder, or its latents do not fit the model's, or none decodes them.
    """
    if path is None:
        return checkpoint
    reason = getattr(checkpoint.model, "latents_only", None)
    if reason is not None:
        raise UserError(f"--vae {path}: {reason}; leave it out, and give --out latents.npz.")
    vae = load(path)
    if not hasattr(vae.model, "decode"):
        raise UserError(
            f"--vae {path} is not an autoencoder but a {type(vae.model).__name__}; convert one "
            "with `qdit convert sd-vae-ft-mse/ vae`."
        )
    ours, taken = checkpoint.model.sample_shape()[-1], vae.model.latent_channels
    if ours != taken:
        raise UserError(
            f"--vae {path} decodes latents of {taken} channels and the model has {ours}; leave "
            "--vae out, or give the autoencoder that the model was trained with."
        )
    return dataclasses.replace(checkpoint, vae=vae)
