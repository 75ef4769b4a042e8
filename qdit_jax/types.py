"""Names for what every room passes on: arrays, keys, parameters and conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

# An array on the device, traced or not, or on the host.
AnyArray: TypeAlias = jax.Array | np.ndarray
# A number or what converts to an array of them.
Numbers: TypeAlias = AnyArray | np.generic | float | Sequence[Any]
# A key of `jax.random`, typed or raw.
Key: TypeAlias = jax.Array
# Nested dicts by name; leaves are arrays, `QTensor`s, or other rows of `quant.LEAVES`.
Params: TypeAlias = Mapping[str, Any]
# A pytree of arrays with the batch as first axis: a label `[B]`, or a dict by the contract's names.
Condition: TypeAlias = (
    AnyArray | jax.ShapeDtypeStruct | int | Mapping[str, Any] | Sequence[Any] | None
)
