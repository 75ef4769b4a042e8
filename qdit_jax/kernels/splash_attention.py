"""Attention by JAX's splash kernel on TPUs: no array of all weights in memory.

Positions are filled up with zeros to whole blocks; no query sees the added keys, nor those that a mask leaves out:
they are a segment of their own.

Dimensions: B batch, Q and T query and key positions, H heads, D channels of a head.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qdit_jax.kernels.attention_call import AttentionImplementation, AttentionShapes, WeightsFn
from qdit_jax.kernels.level_reasons import split_reason
from qdit_jax.types import AnyArray

BLOCKS = (512, 256, 128)  # positions that are multiplied at once, the most first
MOST_WORK = 1.5  # of what the positions themselves need; few positions are left to XLA
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

    (queries, rows), (keys, columns) = (blocks_of(a.shape[1]) for a in (q, k))
    whole = masks.MultiHeadMask([masks.FullMask((queries, keys)) for _ in range(q.shape[2])])
    sizes = kernels.BlockSizes(block_q=rows, block_kv=columns, block_kv_compute=columns)
    attend = kernels.make_splash_mha(
        whole, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret
    )
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    operands = (heads_first(a, n) for a, n in ((scaled, queries), (k, keys), (v, keys)))
    if mask is None and keys == k.shape[1]:
        found = jax.vmap(attend)(*operands)
    else:
        # Queries, which are of segment 0, see the keys of theirs.
        hidden = hidden_keys(mask, k.shape[0], k.shape[1], keys)
        segments = kernels.SegmentIds(jnp.zeros((len(hidden), queries), jnp.int32), hidden)
        seeing = lambda ids, q, k, v: attend(q, k, v, segment_ids=ids)  # noqa: E731
        found = jax.vmap(seeing)(segments, *operands)
    found = jnp.swapaxes(found, 1, 2)[:, : q.shape[1]]
    return found if mask is None else jnp.where(jnp.any(mask, -1, keepdims=True), found, 0)


def hidden_keys(
    mask: Bool[AnyArray, "_ 1 1 T"] | None, batch: int, positions: int, padded: int
) -> Int[Array, "B padded"]:
    """Returns 1 for the keys that no query of a sample sees, 0 for the others."""
    seen = jnp.ones((batch, positions), bool)
    if mask is not None:
        seen &= mask[:, 0, 0]
    added = ((0, 0), (0, padded - positions))
    return 1 - jnp.pad(seen, added).astype(jnp.int32)


def heads_first(
    operand: Float[AnyArray, "B positions H D"], padded: int
) -> Float[Array, "B H padded D"]:
    """Returns an operand with its heads before its positions, and zeros after the last position."""
    added = padded - operand.shape[1]
    return jnp.pad(jnp.swapaxes(operand, 1, 2), ((0, 0), (0, 0), (0, added), (0, 0)))


def blocks_of(positions: int) -> tuple[int, int]:
    """Returns the number of positions that blocks fill, and the block: the largest that adds fewest."""
    filled = {block: -(-positions // block) * block for block in BLOCKS}
    block = min(BLOCKS, key=lambda block: (filled[block], -block))
    return filled[block], block


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
    if shapes.mask_shape is not None and shapes.mask_shape[1:3] != (1, 1):
        return "it takes masks of keys, and this one differs between heads or queries."
    if shapes.v_width not in (None, shapes.q_shape[-1]):
        return "it takes keys and values of one width."
    filled = [blocks_of(positions)[0] for positions in (queries, keys)]
    if math.prod(filled) > MOST_WORK * queries * keys:
        return (
            f"blocks of {BLOCKS[-1]} would make {queries} queries and {keys} keys {filled[0]} and "
            f"{filled[1]}: more than {MOST_WORK} times the work."
        )
    return split_reason("tpu")


SPLASH = AttentionImplementation("splash", splash_attention, splash_reason)
