"""Weights with a byte per code, so that a product has none to unpack: twice the memory of 4 bits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qdit_jax.quant.levels import HALF
from qdit_jax.quant.qtensor import QTensor, packed_zeros, with_codes
from qdit_jax.quant.rows import integer_codes, level_rows
from qdit_jax.types import Tree


def expanded_params(params: Tree) -> Tree:
    """Returns `params` with every kernel as `expanded` has it; other leaves stay."""

    def one(leaf: object) -> object:
        return expanded(leaf) if isinstance(leaf, QTensor) else leaf

    found: Tree = jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    return found


def expanded(q: QTensor) -> QTensor:
    """Returns a kernel of the same weights in codes of 8 bits; number formats stay as they are.

    Integer codes keep their groups and scales. Two levels of scales become one: the int8 levels, which
    are what a product multiplies, with the scales of the output channels. Every product gives the
    same, to the bit.
    """
    if not is_packed(q):
        return q
    return _expanded_levels(q) if q.has_levels else _expanded_codes(q)


def is_packed(q: QTensor) -> bool:
    """Returns whether a product has to unpack integers: codes of fewer than 8 bits, or levels."""
    return q.has_levels or (q.fmt is None and q.bits < 8)


@jax.jit
def _expanded_levels(q: QTensor) -> QTensor:
    levels = jnp.swapaxes(level_rows(q), -1, -2).astype(jnp.int32)
    scale = jnp.asarray(q.channel_scale)[..., None, :]
    grid = QTensor(None, scale, bits=8, group_size=0, shape=q.shape)
    return with_codes(grid, levels + HALF)


@jax.jit
def _expanded_codes(q: QTensor) -> QTensor:
    moved = HALF - 2 ** (q.bits - 1)  # signed codes, and the distance from a zero point, stay
    zero_point = q.zero_point
    packed = None
    if zero_point is not None:
        packed = packed_zeros(zero_point.astype(jnp.int32) + moved, 8)
    grid = dataclasses.replace(q, bits=8, packed_zero_point=packed)
    return with_codes(grid, integer_codes(q).astype(jnp.int32) + moved)
