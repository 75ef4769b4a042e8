"""How much of a device's memory may be spent to save time, where nobody says."""

from __future__ import annotations

from typing import Any

import jax

from qdit_jax.types import Params

MOST_BYTES = 2**30
FREE_PART = 4  # of what is free, one in so many bytes


def spare_bytes(params: Params) -> int:
    """Returns the bytes that results computed before the loop may take; 0 on CPU, where they save no time.

    They are a part of what an accelerator has free, less the parameters, of which a second form is held beside
    the first; 0 where the device does not say what it has.
    """
    device: Any = jax.local_devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return 0
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return max(0, min(MOST_BYTES, free // FREE_PART - held))
