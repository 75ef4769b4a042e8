"""Fake quantization whose group size is an array: one compilation for every assignment.

Statistics are taken over blocks (of the greatest common divisor of the sizes to choose from) and
gathered into groups by a table that the traced choice indexes, so a search never recompiles.

Dimensions: K channels, N output channels, D blocks, M most blocks a group can have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qdit_jax.quant import act, branches, groups
from qdit_jax.quant.division import quotient
from qdit_jax.quant.qtensor import zero_point_of
from qdit_jax.quant.specs import ActSpec, WeightSpec
from qdit_jax.quant.stored_scales import scale_value, stored_scale
from qdit_jax.types import AnyArray, Numbers


def fake_quantize_traced(
    x: Float[AnyArray, "*lead K"], spec: ActSpec, choice: Numbers, group_sizes: tuple[int, ...]
) -> Float[Array, "*lead K"]:
    """Returns `fake_quantize(x, spec)` with group size `group_sizes[choice]`, `choice` traced.

    `spec.group_size` is not used. The result equals that of the static size, bit for bit.

    Raises:
        ValueError: if the range rule needs more than each block's extremes, or `spec` is static.
    """
    _check(spec)
    if spec.mode == "static":
        raise ValueError("a traced group size is for dynamic activations; use mode='dynamic'.")
    x, choice = jnp.asarray(x), jnp.asarray(choice)
    if not x.size:
        return x
    rounded = partial(_rounded, spec=spec, group_sizes=tuple(group_sizes))
    return jax.lax.platform_dependent(x, choice, cpu=partial(_apart, rounded), default=rounded)


def _apart(rounded: Callable[[Array, Array], Array], x: Array, choice: Int[Array, ""]) -> Array:
    """Returns `rounded(x, choice)` from a branch, so that its three passes read one copy of `x`."""
    return jax.lax.cond(branches.true_after(x), rounded, lambda x, choice: x, x, choice)


def _rounded(
    x: Float[Array, "*lead K"],
    choice: Int[Array, ""],
    *,
    spec: ActSpec,
    group_sizes: tuple[int, ...],
) -> Float[Array, "*lead K"]:
    shifted = x.astype(jnp.float32) + spec.shift
    block, table = group_table(x.shape[-1], group_sizes)
    low, high = _gather(*_block_extremes(shifted, block), table[choice])
    symmetric = spec.symmetric and not spec.unsigned
    low, high = spec.range_fn.limits_from_extremes(low, high, spec.bits, symmetric)
    scale, zero_point = act.grid_of_limits(low, high, spec)
    by_block = _with_group_size(spec, block)
    codes = act.codes_of(shifted, scale, zero_point, by_block)
    return act.values_of(codes, scale, zero_point, by_block).astype(x.dtype)


def fake_quantize_kernel_traced(
    w: Float[AnyArray, "K N"], spec: WeightSpec, choice: Numbers, group_sizes: tuple[int, ...]
) -> Float[Array, "K N"]:
    """Returns `dequantize(quantize(w, spec))` with group size `group_sizes[choice]`, traced.

    `spec.group_size` is not used; `spec.channel_group` must be 1. A group with NaN or infinity is
    NaN.

    Raises:
        ValueError: if the range rule needs more than each block's extremes.
    """
    _check(spec)
    if spec.channel_group != 1:
        raise ValueError(f"channel_group={spec.channel_group} has no traced form; use 1.")
    block, table = group_table(w.shape[0], group_sizes)
    columns = jnp.asarray(w, jnp.float32).T  # [N, K]
    low, high = _gather(*_block_extremes(columns, block), table[jnp.asarray(choice)])
    is_finite = jnp.isfinite(low) & jnp.isfinite(high)
    low, high = spec.range_fn.limits_from_extremes(low, high, spec.bits, spec.symmetric)
    scale = spec.range_fn.scale(low, high, spec.bits, spec.symmetric)
    scale = jnp.where(is_finite, scale, jnp.nan)
    scale = scale_value(stored_scale(scale, spec.scale_dtype))
    if spec.symmetric:
        offset = jnp.full_like(scale, 2 ** (spec.bits - 1))
    else:
        offset = zero_point_of(low, scale, spec.bits)
    scale, offset = (groups.expand_groups(a.T, w.shape, block) for a in (scale, offset))
    steps = jnp.round(quotient(columns.T, jax.lax.optimization_barrier(scale)))
    codes = jnp.clip(steps + offset, 0, 2**spec.bits - 1)
    return ((codes - offset) * scale).astype(w.dtype)


def group_table(
    num_channels: int, group_sizes: tuple[int, ...]
) -> tuple[int, Int[Array, "choices D M"]]:
    """Returns the block size and, int32 `[choices, D, M]`, the blocks of every block's group.

    A group of fewer than M blocks repeats its last one, which changes no extreme.
    """
    if not group_sizes or any(size < 0 for size in group_sizes):
        raise ValueError(f"group_sizes={group_sizes} must be sizes of 1 or more, or 0.")
    sizes = [groups.effective_group_size(num_channels, size) for size in group_sizes]
    inner = [size for size in sizes if size < num_channels]
    block = math.gcd(*inner) if inner else num_channels
    count = -(-num_channels // block)
    members = [-(-size // block) for size in sizes]
    table = np.zeros((len(sizes), count, max(members)), np.int32)
    for row, per_group in enumerate(members):
        first = np.arange(count) // per_group * per_group
        last = np.minimum(first + per_group, count) - 1
        table[row] = np.minimum(first[:, None] + np.arange(max(members)), last[:, None])
    return block, jnp.asarray(table)


def _check(spec: WeightSpec | ActSpec) -> None:
    levels = isinstance(spec, WeightSpec) and spec.has_levels
    if levels or spec.fmt is not None or not spec.range_fn.from_extremes:
        what = spec.range_fn.name if spec.fmt is None else spec.fmt.name
        what = "scale_levels=2" if levels and spec.fmt is None else what
        raise ValueError(
            f"{what!r} has no form with a traced group size; use a rule of least and greatest "
            "values, such as ranges.minmax, or a static size."
        )


def _with_group_size(spec: ActSpec, group_size: int) -> ActSpec:
    settings = {**spec.__dict__, "group_size": group_size}
    return ActSpec(**settings)


def _block_extremes(
    x: Float[Array, "*lead K"], block: int
) -> tuple[Float[Array, "*lead D"], Float[Array, "*lead D"]]:
    pad = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)]
    blocks = jnp.pad(x, pad, mode="edge").reshape(*x.shape[:-1], -1, block)
    return jnp.min(blocks, axis=-1), jnp.max(blocks, axis=-1)


def _gather(
    low: Float[Array, "*lead D"], high: Float[Array, "*lead D"], members: Int[Array, "E M"]
) -> tuple[Float[Array, "*lead E"], Float[Array, "*lead E"]]:
    return jnp.min(low[..., members], axis=-1), jnp.max(high[..., members], axis=-1)
