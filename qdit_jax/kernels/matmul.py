"""`quantized_matmul`: one product, one meaning, several executions."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qdit_jax.kernels import xla
from qdit_jax.quant import ActQuant, ActSpec, QTensor, WeightSpec

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
    spec = act.spec if isinstance(act, ActQuant) else act
    if isinstance(act, ActSpec) and act.mode == "static":
        return "a static ActSpec needs calibrated scales; pass an ActQuant that has them."
    if isinstance(act, ActQuant) and act.is_table:
        return (
            "the static scales are a table with a row a timestep; pick one with "
            "`select_timestep(params, timestep)`, as the sampler's denoiser does, or `at(index)`."
        )
    if execution == "integer":
        if spec is None:
            return "integer execution needs quantised activations; pass act_quant."
        if weight.fmt is not None or spec.fmt is not None:
            return "integer execution needs integer codes; run number formats as 'simulated'."
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
            "integer" is int8 dots with int32 accumulators, what hardware runs. They agree to
            float rounding.

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
    if execution == "integer":
        assert act is not None  # unsupported_reason has seen to it
        return xla.integer_matmul(x, q, act)
    return xla.simulated_matmul(x, q, act)


_matmul = jax.jit(_matmul_traced, static_argnums=3)
