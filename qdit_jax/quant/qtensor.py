"""`QTensor`: one quantized kernel, packed; quantizing to it and back.

A kernel is `[K, N]` to who reads or rounds it. Its codes are stored K-major, a row of bytes per output
channel: products contract the last axes, and nothing is transposed. Its scales are stored a row per group,
for products add up one group of all output channels after another.

Dimensions: K input channels, N output channels, G groups along K, B = N // channel_group
scales of a group, R packed bytes.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Num, UInt8

from qdit_jax.quant import codebooks, finite, formats, groups, levels, packing
from qdit_jax.quant.division import quotient
from qdit_jax.quant.specs import WeightSpec
from qdit_jax.quant.stored_scales import scale_value, stored_scale
from qdit_jax.types import DERIVED, AnyArray, Numbers


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("codes", "scale", "packed_zero_point", "tensor_scale"),
        *("channel_scale", "offset", "codebook", "ready"),
    ],
    meta_fields=["bits", "group_size", "shape", "fmt"],
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A kernel `[K, N]` as packed codes, for g = group_size (K if 0) and c = N / scale.shape[-1]:

    `w[k, n] = (code[k, n] - zero_point[k // g, n // c]) * scale_values(q)[k // g, n // c]`

    Without a zero point, codes are signed, `[-2**(bits-1), 2**(bits-1) - 1]`, and stored with
    `2**(bits-1)` added. With a number format `fmt`, `w = fmt.value(code) * scale_values(q)`.

    With two levels of scales, `w[k, n] = level_rows(q)[n, k] * channel_scale[n // c]`: a group's codes become
    int8 levels by a step and an offset of one byte each, or through a codebook.

    Attributes:
        codes: uint8 `[..., N, packed_bytes(K, bits)]`, see `packing`.
        scale: `[..., G, B]`, as stored: `scale_values(q)` reads it, see `stored_scales`.
        packed_zero_point: uint8 `[..., packed_bytes(G, bits), B]`, packed along G like the codes
            along K; None when symmetric.
        tensor_scale: float32 `[...]`, one factor per kernel, of formats that have one; else None.
        channel_scale: float32 `[..., B]` where there are two levels of scales, else None; `scale` is
            then uint8, a whole number of levels (E4M3 in `lut4_e4m3`).
        offset: uint8 `[..., G, B]`, the level of code 0, plus 128; None when symmetric, or with one
            level of scales or a codebook.
        codebook: float32 `[..., 16]`, of a format that learns one; else None.
        ready: what products would compute of the others, see `readied`; of kernels that run, never stored.
        bits, group_size, shape, fmt: static; `shape` is the logical (K, N). Leading axes of the
            arrays are batch axes (layers stacked by vmap or scan).
    """

    # Any: `jax.tree.map` and `jax.eval_shape` put other leaves here than arrays.
    codes: Any
    scale: Any
    packed_zero_point: Any = None
    tensor_scale: Any = None
    channel_scale: Any = None
    offset: Any = None
    codebook: Any = None
    ready: Any = dataclasses.field(default=None, metadata=DERIVED)
    bits: int = 4
    group_size: int = 128
    shape: tuple[int, int] = (0, 0)
    fmt: formats.Format | None = None

    @property
    def symmetric(self) -> bool:
        """Whether the codes have no zero point and no offset."""
        return self.packed_zero_point is None and self.offset is None

    @property
    def has_levels(self) -> bool:
        """Whether there are two levels of scales, so that a product's operand is int8 levels."""
        return self.channel_scale is not None

    @property
    def product_group_size(self) -> int:
        """Input channels inside which a product has one scale; 0 is all."""
        return 0 if self.has_levels else self.group_size

    @property
    def num_groups(self) -> int:
        """Groups along K, a shorter last one included."""
        return groups.num_groups(self.shape[0], self.group_size)

    @property
    def channel_group(self) -> int:
        """Neighboring output channels that share a scale."""
        return self.shape[1] // self.scale.shape[-1]

    @property
    def zero_point(self) -> UInt8[Array, "*lead G B"] | None:
        """The code of 0.0 of every group, uint8 `[..., G, B]`; None when symmetric."""
        if self.ready is not None:
            return self.ready.zero_point
        if self.packed_zero_point is None:
            return None
        packed = transposed(jnp.asarray(self.packed_zero_point))
        return transposed(packing.unpack(packed, self.bits, self.num_groups))

    @property
    def nbytes(self) -> int:
        """Bytes held, batch axes included."""
        return nbytes(self)


