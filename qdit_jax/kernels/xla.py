"""The product of quantised operands in plain XLA: the fallback everywhere and the oracle.

Dimensions: T tokens, K input channels, N output channels, G groups, U segments of K inside
which both operands have one scale, L rows of a segment.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qdit_jax.quant import ActQuant, QTensor, dequantize, groups, integer_codes
from qdit_jax.quant.act import codes_of

# An int32 accumulator holds this many products of two 8-bit codes, corrections included.
MAX_SEGMENT = 8192


def simulated_matmul(
    x: Float[Array, "*lead K"], q: QTensor, act_quant: ActQuant | None
) -> Float[Array, "*lead N"]:
    """Returns `act_quant(x) @ dequantize(q)` in float32 arithmetic, in the dtype of `x`.

    The barrier keeps the dequantisation beside its product: hoisted out of a sampling loop, the
    whole model would sit in memory in float32. (XLA:CPU also needs
    `--xla_cpu_enable_concurrency_optimized_scheduler=false` for that.)
    """
    dtype = x.dtype
    x, q = jax.lax.optimization_barrier((x, q))
    x = x.astype(jnp.float32)
    if act_quant is not None:
        x = act_quant(x)
    precision = jax.lax.Precision.HIGHEST
    return jnp.matmul(x, dequantize(q), precision=precision).astype(dtype)


def integer_matmul(
    x: Float[Array, "*lead K"], q: QTensor, act_quant: ActQuant
) -> Float[Array, "*lead N"]:
    """Returns the same product by int8 dots with int32 accumulators, one segment at a time.

    With codes c and zero points z, `sum (cx - zx)(cw - zw)` over a segment is
    `sum cx cw - zx sum cw - zw sum cx + L zx zw`, exact in int32; it is then rescaled by both
    scales and added up in float32. Codes are moved by 2**(bits-1) into int8, zero points along.
    """
    dtype, lead = x.dtype, x.shape[:-1]
    num_channels, width = q.shape
    spec = act_quant.spec
    x, q = jax.lax.optimization_barrier((x, q))
    x = x.astype(jnp.float32) + spec.shift
    scale, zero_point = act_quant.grid(x)
    offset = 2 ** (spec.bits - 1) if zero_point is not None or spec.unsigned else 0
    x_codes = (codes_of(x, scale, zero_point, spec) - offset).astype(jnp.int8)
    x_zero = -offset if zero_point is None else zero_point.astype(jnp.int32) - offset
    w_codes = (integer_codes(q).astype(jnp.int32) - 2 ** (q.bits - 1)).astype(jnp.int8)
    w_zero = 0 if q.symmetric else q.zero_point.astype(jnp.int32) - 2 ** (q.bits - 1)

    starts, rows = segments(num_channels, spec.group_size, q.group_size)
    x_group = starts // groups.effective_group_size(num_channels, spec.group_size)
    w_group = starts // groups.effective_group_size(num_channels, q.group_size)
    repeat = q.channel_group
    by_token = jnp.broadcast_to(scale, (*lead, scale.shape[-1])).reshape(-1, scale.shape[-1])
    zero_by_token = jnp.broadcast_to(x_zero, (*lead, scale.shape[-1])).reshape(by_token.shape)
    zero_by_column = jnp.broadcast_to(w_zero, q.scale.shape)
    operands = {
        "x": _segment_rows(x_codes.reshape(-1, num_channels).T, rows),  # [U, L, T]
        "w": _segment_rows(w_codes, rows),  # [U, L, N]
        "x_scale": by_token.T[x_group],
        "x_zero": zero_by_token.T[x_group],
        "w_scale": jnp.repeat(q.scale.astype(jnp.float32)[w_group], repeat, axis=-1),
        "w_zero": jnp.repeat(zero_by_column[w_group], repeat, axis=-1),
        "count": jnp.asarray((rows < num_channels).sum(axis=1), jnp.int32),
    }
    total = jnp.zeros((by_token.shape[0], width), jnp.float32)
    total, _ = jax.lax.scan(_add_segment, total, operands)
    if spec.shift:
        total = total - spec.shift * jnp.sum(dequantize(q), axis=0)
    return total.reshape(*lead, width).astype(dtype)


def _add_segment(total: Float[Array, "T N"], one: dict[str, Any]) -> tuple[Any, None]:
    dot = jax.lax.dot_general(
        one["x"], one["w"], (((0,), (0,)), ((), ())), preferred_element_type=jnp.int32
    )
    x_sum = jnp.sum(one["x"], axis=0, dtype=jnp.int32)[:, None]
    w_sum = jnp.sum(one["w"], axis=0, dtype=jnp.int32)
    x_zero = one["x_zero"][:, None]
    dot = dot - x_zero * w_sum - one["w_zero"] * (x_sum - one["count"] * x_zero)
    return total + dot.astype(jnp.float32) * one["x_scale"][:, None] * one["w_scale"], None


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


def _segment_rows(codes: Any, rows: np.ndarray) -> Any:
    """Returns `codes` `[K, *]` cut into segments `[U, L, *]`, missing rows zero."""
    count, length = rows.shape
    pad = max(count * length - codes.shape[0], 1)
    padded = jnp.pad(codes, ((0, pad), (0, 0)))
    if (np.diff(rows[:, 0]) == length).all():  # regular: a reshape instead of a gather
        return padded[: count * length].reshape(count, length, -1)
    return padded[rows]
