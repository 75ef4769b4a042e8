"""Looking at, or changing, what goes into a network's layers while it runs.

Everything here is used inside the function that is jitted: what is not used of a tap is never held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
from flax import linen as nn

from qdit_jax.models.family import OPERANDS_OF, Network, example_inputs
from qdit_jax.models.layers import Linear, optional

# (path, layer, input, call) -> output, where `call()` is what the layer itself would return.
LayerFn = Callable[[str, nn.Module, Any, Callable[[], Any]], Any]
# (path, value) of an operand of an attention product, such as `blocks_0/attn/operands/q`.
OperandFn = Callable[[str, Any], None]


@contextmanager
def tapped(layer_fn: LayerFn, operand_fn: OperandFn | None = None) -> Iterator[None]:
    """Has `layer_fn` stand in for the call of every linear layer while the context lasts."""

    def intercept(next_fn: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if isinstance(module, Linear) and context.method_name == "__call__":
            call = partial(next_fn, *args, **kwargs)
            return layer_fn("/".join(module.path), module, args[0], call)
        if operand_fn is not None and context.method_name == "operand":
            name, x = args
            operand_fn(f"{'/'.join(module.path)}{OPERANDS_OF}{name}", x)
        return next_fn(*args, **kwargs)

    with nn.intercept_methods(intercept):
        yield


@contextmanager
def seen_inputs(
    seen_fn: Callable[[str, Any], None],
    *,
    quantized: bool = False,
    operand_fn: OperandFn | None = None,
) -> Iterator[None]:
    """Calls `seen_fn` with every layer's path and input while the context lasts.

    `quantized` passes the input through the layer's own activation quantizer first, which is what
    its kernel is multiplied with.
    """

    def look(path: str, module: nn.Module, x: Any, call: Callable[[], Any]) -> Any:
        quantizer = optional(module, "act_quant") if quantized else None
        seen_fn(path, x if quantizer is None else quantizer(x))
        return call()

    with tapped(look, operand_fn):
        yield


def layers_in_order(apply: Callable[..., Any], *args: Any) -> list[str]:
    """Returns the paths of the layers in the order in which `apply(*args)` first runs them.

    Nothing is computed; abstract arguments will do.
    """
    paths: list[str] = []
    with seen_inputs(lambda path, x: paths.append(path)):
        jax.eval_shape(apply, *args)
    return list(dict.fromkeys(paths))


def rows_per_sample(model: Network) -> dict[str, int]:
    """Returns how many rows one sample sends through every layer, counted by the network itself.

    A layer that is called several times counts all of them.
    """
    rows: dict[str, int] = {}

    def count(path: str, x: Any) -> None:
        rows[path] = rows.get(path, 0) + math.prod(x.shape[:-1])

    inputs = example_inputs(model)
    with seen_inputs(count):
        jax.eval_shape(model.init, jax.random.key(0), *inputs)  # type: ignore[attr-defined]
    return rows
