"""Kernels in the form in which a loop runs: with what each of its steps would compute of them."""

from __future__ import annotations

from qdit_jax.kernels.matmul import checked_platform, first_that_fits
from qdit_jax.kernels.product import Product, invalid_reason
from qdit_jax.kernels.table import IMPLEMENTATIONS
from qdit_jax.quant import ActQuant, QTensor


def ready(
    q: QTensor,
    act: ActQuant | None,
    numerics: str,
    implementation: str | None = None,
    *,
    platform: str | None = None,
    dtype: str = "float32",
) -> QTensor:
    """Returns the same kernel as who computes its products has it in a loop.

    Every product gives the same, to the bit. A kernel that nobody can compute, or of stacked layers, stays as it is;
    arguments are those of `quantized_matmul`, `platform` one of `PLATFORMS`, by default JAX's.

    Raises:
        ValueError: for an unknown platform or implementation.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not known.")
    product = Product((1, q.shape[0]), q, act, numerics, checked_platform(platform), dtype)
    if len(q.codes.shape) != 2 or invalid_reason(product) is not None:
        return q
    entry = first_that_fits(product) if implementation is None else IMPLEMENTATIONS[implementation]
    return q if entry.ready_fn is None else entry.ready_fn(q, product.act_spec)