def nbytes(q: QTensor) -> int:
    """Returns the bytes that `q` (arrays or abstract shapes) holds."""
    return sum(
        int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(q)
    )


def packed_nbytes(num_rows: int, width: int, spec: WeightSpec) -> int:
    """Returns the bytes that a `[num_rows, width]` kernel takes once quantized to `spec`.

    Codes: `packed_bytes(K, bits) * N`; scales: `G * N / channel_group` of the scale's dtype;
    zero points (asymmetric): `packed_bytes(G, bits) * N / channel_group`. `packed_bytes` of n
    codes is `ceil(n * p / 8)` summed over the bit planes p of `bits` (2, 2+1, 4, 4+1, 4+2, 4+2+1, 8).
    With two levels of scales, step and (asymmetric) offset take a byte each and a channel 4 bytes.
    """
    count = groups.num_groups(num_rows, spec.group_size)
    blocks = width // spec.channel_group
    scale_bytes = np.dtype(_scale_dtype(spec)).itemsize
    total = packing.packed_bytes(num_rows, spec.bits) * width + count * blocks * scale_bytes
    if spec.has_levels:
        total += blocks * 4
    if spec.fmt is not None:
        codebook = 4 * 2**spec.bits if spec.fmt.has_codebook else 0
        return total + codebook + (4 if spec.fmt.has_tensor_scale else 0)
    if spec.has_levels:
        return total + (0 if spec.symmetric else count * blocks)
    return total + (0 if spec.symmetric else packing.packed_bytes(count, spec.bits) * blocks)


def quantize(w: Numbers, spec: WeightSpec) -> QTensor:
    """Returns the kernel `w` `[K, N]` (any float dtype) rounded to nearest on the grid of `spec`.

    Raises:
        TypeError: if `w` is not floating point.
        ValueError: if `w` has not two axes, holds NaN or infinity (traced, its group becomes NaN, with
            two levels of scales its output channel), or `spec.channel_group` does not divide N.
    """
    w = check_kernel(w, spec)
    return _quantize(w, spec=spec)


def check_kernel(w: Numbers, spec: WeightSpec) -> Float[Array, "K N"]:
    """Returns `w` as an array that `spec` can quantize.

    Raises:
        TypeError, ValueError: see `quantize`.
    """
    if not isinstance(spec, WeightSpec):
        raise TypeError(f"spec={spec!r} is not a WeightSpec.")
    w = jnp.asarray(w)
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"w has shape {w.shape}; a kernel has two axes, [K, N].")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"w has dtype {w.dtype}; quantize takes floating-point kernels.")
    if w.shape[1] % spec.channel_group:
        raise ValueError(
            f"channel_group={spec.channel_group} does not divide the {w.shape[1]} output channels."
        )
    finite.check_finite("w", w, finite.GREATEST_WEIGHT)
    return w


@partial(jax.jit, static_argnames="spec")
def _quantize(w: Float[Array, "K N"], spec: WeightSpec) -> QTensor:
    w = w.astype(jnp.float32)
    if spec.fmt is not None and spec.fmt.has_codebook:
        found = codebooks.quantized(w, spec)
        q = from_codes(found.codes, found.step, None, spec)
        return dataclasses.replace(q, channel_scale=found.channel_scale, codebook=found.codebook)
    if spec.fmt is not None:
        return _quantize_to_format(w, spec)
    grid = grid_of(w, spec)
    return with_codes(grid, nearest_codes(w, grid))


