"""Kernels with what every product would compute of them, computed once: the form in which a loop runs.

Dimensions: N output channels, G groups along K, B scales of a group.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt8

from qdit_jax.quant.groups import effective_group_size, map_groups
from qdit_jax.quant.qtensor import QTensor
from qdit_jax.quant.rows import integer_codes
from qdit_jax.quant.stored_scales import scale_value


class Ready(NamedTuple):
    """What products compute of codes and zero points.

    Attributes:
        zero_point: unpacked; None of symmetric codes.
        sums: of the codes of a group less their zero point, which inputs with zero points need; or None.
    """

    zero_point: UInt8[Array, "G B"] | None
    sums: Int32[Array, "G N"] | None


def members_of(q: QTensor) -> Int32[np.ndarray, " G"]:
    """Returns how many input channels each group has."""
    size = effective_group_size(q.shape[0], q.group_size)
    return np.minimum(size, q.shape[0] - size * np.arange(q.num_groups)).astype(np.int32)


@partial(jax.jit, static_argnames="with_sums")
def readied(q: QTensor, *, with_sums: bool) -> QTensor:
    """Returns a kernel with one level of scales: these in float32, and `Ready`. Sums are of integers.

    Every product gives the same, to the bit. A zero point is per output channel where there are sums.
    """
    zero_point = q.zero_point
    sums = None
    if with_sums:
        codes = integer_codes(q).astype(jnp.int32)
        sums = map_groups(lambda members: members.sum(axis=1), codes, q.group_size)
        zero = 2 ** (q.bits - 1) if zero_point is None else zero_point.astype(jnp.int32)
        sums = sums - zero * members_of(q)[:, None]
    return dataclasses.replace(q, scale=scale_value(q.scale), ready=Ready(zero_point, sums))
