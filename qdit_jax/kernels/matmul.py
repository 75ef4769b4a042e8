"""`quantized_matmul`: one product, one meaning, several executions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qdit_jax.kernels import xla
from qdit_jax.quant import ActQuant, ActSpec, QTensor, WeightSpec, branches

Execution = Literal["simulated", "integer"]
EXECUTIONS = ("simulated", "integer")


def unsupported_reason(
    x_shape: tuple[int, ...],
    weight: QTensor | WeightSpec,
    act: ActSpec | ActQuant | None = None,
    *,
    execution: str = "simulated",
) -> str | None:
    """Returns why the product cannot run this way, one sentence, or None if it can.

    Only shapes and settings are looked at, so abstract arrays will do.
    """
    if execution not in EXECUTIONS:
        return f"execution={execution!r} is not known; use one of {', '.join(EXECUTIONS)}."
    if isinstance(weight, QTensor) and x_shape[-1] != weight.shape[0]:
        return f"x has {x_shape[-1]} channels, but the kernel has {weight.shape[0]}."
    if isinstance(act, ActSpec) and act.mode == "static":
        return "a static ActSpec needs calibrated scales; pass an ActQuant that has them."
    if isinstance(act, ActQuant) and act.is_table:
        return (
            "the static scales are a table with a row a timestep; pick one with "
            "`select_timestep(params, timestep)`, as the sampler's denoiser does, or `at(index)`."
        )
    if execution == "integer" and act is None:
        return "integer execution needs quantised activations; pass act_quant."
    return None


def quantized_matmul(
    x: Float[Any, "*lead K"],
    q: QTensor,
    act_quant: ActQuant | ActSpec | None = None,
    *,
    execution: Execution | str = "simulated",
) -> Float[Array, "*lead N"]:
    """Returns `x @ q` `[*lead, N]` in the dtype of `x`, with `x` quantised as `act_quant` says.

    Args:
        x: floating point; any leading axes.
        q: the kernel `[K, N]`.
        act_quant: None leaves `x` as it is; an `ActSpec` quantises it dynamically; an `ActQuant`
            may carry calibrated scales.
        execution: "simulated" is float arithmetic on the quantised grid, what papers measure;
            "integer" multiplies the stored elements and scales their sums, what hardware runs:
            int8 dots with int32 accumulators for integers, FP4 and mixtures of these; dots of
            bfloat16 with FP8 elements and of float32 with NF4's, which hold them exactly, summed
            in float32. They agree to float rounding.

    Raises:
        ValueError: with the sentence of `unsupported_reason`.
    """
    reason = unsupported_reason(x.shape, q, act_quant, execution=execution)
    if reason is not None:
        raise ValueError(reason)
    act = ActQuant(act_quant) if isinstance(act_quant, ActSpec) else act_quant
    return _matmul(x, q, act, execution)


def _matmul_traced(x: Any, q: QTensor, act: ActQuant | None, execution: str) -> Any:
    if x.size == 0:
        return jnp.zeros((*x.shape[:-1], q.shape[1]), x.dtype)
    product = xla.integer_matmul if execution == "integer" else xla.simulated_matmul
    return jax.lax.platform_dependent(
        x, q, act, cpu=partial(in_its_turn, product), default=partial(together, product)
    )


_matmul = jax.jit(_matmul_traced, static_argnums=3)


def together(product: Callable, x: Any, q: QTensor, act_quant: Any) -> Any:
    """Returns `product(x, q, act_quant)`, the weights of which wait for `x`.

    XLA for GPUs and TPUs keeps barriers until its work is in order; without this one it may
    dequantise many layers ahead.
    """
    return product(*jax.lax.optimization_barrier((x, q)), act_quant)


def in_its_turn(product: Callable, x: Any, q: QTensor, act_quant: Any) -> Any:
    """Returns `product(x, q, act_quant)`, nothing of it computed before `x` is.

    XLA:CPU would unpack the weights of many layers long before their products, and the whole model
    would lie in memory; see `branches`.
    """

    def nothing(x: Any, q: QTensor, act_quant: Any) -> Any:
        edge = 0 * (x[..., :1] + q.scale.astype(x.dtype).reshape(-1)[:1])
        return jnp.broadcast_to(edge, (*x.shape[:-1], q.shape[1]))

    return jax.lax.cond(branches.always(x), product, nothing, x, q, act_quant)
