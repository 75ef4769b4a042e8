"""How much of a layer's output is lost when input and kernel are rounded in other coordinates.

Dimensions: M rows, K input channels, N output channels, C candidates.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qdit_jax.quant import (
    ActQuant,
    ActSpec,
    Rotation,
    WeightSpec,
    dequantize,
    grid_of_limits,
    map_groups,
    quantize_array,
)
from qdit_jax.recipes import LayerSpec

HIGHEST = jax.lax.Precision.HIGHEST


@partial(jax.jit, static_argnames="spec")
def output_errors(
    rows: Float[Array, "M K"],
    kernel: Float[Array, "K N"],
    scales: Float[Array, "C K"],
    shift: Float[Array, " K"],
    rotation: Rotation | None,
    *,
    spec: LayerSpec,
) -> Float[Array, " C"]:
    """Returns, per candidate, the squared error of the layer's output on `rows`, summed.

    Both operands are rounded to nearest as `spec` says, in the coordinates of the candidate:
    `((x - shift) / scale) R`. One candidate at a time is in memory.
    """
    exact = jnp.matmul(rows - shift, kernel, precision=HIGHEST)

    def squared_error(scale: Float[Array, " K"]) -> Float[Array, ""]:
        x, w = (rows - shift) / scale, kernel * scale[:, None]
        if rotation is not None:
            x, w = rotation(x), rotation.of_kernel(w)
        found = jnp.matmul(rounded_rows(x, spec.act), rounded_kernel(w, spec.weight))
        return jnp.sum(jnp.square(found - exact))

    return jax.lax.map(squared_error, scales)


def rounded_kernel(kernel: Float[Array, "K N"], spec: WeightSpec | None) -> Float[Array, "K N"]:
    """Returns the values of the kernel rounded to nearest."""
    return kernel if spec is None else dequantize(quantize_array(kernel, spec))


def rounded_rows(x: Float[Array, "M K"], spec: ActSpec | None) -> Float[Array, "M K"]:
    """Returns the values of rounded inputs; a static range is that of the rows themselves."""
    if spec is None:
        return x
    return (ActQuant(spec) if spec.mode == "dynamic" else static_quantizer(x, spec))(x)


def static_quantizer(x: Float[Array, "M K"], spec: ActSpec) -> ActQuant:
    """Returns the static quantizer of all rows, one range for all timesteps."""
    symmetric = spec.symmetric and not spec.unsigned

    def limits(members: Float[Array, "G S M"]) -> tuple[Array, Array]:
        flat = members.reshape(members.shape[0], -1)
        low, high = spec.range_fn.limits(flat, spec.bits, symmetric, 1)
        return low[:, None], high[:, None]

    low, high = map_groups(limits, x.T + spec.shift, spec.group_size)
    plain = dataclasses.replace(spec, per_timestep=False)
    return ActQuant(plain, *grid_of_limits(low[:, 0], high[:, 0], plain))
