"""How the table calls a kernel: with arrays, and with what is static in one object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from qdit_jax.kernels.epilogue import Gated
from qdit_jax.kernels.prologue import Pending
from qdit_jax.quant import ActQuant, ActSpec, QTensor


class Call(NamedTuple):
    """What is static of a product and its neighbors.

    Attributes:
        spec: of the inputs; None where they are not quantized.
        dtype: of the result.
        activation: of the result, see `epilogue.activated`.
        parts: arrays that the output channels are split among.
        tiles: how a kernel cuts the product, `gpu_tiles.Tiles` or `tpu_blocks.Tiles`; None chooses.
        interpret: what runs a kernel on a CPU, slowly: `InterpretGPUParams` of Pallas, of a TPU's also True.
    """

    # Any: blocks and parameters of one platform or the other.
    spec: ActSpec | None
    dtype: str
    activation: str | None = None
    parts: int = 1
    tiles: Any = None
    interpret: Any = None


def fused_of(
    product_fn: Callable[..., tuple[Array, ...]],
) -> Callable[..., tuple[Array, ...]]:
    """Returns the function that a row of the table calls as `run_fused`.

    Args:
        product_fn: `(x, q, bias, gated, call) -> ` the parts of a product and of what comes before and after it.
    """

    def fused(
        x: Float[Array, "*lead K"] | Pending,
        q: QTensor,
        act: ActQuant | None,
        dtype: str,
        bias: Float[Array, " N"] | None = None,
        activation: str | None = None,
        gated: Gated | None = None,
        parts: int = 1,
        **settings: Any,
    ) -> tuple[Float[Array, "*lead M"], ...]:
        """Returns the parts of what `fused_matmul` computes; `settings` are the last ones of `Call`."""
        spec = None if act is None else act.spec
        return product_fn(x, q, bias, gated, Call(spec, dtype, activation, parts, **settings))

    return fused


def matmul_of(fused_fn: Callable[..., tuple[Array, ...]]) -> Callable[..., Array]:
    """Returns the function that a row of the table calls as `run` and `run_to`."""

    def matmul(
        x: Float[Array, "*lead K"],
        q: QTensor,
        act: ActQuant | None,
        numerics: str,
        dtype: str | None = None,
        bias: Float[Array, " N"] | None = None,
        activation: str | None = None,
        **settings: Any,
    ) -> Float[Array, "*lead N"]:
        """Returns `activation(act(x) @ q + bias)`, in `dtype`, by default that of `x`."""
        (y,) = fused_fn(x, q, act, dtype or x.dtype.name, bias, activation, **settings)
        return y

    return matmul
