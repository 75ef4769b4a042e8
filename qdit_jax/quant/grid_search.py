"""The clipping-ratio search behind the MSE range rules, vectorized and in bounded memory.

Dimensions: P ratios tried, r leading axes, S members of a group, N groups along the last axis,
B groups of a block, which are searched at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qdit_jax.quant import powers

# Groups searched at once: half a dozen arrays [P, BLOCK] stay in the cache of one core.
BLOCK = 1536
_UNROLL = 4  # members whose errors are added in one pass over the scores


@runtime_checkable
class Rule(Protocol):
    """What the search asks of a range rule: the ratios to try, the norm, and a grid's scale."""

    @property
    def num_points(self) -> int: ...

    @property
    def max_shrink(self) -> float: ...

    @property
    def norm(self) -> float: ...

    def scale(
        self, low: Float[Array, "*s"], high: Float[Array, "*s"], bits: int, symmetric: bool
    ) -> Float[Array, "*s"]:
        """Returns the step of the codes on `[low, high]`."""


def best_ratio(
    x: Float[Array, "*r S N"],
    low: Float[Array, "*r N"],
    high: Float[Array, "*r N"],
    rule: Rule,
    *,
    bits: int,
    symmetric: bool,
) -> Float[Array, "*r N"]:
    """Returns the ratio r whose grid on `[r * low, r * high]` has the least error for each group.

    `rule` names the grid (`num_points`, `max_shrink`), the `norm` and the `scale` rule. Of equal
    scores the first (widest) wins. Memory beyond `x`: a few times `num_points * BLOCK` floats.
    """
    if x.shape[-1] < BLOCK // 8:  # few groups along the last axis: leading axes are joined to it
        rows = jnp.moveaxis(x, -2, 0).reshape(1, x.shape[-2], -1)  # [1, S, r N]
        limits = (low.reshape(1, -1), high.reshape(1, -1))  # [1, r N]
    else:
        rows = x.reshape(-1, *x.shape[-2:])  # [r, S, N]
        limits = (low.reshape(-1, x.shape[-1]), high.reshape(-1, x.shape[-1]))  # [r, N]
    num_rows, size, width = rows.shape
    num_blocks = -(-width // BLOCK)
    block = -(-width // num_blocks)  # blocks of one length, of at most BLOCK groups
    ratios = jnp.asarray(grid_of(rule), jnp.float32)[:, None]  # [P, 1]

    def search(where: tuple[Array, Array]) -> Float[Array, " B"]:
        row, start = where
        members = jax.lax.dynamic_slice(rows, (row, 0, start), (1, size, block))[0]  # [S, B]
        widest = [jax.lax.dynamic_slice(end, (row, start), (1, block)) for end in limits]  # [1, B]
        tried = [end * ratios for end in widest]  # [P, B]
        score = _score(members.astype(jnp.float32), tried[0], tried[1], rule, bits, symmetric)
        return ratios[jnp.argmin(score, axis=0), 0]

    # The last block starts early enough to be whole: it searches some groups a second time.
    starts = np.minimum(np.arange(num_blocks) * block, width - block)
    places = np.repeat(np.arange(num_rows), num_blocks), np.tile(starts, num_rows)
    found = jax.lax.map(search, places).reshape(num_rows, num_blocks, block)
    new = width - (num_blocks - 1) * block  # groups of the last block that no other has
    parts = found[:, :-1].reshape(num_rows, -1), found[:, -1, block - new :]
    return jnp.concatenate(parts, axis=1).reshape(low.shape)


def grid_of(rule: Rule) -> np.ndarray:
    """Returns the ratios that a rule tries, widest first, in float64."""
    return 1 - np.arange(rule.num_points) * (rule.max_shrink / rule.num_points)


def _score(
    x: Float[Array, "S B"],
    low: Float[Array, "P B"],
    high: Float[Array, "P B"],
    rule: Rule,
    bits: int,
    symmetric: bool,
) -> Float[Array, "P B"]:
    """Returns sum |error|**norm; errors are measured in steps and scaled at the end."""
    scale = rule.scale(low, high, bits, symmetric)
    # Codes less the code of 0.0, so that `code * scale` is the value.
    if symmetric:
        first = jnp.full_like(scale, -(2.0 ** (bits - 1)))
        last = jnp.full_like(scale, 2.0 ** (bits - 1) - 1)
    else:
        first = -jnp.clip(jnp.round(-low / scale), 0, 2**bits - 1)
        last = first + (2**bits - 1)
    per_unit = 1 / scale
    general = partial(powers.power, exponent=rule.norm)
    limit = greatest_error(rule, bits)
    fit = None if rule.norm in (1, 2) else powers.root_polynomial(rule.norm, limit)

    def sums(power_fn: Callable[[Array], Array]) -> Float[Array, "P B"]:
        return _sum_of_powers(x, per_unit, first, last, power_fn)

    if fit is None:
        score = sums(general)
    else:
        # Errors exceed `limit` only in groups outside their grid, which rules without 0 allow.
        beyond = jnp.maximum(first - jnp.min(x, 0) * per_unit, jnp.max(x, 0) * per_unit - last)
        near = jnp.max(beyond) <= limit
        score = jax.lax.cond(
            near, lambda: sums(partial(powers.by_root, fit)), lambda: sums(general)
        )
    return score * (scale * unit_of(scale[0])) ** rule.norm


def unit_of(scale: Float[Array, " B"]) -> Float[Array, " B"]:
    """Returns powers of two that bring extreme scales near 1, whose powers would leave float32.

    1 for all other scales: a factor would round their scores differently.
    """
    exponent = jax.lax.bitcast_convert_type(scale, jnp.int32) >> 23  # float32's, 127 for 1.0
    unit = jax.lax.bitcast_convert_type(jnp.clip(254 - exponent, 1, 254) << 23, jnp.float32)
    return jnp.where(jnp.abs(exponent - 127) > 30, unit, 1.0)


def _sum_of_powers(
    x: Float[Array, "S B"],
    per_unit: Float[Array, "P B"],
    first: Float[Array, "P B"],
    last: Float[Array, "P B"],
    power_fn: Callable[[Array], Array],
) -> Float[Array, "P B"]:
    """Returns the sum over members of `power_fn(|error|)`, errors in steps."""

    def add(score: Float[Array, "P B"], row: Float[Array, " B"]) -> Float[Array, "P B"]:
        steps = row * per_unit
        code = jnp.round(steps)
        code = jnp.where(code < first, first, code)  # cheaper than a clip, which handles NaN
        code = jnp.where(code > last, last, code)
        return score + power_fn(jnp.abs(steps - code))

    def add_rows(i: Int[Array, ""] | int, score: Float[Array, "P B"]) -> Float[Array, "P B"]:
        for j in range(_UNROLL):
            score = add(score, x[i * _UNROLL + j])
        return score

    whole = x.shape[0] // _UNROLL
    score = jax.lax.fori_loop(0, whole, add_rows, jnp.zeros_like(per_unit))
    for row in range(whole * _UNROLL, x.shape[0]):
        score = add(score, x[row])
    return score


def greatest_error(rule: Rule, bits: int) -> float:
    """Returns the greatest error in steps of a value in a group whose interval contains 0."""
    return 1 + 2**bits * (1 / grid_of(rule)[-1] - 1)
