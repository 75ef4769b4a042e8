"""The product of quantised operands in plain XLA: the fallback everywhere and the oracle.

Dimensions: T tokens, K input channels, N output channels, G groups, U segments of K inside
which both operands have one scale, L rows of a segment.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Num

from qdit_jax.quant import ActQuant, QTensor, dequantize, groups, integer_codes, packing
from qdit_jax.quant.act import codes_of

# An int32 accumulator holds this many products of two 8-bit codes, corrections included.
MAX_SEGMENT = 8192
ONES = 8


def simulated_matmul(
    x: Float[Array, "*lead K"], q: QTensor, act_quant: ActQuant | None
) -> Float[Array, "*lead N"]:
    """Returns `act_quant(x) @ dequantize(q)` in float32 arithmetic, in the dtype of `x`."""

    def product(x: Any, q: QTensor, act_quant: ActQuant | None) -> Any:
        dtype = x.dtype
        x = x.astype(jnp.float32)
        if act_quant is not None:
            x = act_quant(x)
        precision = jax.lax.Precision.HIGHEST
        return jnp.matmul(x, dequantize(q), precision=precision).astype(dtype)

    return jax.lax.platform_dependent(
        x, q, act_quant, cpu=partial(in_its_turn, product), default=product
    )


def in_its_turn(product: Callable, x: Any, q: QTensor, act_quant: Any) -> Any:
    """Returns `product(x, q, act_quant)`, nothing of it computed before `x` is.

    XLA:CPU would dequantise the weights of many layers long before their products, and the whole
    model would lie in memory in float32; optimization barriers are gone when it orders its work.
    What stands in a branch is done when the branch is taken, and this one always is.
    """

    def nothing(x: Any, q: QTensor, act_quant: Any) -> Any:
        edge = 0 * (x[..., :1] + q.scale.astype(x.dtype).reshape(-1)[:1])
        return jnp.broadcast_to(edge, (*x.shape[:-1], q.shape[1]))

    return jax.lax.cond(zero_after(x, jnp.int32) == 0, product, nothing, x, q, act_quant)


def zero_after(x: Float[Array, "..."], dtype: Any) -> Any:
    """Returns 0, which the compiler does not know and cannot have before the values of `x`."""
    bits = jax.lax.bitcast_convert_type(x.reshape(-1)[0].astype(jnp.float32), jnp.int32)
    return ((bits | 1) == 0).astype(dtype)


def integer_matmul(
    x: Float[Array, "*lead K"], q: QTensor, act_quant: ActQuant
) -> Float[Array, "*lead N"]:
    """Returns the same product by int8 dots with int32 accumulators, one segment at a time.

    With codes c and zero points z, `sum (cx - zx)(cw - zw)` over a segment is
    `sum cx cw - zx sum cw - zw sum (cx - zx)`, exact in int32; it is then rescaled by both
    scales and added up in float32. Codes are moved by 2**(bits-1) into int8, zero points along.
    """
    dtype, lead = x.dtype, x.shape[:-1]
    num_channels, width = q.shape
    spec = act_quant.spec
    starts, rows = segments(num_channels, spec.group_size, q.group_size)
    count, length = rows.shape
    x_group = starts // groups.effective_group_size(num_channels, spec.group_size)
    w_group = starts // groups.effective_group_size(num_channels, q.group_size)

    x = x.astype(jnp.float32) + spec.shift
    scale, zero_point = act_quant.grid(x)
    offset = 2 ** (spec.bits - 1) if zero_point is not None or spec.unsigned else 0
    codes = (codes_of(x, scale, zero_point, spec) - offset).astype(jnp.int8)
    x_codes = cut(codes.reshape(-1, num_channels), rows, 1)  # [T, U L]
    half = 2 ** (q.bits - 1)
    w_codes, signed_codes = weight_segments(q, rows, zero_after(x, jnp.uint8))
    operands = {
        "index": np.arange(count),
        "x_group": x_group,
        "members": np.sum(rows < num_channels, axis=1, dtype=np.int32),
        "codes": w_codes,
        "zero": None if q.symmetric else take(q.zero_point, w_group, 0),  # [U, B]
        "scale": take(q.scale, w_group, 0),
    }

    def of_token(values: Any, group: Any) -> Any:  # [T, 1]
        values = jnp.broadcast_to(values, (*lead, scale.shape[-1]))
        return column(values.reshape(-1, scale.shape[-1]), group)

    def of_column(values: Any) -> Any:  # [N]
        return jnp.repeat(values, q.channel_group)

    def add_segment(total: Any, one: dict[str, Any]) -> Any:
        left = column(x_codes, one["index"] * length, length)  # [T, L]
        right = signed_codes(one["codes"])  # [L, N]
        zx = -offset
        if zero_point is not None:
            zx = of_token(zero_point, one["x_group"]).astype(jnp.int32) - offset
        zw = 0 if q.symmetric else of_column(one["zero"].astype(jnp.int32)) - half
        sw = of_column(one["scale"].astype(jnp.float32))
        x_sum = int_dot(left, jnp.ones((length, ONES), jnp.int8))[:, :1]
        w_sum = int_dot(jnp.ones((ONES, length), jnp.int8), right)[0]
        dot = int_dot(left, right) - zx * w_sum - zw * (x_sum - one["members"] * zx)
        total = total + dot.astype(jnp.float32) * of_token(scale, one["x_group"]) * sw
        return total, (w_sum - one["members"] * zw) * sw if spec.shift else None

    # Zeros from the start would be laid out for every layer before the first one runs.
    total = jnp.full((x_codes.shape[0], width), zero_after(x, jnp.float32))
    total, weight_sums = jax.lax.scan(add_segment, total, operands)
    if spec.shift:
        total = total - spec.shift * jnp.sum(weight_sums, axis=0)
    return total.reshape(*lead, width).astype(dtype)


def weight_segments(q: QTensor, rows: np.ndarray, late_zero: Any) -> tuple[Any, Callable]:
    """Returns an array to scan over and what makes a segment's int8 codes `[L, N]` of its rows.

    Where every segment has bytes of its own, the array is the packed codes: one segment at a time
    is unpacked. Elsewhere the layer is, once `late_zero` is known.
    """
    count, length = rows.shape
    half = jnp.uint8(2 ** (q.bits - 1))

    def signed(codes: Any) -> Any:
        return (codes - half).astype(jnp.int8)  # uint8 wraps to the signed code

    fields = 8 // q.bits
    whole = rows.size == q.shape[0] and length % (packing.SUB_BLOCK * fields) == 0
    if whole and packing.planes(q.bits) == (q.bits,):
        packed = q.codes.reshape(count, length // fields, -1)
        return packed, lambda one: signed(packing.unpack(one, q.bits, length))
    return cut(signed(integer_codes(q) ^ late_zero), rows, 0).reshape(
        count, length, -1
    ), lambda one: one


def int_dot(left: Integer[Array, "T L"], right: Integer[Array, "L N"]) -> Integer[Array, "T N"]:
    """Returns the product in int32; rows by columns, as XLA:CPU has no other int8 dot."""
    return jnp.matmul(left, right, preferred_element_type=jnp.int32)


def column(values: Num[Array, "T M"], start: Any, length: int = 1) -> Num[Array, "T L"]:
    return jax.lax.dynamic_slice_in_dim(values, start, length, 1, allow_negative_indices=False)


def take(values: Any, index: np.ndarray, axis: int) -> Any:
    """Returns `values` at `index` along `axis`; itself where that is everything in order."""
    same = np.array_equal(index, np.arange(values.shape[axis]))
    return values if same else jnp.take(values, index, axis=axis)


def segments(
    num_channels: int, x_group_size: int, w_group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first channel of every segment `[U]` and its channels `[U, L]`.

    Segments are the common refinement of both groupings; a shorter one is filled with the index
    `num_channels`, a row of zeros. Any two group sizes work.
    """
    edges = {0, *range(0, num_channels, MAX_SEGMENT)}
    for size in (x_group_size, w_group_size):
        size = groups.effective_group_size(num_channels, size)
        edges.update(range(0, num_channels, size))
    starts = np.array(sorted(edges))
    lengths = np.diff(np.append(starts, num_channels))
    rows = starts[:, None] + np.arange(lengths.max())
    return starts, np.where(rows < (starts + lengths)[:, None], rows, num_channels)


def cut(codes: Any, rows: np.ndarray, axis: int) -> Any:
    """Returns `codes` with channels `rows` `[U, L]`, one segment after another, along `axis`."""
    num_channels = codes.shape[axis]
    if rows.size == num_channels:
        return codes
    pad = [(0, 0), (0, 0)]
    pad[axis] = (0, max(rows.size - num_channels, 1))
    padded = jnp.pad(codes, pad)
    if (np.diff(rows[:, 0]) == rows.shape[1]).all():  # regular but for its end: no gather
        return padded
    return jnp.take(padded, rows.reshape(-1), axis=axis)
