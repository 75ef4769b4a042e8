"""A product of 16-bit inputs with packed integer weights (W4A16), in one Pallas kernel for TPUs.

Compiled for v5e, v5p and v6e, interpreted on CPU, not run on a TPU.

Packed codes become bfloat16 weights in VMEM once per call, rounded as `quant.weight_rows` rounds them:
memory sees the inputs, the packed codes and the result.

Dimensions: M rows (tokens), K input channels, N output channels, G groups along K, R rows of packed
bytes; J blocks of columns of a panel, L rows and C columns of a block (`tpu_blocks`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from qdit_jax.kernels.refs import Ref
from qdit_jax.kernels.tpu_blocks import STRIP, weights_sizes
from qdit_jax.kernels.tpu_call import TPUOperands, fused_by
from qdit_jax.kernels.tpu_reasons import row, weights_reason
from qdit_jax.kernels.tpu_rows import Tokens, Writer
from qdit_jax.kernels.tpu_words import SIGNS, as_rows_of, code_words
from qdit_jax.kernels.weight_maps import HALF, maps_of
from qdit_jax.kernels.weight_reasons import is_alone
from qdit_jax.quant import ActSpec, QTensor


def _operands(q: QTensor, spec: ActSpec | None) -> TPUOperands:
    return TPUOperands(_kernel, signed_maps(q), [])


# Equal to `xla.simulated_matmul` to the rounding of sums, whose derivative it has.
weights_fused = fused_by(
    "tpu_weights", _operands, lambda shape, q, itemsize, _: weights_sizes(shape, q, itemsize)
)


def signed_maps(q: QTensor) -> tuple[Float[Array, "G N"], Float[Array, "G N"], Float[Array, "G N"]]:
    """Returns `maps_of` for codes minus `HALF`, which are int8: a factor always, and `zero` moved."""
    factor, zero, scale = maps_of(q)
    factor = jnp.ones_like(scale) if factor is None else factor
    return factor, zero - HALF * factor, scale


def _kernel(
    tokens: Tokens,
    codes: Ref,
    factor: Ref,
    zero: Ref,
    scale: Ref,
    weights: Ref,
    *turned: Ref,
    writer: Writer,
    bits: int,
    groups: tuple[int, ...],
) -> None:
    """Writes one block `[L, C]` of the result, and the weights `[J, K, C]` of the panel.

    Packed codes are `[R, C]`, or `[C, R]` where there is room to have them `turned`.
    """
    block = pl.program_id(2)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        columns = turned[0] if turned else codes
        if turned:
            columns[...] = codes[...].T
        unpack_columns(columns, (factor, zero, scale), weights.at[block], bits, groups)

    sums = jnp.dot(
        tokens.x[...],
        weights[block],
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
    writer.write(sums)


def unpack_columns(
    codes: Ref, maps: tuple[Ref, ...], weights: Ref, bits: int, groups: tuple[int, ...]
) -> None:
    """Writes the weights `[K, C]` of a block of columns, in bfloat16."""
    for index, group in enumerate(groups):
        word = code_words(codes, bits, index) ^ SIGNS
        moved = as_rows_of(word, jnp.int8).astype(jnp.int32).astype(jnp.float32)
        factor, zero, scale = (a[group : group + 1, :] for a in maps)
        found = (moved * factor - zero) * scale
        weights[pl.ds(index * STRIP, STRIP), :] = found.astype(jnp.bfloat16)


TPU_WEIGHTS = row(
    *("tpu_weights", weights_fused, ("weights", "sums"), weights_reason),
    meant_for=is_alone,
)
