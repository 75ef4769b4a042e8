"""Both numerics in plain XLA: the fallback on every platform, and the reference in tests.

Weights are multiplied as they are stored, `[N, K]`: every dot contracts the last axes of both operands,
so that no compiler has to transpose codes or dequantized weights.

Dimensions: T tokens, K input channels, N output channels, L channels of a segment.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from qdit_jax.kernels.operands import (
    ActSegment,
    Elements,
    WeightSegment,
    act_operand,
    element_dtype,
    weight_operand,
)
from qdit_jax.kernels.segments import segments
from qdit_jax.kernels.token_blocks import in_token_blocks
from qdit_jax.quant import ActQuant, QTensor, weight_rows
from qdit_jax.types import AnyArray

ONES = 8  # XLA:CPU has no int8 dot of a single row or column


def simulated_matmul(
    x: Float[Array, "*lead K"], q: QTensor, act_quant: ActQuant | None
) -> Float[Array, "*lead N"]:
    """Returns `act_quant(x) @ dequantize(q)` in float32 arithmetic, in the dtype of `x`.

    An `x` of 16 bits that is not quantized is multiplied in 16 bits, sums in float32 (W4A16). Very many
    tokens are multiplied block by block, see `in_token_blocks`.
    """
    if act_quant is None and jnp.finfo(x.dtype).bits == 16:
        return by_rows(x, weight_rows(q, x.dtype), preferred_element_type=x.dtype)
    weights = weight_rows(q)

    def product(x: Float[Array, "*lead K"]) -> Float[Array, "*lead N"]:
        wide = x.astype(jnp.float32)
        if act_quant is not None:
            wide = act_quant(wide)
        return by_rows(wide, weights, precision=jax.lax.Precision.HIGHEST).astype(x.dtype)

    found = in_token_blocks(product, x, act_quant, q.shape[-1])
    return product(x) if found is None else found


def integer_matmul(
    x: Float[Array, "*lead K"], q: QTensor, act_quant: ActQuant
) -> Float[Array, "*lead N"]:
    """Returns the product, one dot per segment of K, inside which both operands have one scale.

    Elements that int8 holds (integers, E2M1) are summed in int32, others in float32; the sum is
    then multiplied by both scales and added up in float32. The weights are unpacked one segment at
    a time. A token that holds NaN or infinity gives NaN. Very many tokens are multiplied block by block, see
    `in_token_blocks`.
    """
    found = in_token_blocks(lambda x: all_segments(x, q, act_quant), x, act_quant, q.shape[-1])
    return all_segments(x, q, act_quant) if found is None else found


def all_segments(
    x: Float[Array, "*lead K"], q: QTensor, act_quant: ActQuant
) -> Float[Array, "*lead N"]:
    """Returns `integer_matmul` of all tokens at once."""
    dtype, (num_channels, width) = x.dtype, q.shape
    spec = act_quant.spec
    shift = spec.shift if spec.fmt is None else 0.0
    cuts = segments(num_channels, spec.group_size, q.product_group_size)
    x = x.astype(jnp.float32) + shift
    exact = jnp.promote_types(element_dtype(spec.fmt), element_dtype(q.fmt))
    acts = act_operand(x, act_quant, exact, cuts)
    weights = weight_operand(q, exact, cuts)

    stacked = (acts.stacked, weights.stacked, cuts.members)

    def elements(act: ActSegment, weight: WeightSegment) -> tuple[Elements, Elements]:
        return acts.segment(act), weights.segment(weight)

    def scaled(
        operands: tuple[Elements, Elements], members: Int[AnyArray, ""]
    ) -> tuple[Float[Array, "T N"], Float[Array, "1 N"] | None]:
        (left, zx, sx), (right, zw, sw) = operands
        product = dot_of_differences(left, zx, right, zw, members)
        sums = channel_sums(right, zw, members).astype(jnp.float32) * sw if shift else None
        return product.astype(jnp.float32) * sx * sw, None if sums is None else sums[None]

    def add_segment(
        total: Float[Array, "T N"], one: tuple[ActSegment, WeightSegment, AnyArray]
    ) -> tuple[Float[Array, "T N"], Float[Array, "1 N"] | None]:
        act, weight, members = one
        more, sums = scaled(elements(act, weight), members)
        return total + more, sums

    if len(cuts.members) == 1:
        act, weight, members = jax.tree.map(lambda values: jnp.squeeze(values, 0), stacked)
        total, weight_sums = scaled(made_before(elements(act, weight)), members)
    else:
        total = jnp.zeros((x.size // num_channels, width), jnp.float32)
        total, weight_sums = jax.lax.scan(add_segment, total, stacked)
    if weight_sums is not None:
        total = total - shift * jnp.sum(weight_sums, axis=0)
    # Integer codes cannot represent NaN or infinity, and calibrated scales do not show them.
    is_finite = jnp.all(jnp.isfinite(x), axis=-1)[..., None]
    return jnp.where(is_finite, total.reshape(*x.shape[:-1], width), jnp.nan).astype(dtype)


def made_before(operands: tuple[Elements, Elements]) -> tuple[Elements, Elements]:
    """Returns the operands of a product, made before it on GPUs.

    XLA for GPUs fuses the quantizer with what scales the sums otherwise, and writes float32 copies of both. That for
    TPUs fuses it into the product, and XLA:CPU drops barriers. Zero points that are Python numbers stay so.
    """
    leaves, structure = jax.tree.flatten(operands)
    made = iter(held([leaf for leaf in leaves if isinstance(leaf, jax.Array)]))
    found = (next(made) if isinstance(leaf, jax.Array) else leaf for leaf in leaves)
    together: tuple[Elements, Elements] = jax.tree.unflatten(structure, found)
    return together


@jax.custom_jvp
def held(arrays: list[Array]) -> list[Array]:
    """Returns arrays behind a barrier on GPUs; tangents pass by it, for JAX 0.12 transposes none with integers."""
    hold = jax.lax.optimization_barrier
    found: list[Array] = jax.lax.platform_dependent(
        arrays, cuda=hold, rocm=hold, default=lambda arrays: arrays
    )
    return found


@held.defjvp
def _(primals: tuple[list[Array]], tangents: tuple[list[Any]]) -> tuple[list[Array], list[Any]]:
    return held(*primals), tangents[0]  # those of integers are NumPy arrays of JAX's `float0`


def dot_of_differences(
    left: Num[Array, "T L"],
    zx: Num[Array, "T 1"] | int | None,
    right: Num[Array, "N L"],
    zw: Num[Array, " N"] | int | None,
    members: Int[AnyArray, ""],
) -> Num[Array, "T N"]:
    """Returns `(left - zx) @ (right - zw).T` over the first `members` channels.

    `sum (cx - zx)(cw - zw) = sum cx cw - zx sum cw - zw sum (cx - zx)`. Zeros are integers, of
    integer operands only, or None; `left` is 0 in the channels after `members`. The sums are computed
    once per call, not once per token; stored beside the codes they would add 3 % to a 4-bit file.
    """
    product = dot(left, right)
    if zx is not None:
        product = product - zx * channel_sums(right, None, members)
    if zw is not None:
        row_sums = dot(left, jnp.ones((ONES, left.shape[1]), left.dtype))[:, :1]
        product = product - zw * (row_sums if zx is None else row_sums - members * zx)
    return product


def channel_sums(
    right: Num[Array, "N L"], zw: Num[Array, " N"] | int | None, members: Int[AnyArray, ""]
) -> Num[Array, " N"]:
    """Returns the sums of `right - zw` over the first `members` channels."""
    present = jnp.arange(right.shape[1], dtype=jnp.int32) < members
    ones = jnp.broadcast_to(present.astype(right.dtype), (ONES, right.shape[1]))
    sums = dot(ones, right)[0]
    return sums if zw is None else sums - members * zw


def dot(left: Num[Array, "T L"], right: Num[Array, "N L"]) -> Num[Array, "T N"]:
    """Returns the product, summed in int32 or float32."""
    whole = left.dtype == jnp.int8
    return by_rows(
        left,
        right,
        precision=None if whole else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.int32 if whole else jnp.float32,
    )


def by_rows(
    left: Num[Array, "*lead K"],
    right: Num[Array, "N K"],
    *,
    precision: jax.lax.Precision | None = None,
    preferred_element_type: DTypeLike | None = None,
) -> Num[Array, "*lead N"]:
    """Returns `left @ right.T`, the products of rows with rows."""
    contracted = ((left.ndim - 1,), (1,))
    return jax.lax.dot_general(
        left,
        right,
        (contracted, ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
