"""Quantizing the tokens of a product in groups, in one pass, in a Pallas Mosaic GPU kernel.

As `gpu_rows`, with a scale and a zero point per unit of input channels: XLA reads its inputs four times or more,
and writes them in float32 first where they come from a norm. A warp has whole tokens of a group;
of a norm it reads them twice more, from the cache.

Compiled ahead of time for an H100, interpreted on CPU, not run on a GPU.

Dimensions: M tokens, K input channels, G groups of C channels, W tokens of a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int8, Int32

from qdit_jax.kernels.gpu_memory import loaded, store
from qdit_jax.kernels.prologue import (
    Before,
    Norm,
    Pending,
    before_of,
    norm_before,
    operands_of,
    split_refs,
)
from qdit_jax.kernels.refs import Ref
from qdit_jax.kernels.token_scales import INFINITY, magnitude_bits
from qdit_jax.quant import ActSpec, code_limits, grid_of_limits, in_one_form, rounded_quotients

WARPS, LANES = 4, 32  # of a block; threads of a warp
LEAST_CHANNELS = 4  # of a thread, whose codes are written as one word
LEAST_TOKENS = 8  # of a block: their scales fill 32 bytes
SIZES = (32, 64, 128, 256)  # of groups
MOST_TOGETHER = 4  # groups that are unrolled
# The first channel of a group -> its values.
GroupFn = Callable[[Array], Float[Array, "W C"]]


class Cut(NamedTuple):
    """How many groups a token has, and their channels."""

    groups: int
    size: int

    @property
    def own_channels(self) -> int:
        """Neighboring channels of a thread."""
        return max(LEAST_CHANNELS, self.size // LANES)

    @property
    def warp_tokens(self) -> int:
        """Tokens of a group that a warp has at once."""
        return LANES * self.own_channels // self.size

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return max(LEAST_TOKENS, WARPS * self.warp_tokens)


class Groups(NamedTuple):
    """Tokens in groups.

    Attributes:
        codes: elements, moved by half their range where there are zero points.
        scale: NaN of a group that is not finite.
        zero: moved too; None of symmetric codes.
    """

    codes: Int8[Array, "M K"]
    scale: Float[Array, "G M"]
    zero: Int32[Array, "G M"] | None


def fits(x: Float[Array, "*lead K"] | Pending, spec: ActSpec) -> bool:
    """Returns whether tokens can be quantized here."""
    *lead, num_channels = x.shape
    # A block has one modulation.
    rows = math.prod(lead[1:] if norm_before(x) else lead)
    size = spec.group_size
    if size not in SIZES or num_channels % size:
        return False
    return rows % Cut(num_channels // size, size).tokens == 0 and spec.range_fn.from_extremes


def quantized_groups(
    x: Float[Array, "*lead K"] | Pending, spec: ActSpec, *, interpret: Any = None
) -> Groups:
    """Returns tokens quantized in groups of one of `SIZES`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    operands, before = operands_of(x), before_of(x)
    count, num_channels = operands[0].shape
    cut = Cut(num_channels // spec.group_size, spec.group_size)
    out_type = [
        jax.ShapeDtypeStruct((count, num_channels), jnp.int8),
        jax.ShapeDtypeStruct((cut.groups, count), jnp.float32),
    ]
    if not spec.symmetric:
        out_type.append(jax.ShapeDtypeStruct((cut.groups, count), jnp.int32))
    found = plgpu.kernel(
        functools.partial(_kernel, spec=spec, before=before, cut=cut),
        out_type=out_type,
        scratch_types=[
            plgpu.SMEM((cut.groups, cut.tokens), of_group.dtype) for of_group in out_type[1:]
        ],
        grid=(count // cut.tokens,),
        grid_names=("block",),
        cost_estimate=pl.CostEstimate(
            flops=20 * count * num_channels,
            transcendentals=0,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in operands) + count * num_channels,
        ),
        kernel_name="gpu_group_rows",
        interpret=interpret,
    )(*operands)
    codes, scale, *zero = found
    return Groups(codes, scale, zero[0] if zero else None)


def _kernel(x: Ref, *refs: Ref, spec: ActSpec, before: Before, cut: Cut) -> None:
    """Writes codes, scales and zero points of a block of tokens."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    modulation, maps, refs = split_refs(refs, before)
    count = 1 if spec.symmetric else 2  # scales, zero points
    codes_ref, outputs, blocks = refs[0], refs[1 : 1 + count], refs[1 + count :]
    first = lax.axis_index("block") * cut.tokens
    tokens, size = pl.ds(first, cut.tokens), cut.size

    group_fn: GroupFn = lambda start: in_registers(x.at[tokens, pl.ds(start, size)], cut)  # noqa: E731
    if (norm := before.norm) is not None:
        parts = modulation[0].at[first // norm.tokens_per_sample]
        group_fn = modulated_group(group_fn, parts, norm, cut)
    if maps:
        group_fn = mapped_group(group_fn, maps, cut)

    def quantize_group(index: Array) -> None:
        start = index * size
        codes, *of_group = quantized(group_fn(start), spec)
        # Of small groups a warp writes no whole lines of memory at once.
        store(codes_ref.at[tokens, pl.ds(start, size)], codes)
        for block, values in zip(blocks, of_group, strict=True):
            block.at[index][...] = values

    over_groups(lambda index, _: quantize_group(index), cut, None)
    plgpu.commit_smem()
    for block, output in zip(blocks, outputs, strict=True):
        plgpu.copy_smem_to_gmem(block, output.at[:, tokens])
    plgpu.wait_smem_to_gmem(0, wait_read_only=False)


def over_groups(body: Callable[[Array, Any], Any], cut: Cut, carry: Any) -> Any:
    """Returns what a body `(number of the group, carry) -> carry` makes of all groups, several at a time.

    A loop, for what unrolls all takes minutes to lower; several, for their loads to be in flight together.
    """
    together = max(n for n in range(1, MOST_TOGETHER + 1) if cut.groups % n == 0)

    def several(step: Array, carry: Any) -> Any:
        for index in range(together):
            carry = body(step * together + index, carry)
        return carry

    return lax.fori_loop(0, cut.groups // together, several, carry)


def modulated_group(group_fn: GroupFn, parts: Ref, norm: Norm, cut: Cut) -> GroupFn:
    """Returns what gives a group of tokens after the norm and its modulation."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    num_channels = cut.groups * cut.size

    def mean_of(value_fn: GroupFn) -> Float[Array, "W C"]:
        zeros = plgpu.layout_cast(jnp.zeros((cut.tokens, cut.size), jnp.float32), layout(cut))
        total = over_groups(lambda index, total: total + value_fn(index * cut.size), cut, zeros)
        return over_channels(jnp.sum(total, axis=1) / num_channels, cut.size)

    mean = mean_of(group_fn)
    variance = mean_of(lambda start: jnp.square(group_fn(start) - mean))
    factor = lax.rsqrt(variance + norm.eps)

    def group(start: Array) -> Float[Array, "W C"]:
        shift, scale = (
            over_tokens(parts.at[pl.ds(part * num_channels + start, cut.size)], cut)
            for part in (norm.shift, norm.scale)
        )
        return (group_fn(start) - mean) * factor * (1 + scale) + shift

    return group


def mapped_group(group_fn: GroupFn, maps: Sequence[Ref], cut: Cut) -> GroupFn:
    """Returns what gives a group of tokens after `InputMap`: its scale of channels, and its shift if any."""

    def group(start: Array) -> Float[Array, "W C"]:
        inverse_scale, *shift = (over_tokens(a.at[pl.ds(start, cut.size)], cut) for a in maps)
        values = group_fn(start)
        return (values - shift[0] if shift else values) * inverse_scale

    return group


def quantized(values: Float[Array, "W C"], spec: ActSpec) -> list[Array]:
    """Returns codes `[W, C]`, scales `[W]` and, if codes are not symmetric, zero points `[W]`."""
    bits = magnitude_bits(values)
    is_finite = jnp.max(bits, axis=1) < INFINITY
    known = jnp.where(bits < INFINITY, values, 0.0)
    low, high = jnp.min(known, axis=1), jnp.max(known, axis=1)
    with in_one_form():
        low, high = spec.range_fn.limits_from_extremes(low, high, spec.bits, spec.symmetric)
        scale, zero = grid_of_limits(low, high, spec)
        codes_fn = rounded_quotients(over_channels(scale, spec.group_size), 2**spec.bits - 1)
    codes = codes_fn(values)
    lowest, highest = code_limits(spec)
    own_scale = jnp.where(is_finite, scale, jnp.nan)
    if zero is None:
        return [jnp.clip(codes, lowest, highest).astype(jnp.int8), own_scale]
    half = 2 ** (spec.bits - 1)
    whole = zero.astype(jnp.int32)
    codes = jnp.clip(codes + over_channels(whole, spec.group_size), lowest, highest) - half
    return [codes.astype(jnp.int8), own_scale, whole - half]


def over_channels(values: Array, size: int) -> Array:
    """Returns values `[W]` of tokens at every channel `[W, C]` of a group."""
    return lax.broadcast_in_dim(values, (len(values), size), [0])


def layout(cut: Cut) -> Any:
    """Returns the layout of `[W, C]`: a warp has whole rows, a thread neighboring channels."""
    from jax.experimental.mosaic.gpu import fragmented_array
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows = cut.warp_tokens
    whole, own = (WARPS * rows, cut.size), (cut.own_channels,)
    if rows == 1:
        tiling = fragmented_array.Tiling((whole, own))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    tiling = fragmented_array.Tiling((whole, (rows, *own)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1)


def in_registers(block: Ref, cut: Cut) -> Float[Array, "W C"]:
    """Returns a block of memory in registers."""
    return loaded(block, layout(cut), optimized=False).astype(jnp.float32)


def over_tokens(values: Ref, cut: Cut) -> Float[Array, "W C"]:
    """Returns values `[C]` of memory at every token `[W, C]`."""
    found = loaded(values, layout(cut).reduce(0), optimized=False).astype(jnp.float32)
    return lax.broadcast_in_dim(found, (cut.tokens, cut.size), [1])
