"""Reads or changes the inputs of a network's layers while it runs.

Everything here is used inside a jitted function: inputs that are not used are never in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jaxtyping import Array

from qdit_jax.kernels import AttentionShapes, call_shapes, checked_mask
from qdit_jax.models.family import OPERANDS_OF, Network, example_inputs
from qdit_jax.models.layers import AttentionModule
from qdit_jax.models.linear import Linear, mapped_input, quantized_input
from qdit_jax.types import Params

# (path, layer, input, call) -> output, where `call()` is what the layer itself would return.
LayerFn = Callable[[str, Linear, Array, Callable[[], Array]], Array]
# (path, value) of an operand of an attention product, such as `blocks_0/attn/operands/q`.
OperandFn = Callable[[str, Array], None]


@contextmanager
def tapped(layer_fn: LayerFn, operand_fn: OperandFn | None = None) -> Iterator[None]:
    """Calls `layer_fn` in place of every linear layer while the context lasts.

    A network that chooses among experts by the timestep runs all of them, for what `layer_fn` sees
    could not leave a branch. To watch an expert on its own timesteps, run it alone (`expert_alone`).
    """

    def intercept(
        next_fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> object:
        module = context.module
        if isinstance(module, Linear) and context.method_name == "__call__":
            call = partial(next_fn, *args, **kwargs)
            return layer_fn("/".join(module.path), module, args[0], call)
        if operand_fn is not None and context.method_name == "operand":
            name, x = args
            operand_fn(f"{'/'.join(module.path)}{OPERANDS_OF}{name}", x)
        if operand_fn is not None and context.method_name == "sees_weights":
            return True
        if context.method_name in ("runs_all_experts", "is_watched"):
            return True
        return next_fn(*args, **kwargs)

    with nn.intercept_methods(intercept):
        yield


@contextmanager
def seen_inputs(
    seen_fn: Callable[[str, Array], None],
    *,
    quantized: bool = False,
    operand_fn: OperandFn | None = None,
) -> Iterator[None]:
    """Calls `seen_fn` with every layer's path and input while the context lasts.

    `quantized` passes the input through the layer's own input leaves and activation quantizer
    first, which is what its kernel is multiplied with.
    """

    def look(path: str, module: Linear, x: Array, call: Callable[[], Array]) -> Array:
        seen_fn(path, quantized_input(module, mapped_input(module, x)) if quantized else x)
        return call()

    with tapped(look, operand_fn):
        yield


def layers_in_order(apply: Callable[..., Any], *args: object) -> list[str]:
    """Returns the paths of the layers in the order in which `apply(*args)` first runs them.

    Nothing is computed; arguments may be abstract.
    """
    paths: list[str] = []
    with seen_inputs(lambda path, x: paths.append(path)):
        jax.eval_shape(apply, *args)
    return list(dict.fromkeys(paths))


class AttentionCall(NamedTuple):
    """The shapes of an attention's operands `[G, positions, H, D]`, G of them for one sample."""

    query: tuple[int, int, int, int]
    key: tuple[int, int, int, int]
    value: tuple[int, int, int, int]


def attention_calls(
    model: Network, inputs: tuple[Any, ...] | None = None
) -> tuple[AttentionCall, ...]:
    """Returns the attentions of one sample, in their order, from a trace of the network.

    Args:
        inputs: as of `rows_per_sample`.
    """
    found: list[AttentionCall] = []
    held: dict[str, tuple[int, ...]] = {}

    def look(path: str, x: Array) -> None:
        *_, name = path.split(OPERANDS_OF)
        held[name] = (math.prod(x.shape[:-3]), *x.shape[-3:])
        if name == "v":
            found.append(AttentionCall(held["q"], held["k"], held["v"]))  # type: ignore[arg-type]

    inputs = example_inputs(model) if inputs is None else inputs
    with tapped(lambda path, layer, x, call: call(), look):
        jax.eval_shape(model.init, jax.random.key(0), *inputs)  # type: ignore[attr-defined]
    return tuple(found)


def attention_shapes(
    model: Network, params: Params, inputs: tuple[Any, ...] | None = None
) -> tuple[AttentionShapes, ...]:
    """Returns the attentions of one sample as who computes them sees them, in their order.

    Args:
        params: whose quantizers of operands make these wide; arrays may be abstract.
        inputs: as of `rows_per_sample`.
    """
    flat, found = flatten_dict(params, sep="/"), []

    def look(path: str, q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
        one, other, third = ((math.prod(a.shape[:-3]), *a.shape[-3:]) for a in (q, k, v))
        wide = ["float32" for name in "qkv" if f"{path}/{name}_quant" in flat]
        dtype = jnp.result_type(*(a.dtype for a in (q, k, v)), *wide).name
        wide_mask = None if mask is None else checked_mask(mask, one, other)
        is_seen = f"{path}/softmax_quant" in flat
        found.append(call_shapes(one, other, third, wide_mask, is_seen, dtype))
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), v.dtype)

    def intercept(
        next_fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> object:
        module = context.module
        if isinstance(module, AttentionModule) and context.method_name == "attend":
            return look("/".join(module.path), *args, **kwargs)
        return next_fn(*args, **kwargs)

    inputs = example_inputs(model) if inputs is None else inputs
    with nn.intercept_methods(intercept):
        jax.eval_shape(model.init, jax.random.key(0), *inputs)  # type: ignore[attr-defined]
    return tuple(found)


def rows_per_sample(model: Network, inputs: tuple[Any, ...] | None = None) -> dict[str, int]:
    """Returns how many rows one sample has in every layer, from a trace of the network.

    The rows of all calls of a layer are added.

    Args:
        inputs: abstract arguments of a call with one sample, of another size or text than the network's example;
            see `example_inputs`.
    """
    rows: dict[str, int] = {}

    def count(path: str, x: Array) -> None:
        rows[path] = rows.get(path, 0) + math.prod(x.shape[:-1])

    inputs = example_inputs(model) if inputs is None else inputs
    with seen_inputs(count):
        jax.eval_shape(model.init, jax.random.key(0), *inputs)  # type: ignore[attr-defined]
    return rows
