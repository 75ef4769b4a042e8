"""The derivative of kernels for integer numerics, which is that of XLA's product."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from qdit_jax.kernels.xla import integer_matmul
from qdit_jax.quant import ActQuant, ActSpec, QTensor


def with_derivative_of_xla(product_fn: Callable[..., Array]) -> Callable[..., Array]:
    """Returns `product_fn(x, q, spec, dtype, ...)` with the derivative of `xla.integer_matmul`.

    `spec` is the `ActSpec` of `x`, `dtype` the name of the result's; these and what follows are static.
    """
    count = len(inspect.signature(product_fn).parameters)
    derived = jax.custom_jvp(product_fn, nondiff_argnums=tuple(range(2, count)))

    @derived.defjvp
    def _(spec: ActSpec, dtype: str, *rest: Any) -> tuple[Array, Array]:
        *settings, primals, tangents = rest

        def by_xla(x: Array, q: QTensor) -> Array:
            return integer_matmul(x, q, ActQuant(spec)).astype(dtype)

        _, tangent = jax.jvp(by_xla, primals, tangents)
        return derived(*primals, spec, dtype, *settings), tangent

    return derived
