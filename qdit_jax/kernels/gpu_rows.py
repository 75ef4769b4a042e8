"""Quantizing the tokens of a product in one pass, in a Pallas Mosaic GPU kernel.

XLA reads the inputs once for the greatest magnitude of each token and once for the codes, and several times
more where they come from a norm. Here a warpgroup has a token in registers: it normalizes and modulates it
where that comes first, scales its channels where a layer does (`InputMap`), finds its scale, and
writes the codes.

Compiled ahead of time for an H100, interpreted on CPU, not run on a GPU.

Dimensions: M tokens, K input channels, B samples.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Num

from qdit_jax.kernels.gpu_memory import loaded
from qdit_jax.kernels.operands import act_elements
from qdit_jax.kernels.prologue import (
    Before,
    Pending,
    before_of,
    norm_before,
    normalized,
    operands_of,
    plain,
    split_refs,
)
from qdit_jax.kernels.refs import Ref
from qdit_jax.kernels.token_scales import (
    INFINITY,
    divisor_of,
    elements_fn,
    magnitude_bits,
    stored_dtype,
)
from qdit_jax.quant import ActQuant, ActSpec, in_one_form

THREADS = 128  # of a warpgroup, which share a token
# Channels that its registers hold, of a token alone and of one that is modulated.
MOST_ALONE, MOST_MODULATED = 96 * THREADS, 48 * THREADS


def fits(x: Float[Array, "*lead K"] | Pending) -> bool:
    """Returns whether tokens can be quantized here."""
    num_channels = x.shape[-1]
    most = MOST_MODULATED if norm_before(x) else MOST_ALONE
    return num_channels % THREADS == 0 and num_channels <= most


def quantized_tokens(
    x: Float[Array, "*lead K"] | Pending, spec: ActSpec, num_rows: int, interpret: Any
) -> tuple[Num[Array, "M K"], Float[Array, " M"]]:
    """Returns what `quantized_rows` does; by XLA where a token does not fit into registers."""
    if fits(x):
        return quantized_rows(x, spec, num_rows, interpret=interpret)
    wide, act = plain(x).reshape(-1, x.shape[-1]).astype(jnp.float32), ActQuant(spec)
    if spec.fmt is None:
        codes, _, scale = act_elements(wide, act, jnp.dtype(jnp.int8))
    else:
        codes, scale = act.blocks(wide)
    is_finite = jnp.all(jnp.isfinite(wide), axis=-1)
    scale = jnp.where(is_finite, jnp.asarray(scale)[:, 0], jnp.nan)
    more = (0, num_rows - len(scale))
    elements = lax.bitcast_convert_type(jnp.pad(codes, (more, (0, 0))), stored_dtype(spec))
    return elements, jnp.pad(scale, more)


def quantized_rows(
    x: Float[Array, "*lead K"] | Pending, spec: ActSpec, num_rows: int, *, interpret: Any = None
) -> tuple[Num[Array, "M K"], Float[Array, " M"]]:
    """Returns the int8 or FP8 elements of tokens and their scales, NaN of a token that is not finite.

    Both have `num_rows` rows; those beyond the tokens are whatever was in memory.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    operands = operands_of(x)
    count, num_channels = operands[0].shape
    kernel = functools.partial(_kernel, spec=spec, before=before_of(x))
    codes = jax.ShapeDtypeStruct((num_rows, num_channels), stored_dtype(spec))
    scale = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    quantized: tuple[Array, Array] = plgpu.kernel(
        kernel,
        out_type=(codes, scale),
        grid=(count,),
        grid_names=("token",),
        cost_estimate=pl.CostEstimate(
            flops=20 * codes.size,
            transcendentals=0,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in operands) + codes.size,
        ),
        kernel_name="gpu_rows",
        interpret=interpret,
    )(*operands)
    return quantized


def _kernel(x: Ref, *refs: Ref, spec: ActSpec, before: Before) -> None:
    """Writes the codes and the scale of one token."""
    modulation, maps, (codes, scale) = split_refs(refs, before)
    token, num_channels = lax.axis_index("token"), x.shape[1]
    values = in_registers(x.at[token])
    if (norm := before.norm) is not None:
        parts = modulation[0].at[token // norm.tokens_per_sample]
        shift, factor = (
            in_registers(parts.at[pl.ds(part * num_channels, num_channels)])
            for part in (norm.shift, norm.scale)
        )
        values = normalized(values, norm.eps) * (1 + factor) + shift
    if maps:
        inverse_scale, *moved = (in_registers(values) for values in maps)
        values = (values - moved[0] if moved else values) * inverse_scale
    bits = magnitude_bits(values)
    is_finite = jnp.max(bits) < INFINITY
    high = jnp.max(jnp.where(bits < INFINITY, jnp.abs(values), 0.0))
    # Bits of a single number cannot be had here, so that all that follows is of several equal ones.
    with in_one_form():
        divisor = jnp.max(divisor_of(jnp.full((THREADS,), high), spec))
        codes_fn = elements_fn(jnp.full(values.shape, divisor), spec)
    codes.at[token][...] = codes_fn(values).astype(codes.dtype)
    scale[token] = jnp.where(is_finite, divisor, jnp.nan)


def in_registers(row: Ref) -> Float[Array, " K"]:
    """Returns a row of memory in the registers of a warpgroup."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    together = math.gcd(row.shape[0] // THREADS, 4)
    layout = plgpu.Layout.WG_STRIDED(row.shape, vec_size=together)
    return loaded(row, layout, optimized=False).astype(jnp.float32)
