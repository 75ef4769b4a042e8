"""What rounding learns from a network's inputs: the order of its layers and their Hessians.

Dimensions: B batch, K input channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from qdit_jax.models import mapped_input, quantized_input
from qdit_jax.quant import accumulate_hessian

# `(path, input)` of a layer about to run; the input as the layer was given it.
SeenFn = Callable[[str, Any], None]


@contextmanager
def seen_inputs(seen_fn: SeenFn, layer_type: type[nn.Module], *, rounded: bool) -> Iterator[None]:
    """Calls `seen_fn` with every `layer_type`'s path and input while the context lasts.

    `rounded` passes the input through the layer's own input leaves and activation quantiser first,
    which is what its kernel is multiplied with. Use it inside the function that is jitted.
    """

    def record(next_fn: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        if isinstance(context.module, layer_type) and context.method_name == "__call__":
            module, x = context.module, args[0]
            seen = quantized_input(module, mapped_input(module, x)) if rounded else x
            seen_fn("/".join(module.path), seen)
        return next_fn(*args, **kwargs)

    with nn.intercept_methods(record):
        yield


def layers_in_order(
    apply: Callable[..., Any], layer_type: type[nn.Module], *args: Any
) -> list[str]:
    """Returns the paths of the layers in the order in which `apply(*args)` runs them.

    Nothing is computed; abstract arguments will do.
    """
    paths: list[str] = []
    with seen_inputs(lambda path, x: paths.append(path), layer_type, rounded=False):
        jax.eval_shape(apply, *args)
    return list(dict.fromkeys(paths))


def input_hessians(
    apply: Callable[[], Any],
    layer_type: type[nn.Module],
    hessians: dict[str, Any],
    weight: Float[Array, " B"],
) -> dict[str, Float[Array, "K K"]]:
    """Returns `hessians` with the float32 sums `weight x xᵀ` of one call's inputs added.

    Only the layers that `hessians` names are looked at; what they need not is never computed under
    jit. `weight` is one number a sample: 0 leaves a sample of the batch out.
    """
    found = dict(hessians)

    def add(path: str, x: Any) -> None:
        if path not in found:
            return
        rows = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
        rows = rows * jnp.sqrt(weight)[:, None, None]
        found[path] = accumulate_hessian(found[path], rows)

    with seen_inputs(add, layer_type, rounded=True):
        apply()
    return found


def empty_hessians(params_flat: dict[str, Any], paths: Sequence[str]) -> dict[str, jax.Array]:
    """Returns zeros `[K, K]` for every path."""
    sizes = {path: math.prod(params_flat[f"{path}/kernel"].shape[:-1]) for path in paths}
    return {path: jnp.zeros((size, size), jnp.float32) for path, size in sizes.items()}
