"""The XLA implementations: one arithmetic, with weights dequantized no earlier than their input.

Dequantized weights depend on parameters only, so a compiler may compute those of many layers before
the first layer runs and hold the whole model in memory. How to prevent it differs by platform.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qdit_jax.kernels import xla
from qdit_jax.kernels.product import Implementation, Product
from qdit_jax.quant import ActQuant, QTensor, true_after


def xla_product(
    x: Float[Array, "*lead K"], q: QTensor, act: ActQuant | None, numerics: str
) -> Float[Array, "*lead N"]:
    """Returns the product in the order that the compiler chooses."""
    if numerics == "integer":
        assert act is not None  # `invalid_reason` refuses it
        return xla.integer_matmul(x, q, act)
    return xla.simulated_matmul(x, q, act)


def with_barrier(
    x: Float[Array, "*lead K"], q: QTensor, act: ActQuant | None, numerics: str
) -> Float[Array, "*lead N"]:
    """Returns the product, its weights behind an optimization barrier that waits for `x`.

    XLA for GPUs and TPUs keeps barriers until it has scheduled its operations.
    """
    x, q = jax.lax.optimization_barrier((x, q))
    return xla_product(x, q, act, numerics)


def after_input(
    x: Float[Array, "*lead K"], q: QTensor, act: ActQuant | None, numerics: str
) -> Float[Array, "*lead N"]:
    """Returns the product, no part of which is computed before `x`.

    XLA:CPU drops barriers before it schedules its operations, but keeps branches, see `branches`.
    """

    def product(
        x: Float[Array, "*lead K"], q: QTensor, act: ActQuant | None
    ) -> Float[Array, "*lead N"]:
        return xla_product(x, q, act, numerics)

    def zeros(
        x: Float[Array, "*lead K"], q: QTensor, act: ActQuant | None
    ) -> Float[Array, "*lead N"]:  # never taken
        edge = 0 * (x[..., :1] + q.scale.astype(x.dtype).reshape(-1)[:1])
        return jnp.broadcast_to(edge, (*x.shape[:-1], q.shape[1]))

    return jax.lax.cond(true_after(x), product, zeros, x, q, act)


def cpu_only(product: Product) -> str | None:
    if product.platform == "cpu":
        return None
    return f"xla_cpu orders the work of XLA:CPU, not of {product.platform}; use 'xla'."


def anything(product: Product) -> None:
    """Returns None: plain XLA computes every product on every platform."""
    return None


XLA_CPU = Implementation("xla_cpu", after_input, cpu_only)
XLA = Implementation("xla", with_barrier, anything)
