"""Checkpoints on disk: a folder or a single file, read whole or array by array."""

from qdit_jax.checkpoint.by_suffix import load, save
from qdit_jax.checkpoint.codec import (
    abstract_arrays,
    abstract_params,
    encode_params,
    split_fields,
)
from qdit_jax.checkpoint.deferred import DeferredArray
from qdit_jax.checkpoint.description import Checkpoint, num_bytes
from qdit_jax.checkpoint.fingerprint import digest, fingerprint, first_difference
from qdit_jax.checkpoint.folder import read_description, split_over
from qdit_jax.checkpoint.lazy import materialized, open_checkpoint
from qdit_jax.checkpoint.running import default_dtype, dtype_of, with_dtype, with_expanded_weights
from qdit_jax.checkpoint.single_file import exported_parts, load_safetensors, save_safetensors

__all__ = [
    "Checkpoint",
    "DeferredArray",
    "abstract_arrays",
    "abstract_params",
    "default_dtype",
    "digest",
    "dtype_of",
    "encode_params",
    "exported_parts",
    "fingerprint",
    "first_difference",
    "load",
    "load_safetensors",
    "materialized",
    "num_bytes",
    "open_checkpoint",
    "read_description",
    "save",
    "save_safetensors",
    "split_fields",
    "split_over",
    "with_dtype",
    "with_expanded_weights",
]
