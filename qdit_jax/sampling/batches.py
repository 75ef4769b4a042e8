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


def filled_batch(start: int, size: int, count: int) -> Int[np.ndarray, " B"]:
    """Returns the `size` numbers from `start` on; those beyond `count - 1` are `count - 1`.

    The last batch thus has the shape of all others, and nothing is compiled for it.
    """
    return np.minimum(np.arange(start, start + size), count - 1)


def default_batch_size() -> int:
    """Returns the number of samples in a batch over all local devices, if none is given."""
    each = CPU_BATCH if jax.default_backend() == "cpu" else ACCELERATOR_BATCH
    return each * jax.local_device_count()


def checked_batch_size(num_samples: int, batch_size: int | None) -> int:
    """Returns the number of samples in a batch, rounded up to a multiple of the local devices.

    That is `batch_size`, or the devices' default, and not more than `num_samples`.

    Raises:
        ValueError: if `batch_size` is not positive.
    """
    if batch_size is not None:
        check_counts(batch_size=batch_size)
    num_devices = jax.local_device_count()
    wanted = min(batch_size or default_batch_size(), num_samples)
    return -(-wanted // num_devices) * num_devices
