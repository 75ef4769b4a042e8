"""The derivative of kernels, which is that of XLA's product."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from qdit_jax.kernels.epilogue import finished
from qdit_jax.kernels.prologue import Modulated, plain
from qdit_jax.kernels.xla import integer_matmul, simulated_matmul
from qdit_jax.quant import ActQuant, ActSpec, QTensor


def with_derivative_of_xla(product_fn: Callable[..., Array]) -> Callable[..., Array]:
    """Returns `product_fn(x, q, bias, spec, dtype, activation, ...)` with the derivative of XLA's product.

    `spec` is the `ActSpec` of `x`, and None where `x` is not quantized; `dtype` is the name of the result's.
    From `spec` on all is static.
    """
    count = len(inspect.signature(product_fn).parameters)
    derived = jax.custom_jvp(product_fn, nondiff_argnums=tuple(range(3, count)))

    @derived.defjvp
    def _(
        spec: ActSpec | None, dtype: str, activation: str | None, *rest: Any
    ) -> tuple[Array, Array]:
        *settings, primals, tangents = rest

        def by_xla(x: Array | Modulated, q: QTensor, bias: Array | None) -> Array:
            x = plain(x)
            sums = (
                simulated_matmul(x, q, None)
                if spec is None
                else integer_matmul(x, q, ActQuant(spec))
            )
            return finished(sums.astype(dtype), bias, activation)

        _, tangent = jax.jvp(by_xla, primals, tangents)
        return derived(*primals, spec, dtype, activation, *settings), tangent

    return derived
