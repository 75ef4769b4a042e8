"""Activation quantizers that gradients pass through, for learning behind them.

Rounding has no gradient. Here it counts as the identity (a straight-through estimate), inside the
range of a static quantizer; beyond it, the input has no effect and the step size has (LSQ,
arXiv:1902.08153).

Dimensions: K channels.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qdit_jax.quant.act import ActQuant, code_limits, codes_of, expand_to_channels, values_of

Node = TypeVar("Node")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StraightThrough:
    """Stands in the place of an activation quantizer beside a kernel in full precision."""

    quantizer: ActQuant

    def __call__(self, x: Float[Array, "*lead K"]) -> Float[Array, "*lead K"]:
        """Returns what the quantizer returns, to float rounding, in the dtype of `x`."""
        spec = self.quantizer.spec
        if spec.mode == "dynamic":
            return x + jax.lax.stop_gradient(self.quantizer(x) - x)
        shifted = x.astype(jnp.float32) + spec.shift
        scale, zero_point = self.quantizer.grid(shifted)
        steps = shifted / expand_to_channels(scale, x.shape[-1], spec.group_size)
        if zero_point is not None:
            steps = steps + expand_to_channels(zero_point, x.shape[-1], spec.group_size)
        inside = jnp.clip(steps, *code_limits(spec))
        codes = codes_of(shifted, scale, zero_point, spec)
        codes = inside + jax.lax.stop_gradient(codes - inside)
        return values_of(codes, scale, zero_point, spec).astype(x.dtype)


def straight_through(node: Node) -> Node | StraightThrough:
    """Returns a quantizer that gradients pass through; anything else as it is."""
    return StraightThrough(node) if isinstance(node, ActQuant) else node
