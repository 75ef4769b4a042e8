"""Attention by JAX's splash kernel on TPUs: no array of all weights in memory.

Dimensions: B batch, Q and T query and key positions, H heads, D channels of a head.
"""

from __future__ import annotations

from importlib.util import find_spec

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qdit_jax.kernels.attention_call import AttentionImplementation, AttentionShapes, WeightsFn
from qdit_jax.kernels.level_reasons import split_reason
from qdit_jax.types import AnyArray

BLOCKS = (512, 256, 128)  # positions that are multiplied at once, the most first
KERNEL = "jax.experimental.pallas.ops.tpu.splash_attention"


def splash_attention(
    q: Float[AnyArray, "B Q H D"],
    k: Float[AnyArray, "B T H D"],
    v: Float[AnyArray, "B T H D"],
    mask: Bool[AnyArray, "_ _ _ T"] | None,
    scale: float,
    weights_fn: WeightsFn | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B Q H D"]:
    """Returns attention by the splash kernel; `interpret` runs it on any platform, slowly."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    queries, keys = q.shape[1], k.shape[1]
    whole = masks.MultiHeadMask([masks.FullMask((queries, keys)) for _ in range(q.shape[2])])
    rows, columns = block_of(queries), block_of(keys)
    assert rows is not None, "splash_reason refuses such numbers"
    assert columns is not None, "splash_reason refuses such numbers"
    sizes = kernels.BlockSizes(block_q=rows, block_kv=columns, block_kv_compute=columns)
    attend = kernels.make_splash_mha(
        whole, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret
    )
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    heads_first = (jnp.swapaxes(a, 1, 2) for a in (scaled, k, v))
    return jnp.swapaxes(jax.vmap(attend)(*heads_first), 1, 2)


def block_of(positions: int) -> int | None:
    """Returns the largest block that divides a number of positions; None if none does."""
    return next((block for block in BLOCKS if positions % block == 0), None)


def splash_reason(shapes: AttentionShapes) -> str | None:
    """Returns why the splash kernel cannot compute a call, one sentence, or None if it can."""
    queries, keys = shapes.q_shape[1], shapes.k_shape[1]
    if shapes.platform != "tpu":
        return "it runs on TPUs only."
    if find_spec("libtpu") is None:
        return "libtpu is not installed."
    if find_spec(KERNEL) is None:
        return "this version of JAX has no splash kernel."
    if shapes.sees_weights:
        return "it never holds the softmax, which is rounded or recorded here."
    if shapes.dtype != "bfloat16":
        return f"it is used for bfloat16 operands, and these are {shapes.dtype}."
    if shapes.mask_shape is not None:
        return "it is used without a mask only."
    if shapes.v_width not in (None, shapes.q_shape[-1]):
        return "it takes keys and values of one width."
    if block_of(queries) is None or block_of(keys) is None:
        return f"{BLOCKS[-1]} divides its numbers of positions, and not {queries} and {keys}."
    return split_reason("tpu")


SPLASH = AttentionImplementation("splash", splash_attention, splash_reason)