def grid_of(w: Float[Array, "K N"], spec: WeightSpec) -> QTensor:
    """Returns the grid on which `spec` puts the integer codes of `w`: a `QTensor` without codes.

    A scale has `spec.scale_dtype`, see `stored_scales`; a zero point is computed with the scale as
    stored and clamped to the codes that exist. A group with a value that is not finite has the scale
    NaN; with two levels of scales its output channels do, see `levels`.
    """

    def limits(
        members: Float[Array, "G S B"],
    ) -> tuple[Float[Array, "G B"], Float[Array, "G B"]]:
        low, high = spec.range_fn.limits(members, spec.bits, spec.symmetric, 1)
        # A rule may ignore values that are not finite; the group must not.
        is_finite = jnp.all(jnp.isfinite(members), axis=1)
        return low, jnp.where(is_finite, high, jnp.nan)

    low, high = groups.map_groups(limits, w, spec.group_size, spec.channel_group)
    shape = (w.shape[0], w.shape[1])
    grid = QTensor(None, None, bits=spec.bits, group_size=spec.group_size, shape=shape)
    if spec.has_levels:
        channel_scale, step, offset = levels.chosen_grid(
            w, low, high, bits=spec.bits, symmetric=spec.symmetric, group_size=spec.group_size
        )
        return dataclasses.replace(grid, scale=step, channel_scale=channel_scale, offset=offset)
    scale = spec.range_fn.scale(low, high, spec.bits, spec.symmetric)
    scale = stored_scale(jnp.where(jnp.isfinite(high), scale, jnp.nan), spec.scale_dtype)
    zero_point = None
    if not spec.symmetric:
        zero_point = packed_zeros(zero_point_of(low, scale_value(scale), spec.bits), spec.bits)
    return dataclasses.replace(grid, scale=scale, packed_zero_point=zero_point)


def packed_zeros(zero_point: Num[Array, "*lead G B"], bits: int) -> UInt8[Array, "*lead R B"]:
    """Returns zero points packed along G, like codes along K."""
    return transposed(packing.pack(transposed(zero_point).astype(jnp.int32), bits))


def zero_point_of(
    low: Float[Array, "*s"], scale: Float[Array, "*s"], bits: int
) -> Float[Array, "*s"]:
    """Returns the code of 0.0, a whole number in `[0, 2**bits - 1]`."""
    return jnp.clip(jnp.round(quotient(-low, scale)), 0, 2**bits - 1)


def affine_map(q: QTensor) -> tuple[Float[Array, "*lead G B"], Float[Array, "*lead G B"]]:
    """Returns (step, zero) of integer codes: `w = (code - zero) * step`, float32.

    Of two levels of scales `zero` is no whole number.
    """
    step, zero_point = scale_values(q), q.zero_point
    if q.channel_scale is not None and q.offset is not None:
        zero = (levels.HALF - q.offset.astype(jnp.float32)) / q.scale.astype(jnp.float32)
    elif zero_point is None:
        zero = jnp.full_like(step, 2 ** (q.bits - 1))
    else:
        zero = zero_point.astype(jnp.float32)
    return step, zero


def nearest_codes(w: Float[Array, "K N"], grid: QTensor) -> UInt8[Array, "K N"]:
    """Returns the codes of the grid points nearest to `w`; the codes of `grid` are not read."""
    step, zero = (groups.expand_groups(a, w.shape, grid.group_size) for a in affine_map(grid))
    # XLA computes `w / repeated scale` as `w * (1 / scale)` where it sees the repetition, which
    # moves a quotient by one ulp now and then, and a tie with it.
    steps = quotient(w, jax.lax.optimization_barrier(step))
    return code_at(steps, zero, grid.bits).astype(jnp.uint8)


def code_at(steps: Float[Array, "*s"], zero: Float[Array, "*#s"], bits: int) -> Float[Array, "*s"]:
    """Returns the nearest codes of values counted in steps from 0.0, whose code is `zero`."""
    whole = jnp.floor(zero)
    # A whole zero is added after rounding, which keeps ties apart from it.
    return jnp.clip(jnp.round(steps + (zero - whole)) + whole, 0, 2**bits - 1)


def with_codes(grid: QTensor, codes: Integer[Array, "*lead K N"]) -> QTensor:
    """Returns the `QTensor` with these codes in `[0, 2**bits - 1]`, however they were rounded."""
    return dataclasses.replace(grid, codes=packing.pack(transposed(codes), grid.bits), ready=None)


