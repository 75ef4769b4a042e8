"""Attention by cuDNN on NVIDIA GPUs: 16-bit operands, no array of all weights in memory.

Dimensions: B batch, Q and T query and key positions, H heads, D channels of a head.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qdit_jax.kernels.attention_call import AttentionImplementation, AttentionShapes, WeightsFn
from qdit_jax.types import AnyArray

MOST_CHANNELS = 128
LEAST_CAPABILITY = 8.0  # Ampere


def cudnn_attention(
    q: Float[AnyArray, "B Q H D"],
    k: Float[AnyArray, "B T H D"],
    v: Float[AnyArray, "B T H D"],
    mask: Bool[AnyArray, "_ _ _ T"] | None,
    scale: float,
    weights_fn: WeightsFn | None,
) -> Float[Array, "B Q H D"]:
    """Returns attention by cuDNN, through `jax.nn.dot_product_attention`."""
    wide = None
    if mask is not None:
        # cuDNN reads one mask for all samples or heads where it is the same; queries have to be there.
        wide = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], k.shape[1]))
    found = jax.nn.dot_product_attention(q, k, v, mask=wide, scale=scale, implementation="cudnn")
    if mask is None:
        return found
    may_look = jnp.swapaxes(mask.any(axis=-1, keepdims=True), 1, 2)  # [B, Q, H, 1]
    return jnp.where(may_look, found, 0)


def cudnn_reason(shapes: AttentionShapes) -> str | None:
    """Returns why cuDNN cannot compute a call, one sentence, or None if it can."""
    width = shapes.q_shape[-1]
    if shapes.platform != "cuda":
        return "it runs on NVIDIA GPUs only."
    if shapes.sees_weights:
        return "it never holds the softmax, which is rounded or recorded here."
    if shapes.dtype not in ("bfloat16", "float16"):
        return f"it takes 16-bit operands, and these are {shapes.dtype}."
    if width % 8 or width > MOST_CHANNELS or shapes.v_width not in (None, width):
        return f"it takes heads of at most {MOST_CHANNELS} channels that 8 divides, one width."
    capability = present_capability()
    if capability is not None and capability < LEAST_CAPABILITY:
        return f"this GPU has compute capability {capability}; it needs {LEAST_CAPABILITY}."
    return missing_library()


@functools.cache
def missing_library() -> str | None:
    """Returns why JAX cannot trace a call of cuDNN here, one sentence, or None if it can."""
    one = jax.ShapeDtypeStruct((1, 8, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(lambda x: cudnn_attention(x, x, x, None, 1.0, None), one)
    except (RuntimeError, NotImplementedError) as error:
        return f"JAX cannot use cuDNN here: {error}"
    return None


def present_capability() -> float | None:
    """Returns the compute capability of JAX's first device; None if it is no NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        return None
    found = getattr(jax.devices()[0], "compute_capability", "")
    return float(found) if str(found).replace(".", "", 1).isdigit() else None


CUDNN = AttentionImplementation("cudnn", cudnn_attention, cudnn_reason)
