"""The derivative of kernels, which is that of XLA's product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from qdit_jax.kernels.call import Call
from qdit_jax.kernels.epilogue import Gated, finished, followed
from qdit_jax.kernels.prologue import Pending, plain
from qdit_jax.kernels.xla import integer_matmul, simulated_matmul
from qdit_jax.quant import ActQuant, QTensor


def with_derivative_of_xla(
    product_fn: Callable[..., tuple[Array, ...]],
) -> Callable[..., tuple[Array, ...]]:
    """Returns `product_fn(x, q, bias, gated, call)` with the derivative of XLA's product."""
    derived = jax.custom_jvp(product_fn, nondiff_argnums=(4,))

    @derived.defjvp
    def _(call: Call, primals: Any, tangents: Any) -> tuple[Any, Any]:
        def by_xla(
            x: Array | Pending, q: QTensor, bias: Array | None, gated: Gated | None
        ) -> tuple[Array, ...]:
            x = plain(x)
            if call.spec is None:
                sums = simulated_matmul(x, q, None)
            else:
                sums = integer_matmul(x, q, ActQuant(call.spec))
            y = finished(sums.astype(call.dtype), bias, call.activation)
            return followed(y, gated, call.parts)

        _, tangent = jax.jvp(by_xla, primals, tangents)
        return derived(*primals, call), tangent

    found: Callable[..., tuple[Array, ...]] = derived
    return found