def from_codes(
    codes: Integer[Array, "*lead K N"],
    scale: Num[Array, "*lead G B"],
    zero_point: Num[Array, "*lead G B"] | None,
    spec: WeightSpec,
) -> QTensor:
    """Returns the `QTensor` of codes in `[0, 2**bits - 1]` with one level of scales.

    `scale`, as `stored_scale` gives it, and `zero_point` are `[..., G, B]`; `zero_point` is None
    when symmetric.
    """
    packed = None if zero_point is None else packed_zeros(zero_point, spec.bits)
    shape = (codes.shape[-2], codes.shape[-1])
    grid = QTensor(
        *(None, scale, packed),
        bits=spec.bits,
        group_size=spec.group_size,
        shape=shape,
        fmt=spec.fmt,
    )
    return with_codes(grid, codes)


def transposed(values: Num[Array, "*lead A B"]) -> Num[Array, "*lead B A"]:
    """Returns `values` with their last two axes exchanged, to how codes are stored or from it."""
    return jnp.swapaxes(values, -1, -2)


def step_and_offset(q: QTensor) -> tuple[UInt8[Array, "*lead G B"], UInt8[Array, "*lead G B"]]:
    """Returns the bytes that make levels of codes, `level = code * step + offset - 128`.

    Of two levels of scales without a codebook, or of symmetric codes, whose step is then 1.
    """
    step = jnp.asarray(q.scale) if q.has_levels else jnp.ones(q.scale.shape, jnp.uint8)
    return step, levels.symmetric_offset(step, q.bits) if q.offset is None else q.offset


def select_columns(q: QTensor, index: Integer[AnyArray, " M"] | slice) -> QTensor:
    """Returns the columns `index` of `q`, `[K, M]`, still packed.

    A slice starts and ends between channel groups.
    """
    size = q.channel_group
    block: AnyArray | slice
    if isinstance(index, slice):
        count, block = index.stop - index.start, slice(index.start // size, index.stop // size)
    else:
        count, block = index.shape[0], index // size
    names = ("scale", "packed_zero_point", "offset", "channel_scale")
    held = {name: getattr(q, name) for name in names}
    cuts = {name: array[..., block] for name, array in held.items() if array is not None}
    codes, shape = q.codes[..., index, :], (q.shape[0], count)
    return dataclasses.replace(q, codes=codes, shape=shape, ready=None, **cuts)


def scale_values(q: QTensor) -> Float[Array, "*lead G B"]:
    """Returns the scales in float32, a format's stored bytes decoded and its factor applied.

    With two levels of scales, the weight of one step: `scale * channel_scale`.
    """
    if q.has_levels:
        step = q.scale.astype(jnp.float32) if q.fmt is None else q.fmt.step_value(q.scale)
        return step * q.channel_scale[..., None, :]
    if q.fmt is None:
        return scale_value(q.scale)
    scale = q.fmt.scale_value(q.scale)
    return scale if q.tensor_scale is None else scale * q.tensor_scale[..., None, None]


def _scale_dtype(spec: WeightSpec) -> np.dtype:
    byte = spec.has_levels or (spec.fmt is not None and spec.fmt.has_byte_scale)
    return jnp.dtype("uint8" if byte else spec.scale_dtype)


def _quantize_to_format(w: Float[Array, "K N"], spec: WeightSpec) -> QTensor:
    fmt = spec.fmt
    assert fmt is not None
    absmax = groups.map_groups(lambda m: jnp.max(jnp.abs(m), axis=1), w, spec.group_size)
    factor = fmt.tensor_scale(jnp.max(absmax)) if fmt.has_tensor_scale else None
    stored = fmt.stored_scale(absmax, factor)
    if not fmt.has_byte_scale:
        stored = stored_scale(stored, spec.scale_dtype)
    scale = fmt.scale_value(stored) if factor is None else fmt.scale_value(stored) * factor
    wide = groups.expand_groups(scale, w.shape, spec.group_size)
    q = from_codes(fmt.code(formats.divide(w, wide)), stored, None, spec)
    return dataclasses.replace(q, tensor_scale=factor)
