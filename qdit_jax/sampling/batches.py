"""Batches of one size over a machine's devices.

Dimensions: B batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxtyping import Int

from qdit_jax.errors import check_counts

CPU_BATCH, ACCELERATOR_BATCH = 4, 16  # samples per device


def device_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of one axis, `batch`, over the devices; those of this process by default."""
    devices = jax.local_devices() if devices is None else list(devices)
    return Mesh(np.array(devices), ("batch",), axis_types=(AxisType.Auto,))


def token_mesh(shard_tokens: int) -> Mesh:
    """Returns a mesh of the axes `batch` and `tokens`, `shard_tokens` devices of this process long."""
    parts = num_parts(shard_tokens)
    devices = np.array(jax.local_devices()).reshape(parts, shard_tokens)
    return Mesh(devices, ("batch", "tokens"), axis_types=(AxisType.Auto,) * 2)


def num_parts(shard_tokens: int = 1) -> int:
    """Returns in how many parts a batch is split, if so many local devices share a sample's tokens.

    Raises:
        ValueError: if `shard_tokens` does not divide the number of devices.
    """
    check_counts(shard_tokens=shard_tokens)
    count = jax.local_device_count()
    if count % shard_tokens:
        raise ValueError(
            f"shard_tokens={shard_tokens} does not divide the {count} device{'s' * (count > 1)} of this "
            "process; use a number that does."
        )
    return count // shard_tokens


def filled_batch(start: int, size: int, count: int) -> Int[np.ndarray, " B"]:
    """Returns the `size` numbers from `start` on; those beyond `count - 1` are `count - 1`.

    The last batch thus has the shape of all others, and nothing is compiled for it.
    """
    return np.minimum(np.arange(start, start + size), count - 1)


def default_batch_size(shard_tokens: int = 1) -> int:
    """Returns the number of samples in a batch over all local devices, if none is given.

    Devices that share samples count as one.
    """
    each = CPU_BATCH if jax.default_backend() == "cpu" else ACCELERATOR_BATCH
    return each * num_parts(shard_tokens)


def checked_batch_size(
    num_samples: int, batch_size: int | None, shard_tokens: int = 1, parts: int | None = None
) -> int:
    """Returns the number of samples in a batch, rounded up to a multiple of the local devices.

    That is `batch_size`, or the devices' default, and not more than `num_samples`. Of devices that share
    samples it is a multiple of their groups, or of `parts`.

    Raises:
        ValueError: if `batch_size` is not positive.
    """
    if batch_size is not None:
        check_counts(batch_size=batch_size)
    parts = num_parts(shard_tokens) if parts is None else parts
    wanted = min(batch_size or default_batch_size(shard_tokens), num_samples)
    return -(-wanted // parts) * parts
