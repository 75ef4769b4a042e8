"""The operands of integer numerics, cut into segments.

Integers and number formats have one equation: `value = (element - zero) * scale`. Integer codes,
moved by `2**(bits-1)`, the doubled elements of E2M1, and the levels of two levels of scales are int8;
FP8 elements are bfloat16, NF4's float32. Two int8 operands keep their zeros, which are subtracted from the int32 sums, exactly. In a wider
dtype each `element - zero` is exact, while a float32 sum would cancel; there the zero is subtracted
first.

Dimensions: T tokens, K input channels, N output channels, B scales of a group, U segments of K,
L channels of a segment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int, Num

from qdit_jax.kernels.segments import Segments
from qdit_jax.quant import (
    ActQuant,
    QTensor,
    code_rows,
    codes_of,
    expand_to_channels,
    formats,
    level_rows,
    packing,
    scale_value,
)
from qdit_jax.types import AnyArray

# (elements, zero, scale) of a segment: `[T, L]`, `[T, 1]`, `[T, 1]` of activations and `[N, L]`,
# `[N]`, `[N]` of weights. Zero is None where it is 0.
Elements = tuple[Num[Array, "_ _"], Num[Array, "..."] | int | None, Float[Array, "..."]]
# (number, group) of a segment of the activations, or of all segments `[U]`.
ActSegment = tuple[AnyArray, AnyArray]


class WeightSegment(NamedTuple):
    """A segment of the weights, or all of them with U as first axis.

    Attributes:
        number: of the segment.
        zero: uint8 `[B]`, None where it is 0.
        scale: `[B]`, as stored; that of the output channels where there are two levels of scales.
    """

    number: AnyArray
    zero: AnyArray | None
    scale: AnyArray


Segment = TypeVar("Segment", ActSegment, WeightSegment)


@dataclasses.dataclass(frozen=True)
class Operand(Generic[Segment]):
    """One operand, one segment at a time.

    Attributes:
        stacked: a tree of arrays with U as first axis, which `lax.scan` iterates over.
        segment: returns the `Elements` of one entry of `stacked`.
    """

    stacked: Segment
    segment: Callable[[Segment], Elements]


def element_dtype(fmt: formats.Format | None) -> np.dtype:
    """Returns the narrowest dtype with a dot that holds the elements of integers or of `fmt`."""
    return jnp.dtype(jnp.int8) if fmt is None else fmt.operand_dtype


def act_operand(
    x: Float[Array, "*lead K"], act_quant: ActQuant, dtype: np.dtype, segments: Segments
) -> Operand[ActSegment]:
    """Returns the operand of the activations `x` (shift added), its elements in `dtype`."""
    elements, zero, scale = act_elements(x, act_quant, dtype)
    elements = segments.cut(elements.reshape(-1, x.shape[-1]), 1)  # [T, U L]

    def of_token(values: Num[AnyArray, "*#lead G"], group: AnyArray) -> Num[Array, "T 1"]:
        values = jnp.broadcast_to(values, (*x.shape[:-1], values.shape[-1]))
        return column(values.reshape(-1, values.shape[-1]), group)

    def segment(one: ActSegment) -> Elements:
        index, group = one
        part = column(elements, index * segments.length, segments.length)
        one_zero = zero if zero is None or isinstance(zero, int) else of_token(zero, group)
        return part, one_zero, of_token(scale, group)

    group = segments.group(act_quant.spec.group_size)
    return Operand((np.arange(len(group)), group), segment)


def act_elements(
    x: Float[Array, "*lead K"], act_quant: ActQuant, dtype: np.dtype
) -> tuple[Num[Array, "*lead K"], Num[Array, "*#lead G"] | int | None, Float[AnyArray, "*#lead G"]]:
    """Returns (elements, zero, scale) of the activations; zero and scale have a value per group."""
    spec = act_quant.spec
    if spec.fmt is not None:
        codes, scale = act_quant.blocks(x)
        return spec.fmt.operand(codes).astype(dtype), None, scale * spec.fmt.unit
    step, zero_point = act_quant.grid(x)
    codes = codes_of(x, step, zero_point, spec)  # whole numbers in float32
    if dtype != jnp.int8:
        if zero_point is not None:
            codes = codes - expand_to_channels(zero_point, x.shape[-1], spec.group_size)
        return codes.astype(dtype), None, step
    # Codes from 0 to 2**bits - 1 are moved by half their range, to fit int8; so is their zero.
    half = 2 ** (spec.bits - 1)
    if zero_point is not None:
        return (codes - half).astype(dtype), zero_point.astype(jnp.int32) - half, step
    if spec.unsigned:
        return (codes - half).astype(dtype), -half, step
    return codes.astype(dtype), None, step


def weight_operand(q: QTensor, dtype: np.dtype, segments: Segments) -> Operand[WeightSegment]:
    """Returns the operand of the kernel `q`, its elements in `dtype`.

    With two levels of scales, elements are int8 levels, whose scale is that of the output channel.
    """
    codes_fn = segment_codes(q, segments)
    group = segments.group(q.group_size)
    half = 2 ** (q.bits - 1)

    def of_channel(values: Num[AnyArray, " B"]) -> Num[Array, " N"]:
        return jnp.repeat(values, q.channel_group)

    def segment(one: WeightSegment) -> Elements:
        # Otherwise XLA for GPUs may keep all codes in the layout that its int8 dot likes, as well.
        codes = with_layout_constraint(codes_fn(one.number), Layout(major_to_minor=(0, 1)))
        if q.has_levels:
            return codes.astype(dtype), None, of_channel(one.scale)
        scale = of_channel(element_scale(q, one.scale))
        if q.fmt is not None:
            return q.fmt.operand(codes).astype(dtype), None, scale
        zero = None
        if one.zero is not None:
            zero = of_channel(one.zero.astype(jnp.int32)) - half
        elements = (codes - jnp.uint8(half)).astype(jnp.int8)  # uint8 wraps to the signed code
        if dtype == jnp.int8:
            return elements, zero, scale
        return (elements if zero is None else elements - zero[:, None]).astype(dtype), None, scale

    if q.channel_scale is not None:
        scale = jnp.broadcast_to(q.channel_scale, (len(group), q.channel_scale.shape[-1]))
        return Operand(WeightSegment(np.arange(len(group)), None, scale), segment)
    zero_point = q.zero_point  # [G, B]
    zero = None if zero_point is None else take(zero_point, group)  # [U, B]
    stacked = WeightSegment(np.arange(len(group)), zero, take(q.scale, group))
    return Operand(stacked, segment)


def element_scale(q: QTensor, scale: Num[AnyArray, " B"]) -> Float[Array, " B"]:
    """Returns a row of `q.scale` as the float32 scales of elements."""
    if q.fmt is None:
        return scale_value(scale)
    values = q.fmt.scale_value(jnp.asarray(scale))
    return (values if q.tensor_scale is None else values * q.tensor_scale) * q.fmt.unit


def segment_codes(q: QTensor, segments: Segments) -> Callable[[AnyArray], Array]:
    """Returns a function from the number of a segment to its codes `[N, L]`, uint8, or int8 levels.

    Packed codes are unpacked one segment at a time where the bytes allow it; otherwise, and where they
    become levels, those of the whole layer before.
    """
    length = segments.length
    num_channels = q.shape[0]
    if not q.has_levels and segments.are_equal and packing.can_slice(num_channels, length):
        packed = jnp.asarray(q.codes)
        return lambda index: packing.unpack_slice(
            packed, q.bits, num_channels, index * length, length
        )
    whole = segments.cut(level_rows(q) if q.has_levels else code_rows(q), 1)  # [N, U L]
    return lambda index: column(whole, index * length, length)


def column(
    values: Num[AnyArray, "T M"], start: Int[AnyArray, ""], length: int = 1
) -> Num[Array, "T L"]:
    # The scan's counter is never negative: no code for indices from the end.
    return jax.lax.dynamic_slice_in_dim(values, start, length, 1, allow_negative_indices=False)


def take(values: Num[AnyArray, "G ..."], index: np.ndarray) -> Num[AnyArray, "U ..."]:
    """Returns the rows `index` of `values`; `values` itself where these are all rows in order."""
    same = np.array_equal(index, np.arange(values.shape[0]))
    return values if same else jnp.take(values, index, axis=0)
