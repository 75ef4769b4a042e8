"""Quantizing the inputs of linear layers: dynamic, static, or static with scales per timestep.

Dimensions: K channels, G groups along K, S rows of a table of scales, B samples.
The equation is that of weights, per token: `x' = (code - zero_point) * scale - shift`, with
`code = clip(round((x + shift) / scale) + zero_point)`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from qdit_jax.quant import groups
from qdit_jax.quant.division import quotient
from qdit_jax.quant.finite import check_finite
from qdit_jax.quant.qtensor import zero_point_of
from qdit_jax.quant.specs import ActSpec
from qdit_jax.types import AnyArray, Numbers, Tree


def code_limits(spec: ActSpec) -> tuple[int, int]:
    """Returns the least and the greatest code of `spec`."""
    if spec.symmetric and not spec.unsigned:
        return -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
    return 0, 2**spec.bits - 1


def grid_of_limits(
    low: Float[Array, "*s"], high: Float[Array, "*s"], spec: ActSpec
) -> tuple[Float[Array, "*s"], Float[Array, "*s"] | None]:
    """Returns (scale, zero_point) of the interval `[low, high]`; zero_point None if symmetric."""
    if spec.fmt is not None:
        return spec.fmt.calibrated_scale(jnp.maximum(jnp.abs(low), jnp.abs(high))), None
    if spec.unsigned:
        return spec.range_fn.scale(jnp.zeros_like(high), high, spec.bits, False), None
    scale = spec.range_fn.scale(low, high, spec.bits, spec.symmetric)
    return scale, None if spec.symmetric else zero_point_of(low, scale, spec.bits)


def dynamic_grid(
    x: Float[Array, "*lead K"], spec: ActSpec
) -> tuple[Float[Array, "*lead G"], Float[Array, "*lead G"] | None]:
    """Returns (scale, zero_point), float32 `[*lead, G]`, from the values of `x` themselves.

    A shorter last group has its own statistics. zero_point is None if symmetric. `spec.shift`
    is not added here.
    """
    size = groups.effective_group_size(x.shape[-1], spec.group_size)
    full = x.shape[-1] // size * size
    grids = []
    if full:
        members = x[..., :full].reshape(*x.shape[:-1], full // size, size)
        grids.append(_grid_of_members(members, spec))
    if full < x.shape[-1]:
        grids.append(_grid_of_members(x[..., None, full:], spec))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *grids)


def _grid_of_members(
    members: Float[Array, "*lead G S"], spec: ActSpec
) -> tuple[Float[Array, "*lead G"], Float[Array, "*lead G"] | None]:
    symmetric = spec.symmetric and not spec.unsigned
    low, high = spec.range_fn.limits(members, spec.bits, symmetric, members.ndim - 1)
    return grid_of_limits(low, high, spec)


def expand_to_channels(
    values: Float[AnyArray, "*lead G"], num_channels: int, group_size: int
) -> Float[Array, "*lead K"]:
    """Returns one value per channel from one value per group."""
    size = groups.effective_group_size(num_channels, group_size)
    wide = jnp.broadcast_to(values[..., None], (*values.shape, size))
    return wide.reshape(*values.shape[:-1], -1)[..., :num_channels]


def codes_of(
    x: Float[Array, "*lead K"],
    scale: Float[AnyArray, "*#lead G"],
    zero_point: Float[AnyArray, "*#lead G"] | None,
    spec: ActSpec,
) -> Float[Array, "*lead K"]:
    """Returns the codes of `x` (shift already added) as whole floats, NaN where `x` is not finite.

    `scale` and `zero_point` are `[*lead or broadcastable, G]`.
    """
    lowest, highest = code_limits(spec)
    codes = jnp.round(quotient(x, expand_to_channels(scale, x.shape[-1], spec.group_size)))
    if zero_point is not None:
        codes = codes + expand_to_channels(zero_point, x.shape[-1], spec.group_size)
    return jnp.where(jnp.isfinite(x), jnp.clip(codes, lowest, highest), jnp.nan)


def values_of(
    codes: Float[Array, "*lead K"],
    scale: Float[AnyArray, "*#lead G"],
    zero_point: Float[AnyArray, "*#lead G"] | None,
    spec: ActSpec,
) -> Float[Array, "*lead K"]:
    """Returns the values that codes stand for, less `spec.shift`."""
    if zero_point is not None:
        codes = codes - expand_to_channels(zero_point, codes.shape[-1], spec.group_size)
    values = codes * expand_to_channels(scale, codes.shape[-1], spec.group_size)
    return values - spec.shift if spec.shift else values


@partial(jax.jit, static_argnames="spec")
def fake_quantize(x: Float[Array, "*lead K"], spec: ActSpec) -> Float[Array, "*lead K"]:
    """Returns `x` rounded to the grid of each token's groups, in the dtype of `x`.

    Any K works with any group size; the arithmetic is float32.

    Raises:
        ValueError: if `spec` is static: its scales come from calibration, see `ActQuant`.
    """
    if spec.mode == "static":
        raise ValueError("a static ActSpec needs calibrated scales; use an ActQuant that has them.")
    if spec.fmt is not None:
        return spec.fmt.fake_quantize(x, spec.group_size).astype(x.dtype)
    shifted = x.astype(jnp.float32) + spec.shift
    scale, zero_point = dynamic_grid(shifted, spec)
    return _round_trip(shifted, scale, zero_point, spec).astype(x.dtype)


def _round_trip(
    x: Float[Array, "*lead K"],
    scale: Float[AnyArray, "*#lead G"],
    zero_point: Float[AnyArray, "*#lead G"] | None,
    spec: ActSpec,
) -> Float[Array, "*lead K"]:
    return values_of(codes_of(x, scale, zero_point, spec), scale, zero_point, spec)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "zero_point", "timesteps"],
    meta_fields=["spec"],
)
@dataclasses.dataclass(frozen=True)
class ActQuant:
    """An activation quantizer with its calibrated scales, if it has any.

    Attributes:
        spec: static settings.
        scale: None when dynamic; static: `[G]` (`[1]`: one for the tensor), or a table `[S, G]`
            with one row per sampling step or range of timesteps, from which `at` picks. Of a number
            format with a factor per tensor, `[1]` or `[S, 1]`: the factor.
        zero_point: like `scale`, whole numbers; None when symmetric or dynamic.
        timesteps: `[S]`, what the rows of a table were calibrated at; `at_timestep` needs them.
    """

    spec: ActSpec
    # Any: `jax.tree.map` and `jax.eval_shape` put other leaves here than arrays.
    scale: Any = None
    zero_point: Any = None
    timesteps: Any = None

    @property
    def is_table(self) -> bool:
        """Whether a row must be picked with `at` first."""
        return self.scale is not None and self.scale.ndim == 2

    def at(self, index: Numbers) -> ActQuant:
        """Returns the quantizer of row `index` of the table (an integer, traced or not).

        An index `[B]` gives every sample its own row. Without a table, returns itself.
        """
        if not self.is_table:
            return self
        index = jnp.asarray(index)

        def pick(table: Float[AnyArray, "S G"]) -> Float[Array, "..."]:
            rows = table[index]
            return rows[:, None, :] if index.ndim else rows  # [B, 1, G] or [G]

        zero_point = None if self.zero_point is None else pick(self.zero_point)
        return ActQuant(self.spec, pick(self.scale), zero_point)

    def at_timestep(self, timestep: Numbers) -> ActQuant:
        """Returns the quantizer calibrated nearest to `timestep`, a number or one per sample `[B]`.

        Without recorded timesteps, returns itself. Works under jit and inside `lax.scan`.
        """
        if not self.is_table or self.timesteps is None:
            return self
        away = jnp.abs(jnp.asarray(timestep, jnp.float32)[..., None] - self.timesteps)
        return self.at(jnp.argmin(away, axis=-1))

    def grid(
        self, x: Float[Array, "*lead K"]
    ) -> tuple[Float[AnyArray, "*#lead G"], Float[AnyArray, "*#lead G"] | None]:
        """Returns (scale, zero_point) for `x` (shift added), broadcastable to `[*lead, G]`.

        For integers; `blocks` is of number formats.

        Raises:
            ValueError: if scales are missing, are a table (pick a row with `at`), or do not fit K.
        """
        if self.spec.mode == "dynamic":
            return dynamic_grid(x, self.spec)
        return self._calibrated(x)

    def blocks(
        self, x: Float[Array, "*lead K"]
    ) -> tuple[UInt8[Array, "*lead K"], Float[AnyArray, "*#lead G"]]:
        """Returns the codes of `x` in a number format, and the scales of its blocks.

        Raises:
            ValueError: as `grid`.
        """
        assert self.spec.fmt is not None, "integers have a grid"
        scale = None if self.spec.mode == "dynamic" else self._calibrated(x)[0]
        return self.spec.fmt.quantize_blocks(x, self.spec.group_size, scale)

    def _calibrated(
        self, x: Float[Array, "*lead K"]
    ) -> tuple[Float[AnyArray, "*#lead G"], Float[AnyArray, "*#lead G"] | None]:
        self._check_scales(x.shape[-1])
        if self.scale.ndim == 1:
            return self.scale, self.zero_point
        lead = (self.scale.shape[0],) + (1,) * (x.ndim - 2)
        return jax.tree.map(lambda a: a.reshape(*lead, -1), (self.scale, self.zero_point))

    def __call__(self, x: Float[AnyArray, "*lead K"]) -> Float[Array, "*lead K"]:
        """Returns `x` fake-quantized, in the dtype of `x`."""
        if self.spec.mode == "dynamic":
            return fake_quantize(x, self.spec)
        if self.spec.fmt is not None:
            wide = jnp.asarray(x, jnp.float32)
            scale, _ = self._calibrated(wide)
            return self.spec.fmt.fake_quantize(wide, self.spec.group_size, scale).astype(x.dtype)
        shifted = jnp.asarray(x, jnp.float32) + self.spec.shift
        return _round_trip(shifted, *self.grid(shifted), self.spec).astype(x.dtype)

    def _check_scales(self, num_channels: int) -> None:
        if self.scale is None:
            raise ValueError("a static ActQuant has no scales; calibrate it first.")
        if self.is_table:
            raise ValueError(
                f"scale is a table of {self.scale.shape[0]} rows; pick one with "
                "`select_timestep(params, timestep)`, as the sampler's denoiser does, or `at(index)`."
            )
        size = self.spec.static_group_size
        expected = groups.num_groups(num_channels, size)
        if self.scale.shape[-1] != expected:
            raise ValueError(
                f"scale has {self.scale.shape[-1]} groups, but {num_channels} channels make "
                f"{expected} groups of {size or num_channels}."
            )


def static_act_quant(low: Numbers, high: Numbers, spec: ActSpec) -> ActQuant:
    """Returns the static quantizer of calibrated extremes `[G]`, or `[S, G]` with one row per step.

    `low` and `high` are the least and greatest values seen, `spec.shift` not yet added.

    Raises:
        ValueError: if `spec` is dynamic, its range rule needs more than the extremes, or these are
            not finite or reversed; a rule's limits of samples go to `static_act_quant_of_limits`.
    """
    if not spec.range_fn.from_extremes:
        raise ValueError(
            f"range rule {spec.range_fn.name!r} needs samples, not extremes; compute its limits "
            "from samples, for static_act_quant_of_limits, or use range_fn=ranges.minmax here."
        )
    least, greatest = checked_range(low, high, spec)
    symmetric = spec.symmetric and not spec.unsigned
    start, end = spec.range_fn.limits_from_extremes(least, greatest, spec.bits, symmetric)
    return ActQuant(spec, *grid_of_limits(start, end, spec))


def static_act_quant_of_limits(low: Numbers, high: Numbers, spec: ActSpec) -> ActQuant:
    """Returns the static quantizer of limits `[G]` or `[S, G]` that `spec.range_fn` has chosen.

    `spec.shift` is not yet added to `low` and `high`.

    Raises:
        ValueError: if `spec` is dynamic, or the limits are not finite or reversed.
    """
    return ActQuant(spec, *grid_of_limits(*checked_range(low, high, spec), spec))


def checked_range(
    low: Numbers, high: Numbers, spec: ActSpec
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """Returns both ends in float32, `spec.shift` added; raises `ValueError` if they are no range."""
    if spec.mode != "static":
        raise ValueError("a dynamic ActSpec takes no calibrated range; use mode='static'.")
    low, high = jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)
    if low.shape != high.shape or low.ndim not in (1, 2):
        raise ValueError(f"low {low.shape} and high {high.shape} must both be [G] or [S, G].")
    for name, side in (("low", low), ("high", high)):
        check_finite(name, side)
    if not isinstance(low > high, jax.core.Tracer) and bool(jnp.any(low > high)):
        raise ValueError("low exceeds high in a group; they are its least and greatest value.")
    return low + spec.shift, high + spec.shift


def select_timestep(tree: Tree, timestep: Numbers) -> Tree:
    """Returns `tree` with the row of every `ActQuant` table calibrated nearest to `timestep`."""
    return jax.tree.map(
        lambda node: node.at_timestep(timestep) if isinstance(node, ActQuant) else node,
        tree,
        is_leaf=lambda node: isinstance(node, ActQuant),
    )


def group_extremes(x: Float[AnyArray, "*lead K"], group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the least and greatest value of every group over all leading axes, `[G]` each."""
    size = groups.effective_group_size(x.shape[-1], group_size)
    starts = np.arange(0, x.shape[-1], size)
    rows = np.asarray(x, np.float32).reshape(-1, x.shape[-1])
    return (
        np.minimum.reduceat(rows.min(axis=0), starts),
        np.maximum.reduceat(rows.max(axis=0), starts),
    )
