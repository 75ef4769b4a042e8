"""The derivative of kernels, which is that of XLA's product."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from qdit_jax.kernels.epilogue import Gated, finished, followed
from qdit_jax.kernels.prologue import Pending, plain
from qdit_jax.kernels.xla import integer_matmul, simulated_matmul
from qdit_jax.quant import ActQuant, ActSpec, QTensor


def with_derivative_of_xla(product_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `product_fn(x, q, bias, gated, spec, dtype, activation, ...)` with the derivative of XLA's product.

    `spec` is the `ActSpec` of `x`, and None where `x` is not quantized; `dtype` is the name of the result's.
    From `spec` on all is static. It returns a tuple, of `parts` arrays if that is an argument, see `fused_matmul`.
    """
    names = list(inspect.signature(product_fn).parameters)
    first = names.index("spec")
    derived = jax.custom_jvp(product_fn, nondiff_argnums=tuple(range(first, len(names))))

    @derived.defjvp
    def _(spec: ActSpec | None, *rest: Any) -> tuple[Any, Any]:
        *settings, primals, tangents = rest
        named = dict(zip(names[first + 1 :], settings, strict=True))

        def by_xla(x: Array | Pending, q: QTensor, bias: Array | None, gated: Gated | None) -> Any:
            x = plain(x)
            sums = (
                simulated_matmul(x, q, None)
                if spec is None
                else integer_matmul(x, q, ActQuant(spec))
            )
            y = finished(sums.astype(named["dtype"]), bias, named["activation"])
            return followed(y, gated, named.get("parts", 1))

        _, tangent = jax.jvp(by_xla, primals, tangents)
        return derived(*primals, spec, *settings), tangent

    return derived
