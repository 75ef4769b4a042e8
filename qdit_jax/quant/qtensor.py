"""`QTensor`: one quantized kernel, packed; quantizing to it and back.

Dimensions: K input channels, N output channels, G groups along K, B = N // channel_group
scales per row, R rows of packed bytes.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer, Num, UInt8

from qdit_jax.quant import finite, formats, groups, packing
from qdit_jax.quant.division import quotient
from qdit_jax.quant.specs import WeightSpec
from qdit_jax.quant.stored_scales import scale_value, stored_scale
from qdit_jax.types import Numbers


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "packed_zero_point", "tensor_scale"],
    meta_fields=["bits", "group_size", "shape", "fmt"],
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A kernel `[K, N]` as packed codes, for g = group_size (K if 0) and c = N / scale.shape[-1]:

    `w[k, n] = (code[k, n] - zero_point[k // g, n // c]) * scale_values(q)[k // g, n // c]`

    Without a zero point, codes are signed, `[-2**(bits-1), 2**(bits-1) - 1]`, and stored with
    `2**(bits-1)` added. With a number format `fmt`, `w = fmt.value(code) * scale_values(q)`.

    Attributes:
        codes: uint8 `[..., packed_rows(K, bits), N]`, see `packing`.
        scale: `[..., G, B]`, as stored: `scale_values(q)` reads it, see `stored_scales`.
        packed_zero_point: uint8 `[..., packed_rows(G, bits), B]`, packed like the codes; None
            when symmetric.
        tensor_scale: float32 `[...]`, one factor per kernel, of formats that have one; else None.
        bits, group_size, shape, fmt: static; `shape` is the logical (K, N). Leading axes of the
            arrays are batch axes (layers stacked by vmap or scan).
    """

    # Any: `jax.tree.map` and `jax.eval_shape` put other leaves here than arrays.
    codes: Any
    scale: Any
    packed_zero_point: Any = None
    tensor_scale: Any = None
    bits: int = 4
    group_size: int = 128
    shape: tuple[int, int] = (0, 0)
    fmt: formats.Format | None = None

    @property
    def symmetric(self) -> bool:
        """Whether the codes have no zero point."""
        return self.packed_zero_point is None

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
        if self.packed_zero_point is None:
            return None
        return packing.unpack(jnp.asarray(self.packed_zero_point), self.bits, self.num_groups)

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

    Codes: `packed_rows(K, bits) * N`; scales: `G * N / channel_group` of the scale's dtype;
    zero points (asymmetric): `packed_rows(G, bits) * N / channel_group`. `packed_rows` of n rows
    is `ceil(n * p / 8)` summed over the bit planes p of `bits` (2, 2+1, 4, 4+1, 4+2, 4+2+1, 8).
    """
    count = groups.num_groups(num_rows, spec.group_size)
    blocks = width // spec.channel_group
    scale_bytes = np.dtype(_scale_dtype(spec)).itemsize
    total = packing.packed_rows(num_rows, spec.bits) * width + count * blocks * scale_bytes
    if spec.fmt is not None:
        return total + (4 if spec.fmt.has_tensor_scale else 0)
    return total + (0 if spec.symmetric else packing.packed_rows(count, spec.bits) * blocks)


def quantize(w: Numbers, spec: WeightSpec) -> QTensor:
    """Returns the kernel `w` `[K, N]` (any float dtype) rounded to nearest on the grid of `spec`.

    Raises:
        TypeError: if `w` is not floating point.
        ValueError: if `w` has not two axes, holds NaN or infinity (traced, its group becomes NaN),
            or `spec.channel_group` does not divide N.
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
    if spec.fmt is not None:
        return _quantize_to_format(w, spec)
    scale, zero_point = scale_and_zero_point(w, spec)
    return from_codes(codes_on_grid(w, scale, zero_point, spec), scale, zero_point, spec)


def scale_and_zero_point(
    w: Float[Array, "K N"], spec: WeightSpec
) -> tuple[Float[Array, "G B"], Float[Array, "G B"] | None]:
    """Returns every group's step in weight units, as stored, and the code of 0.0.

    The scale has `spec.scale_dtype`, see `stored_scales`. The zero point (None when symmetric) is a
    whole number in float32, computed with the scale as stored and clamped to the codes that exist.
    A group with a value that is not finite has the scale NaN.
    """

    def of_groups(
        members: Float[Array, "G S B"],
    ) -> tuple[Float[Array, "G B"], Float[Array, "G B"] | None]:
        low, high = spec.range_fn.limits(members, spec.bits, spec.symmetric, 1)
        scale = spec.range_fn.scale(low, high, spec.bits, spec.symmetric)
        # A rule may ignore values that are not finite; the group must not.
        is_finite = jnp.all(jnp.isfinite(members), axis=1)
        scale = stored_scale(jnp.where(is_finite, scale, jnp.nan), spec.scale_dtype)
        if spec.symmetric:
            return scale, None
        return scale, zero_point_of(low, scale_value(scale), spec.bits)

    scale, zero_point = groups.map_groups(of_groups, w, spec.group_size, spec.channel_group)
    return scale, zero_point


def zero_point_of(
    low: Float[Array, "*s"], scale: Float[Array, "*s"], bits: int
) -> Float[Array, "*s"]:
    """Returns the code of 0.0, a whole number in `[0, 2**bits - 1]`."""
    return jnp.clip(jnp.round(quotient(-low, scale)), 0, 2**bits - 1)


def codes_on_grid(
    w: Float[Array, "K N"],
    scale: Float[Array, "G B"],
    zero_point: Float[Array, "G B"] | None,
    spec: WeightSpec,
) -> Integer[Array, "K N"]:
    """Returns the nearest codes, `[0, 2**bits - 1]`, signed codes offset by `2**(bits - 1)`."""
    wide = groups.expand_groups(scale_value(scale), w.shape, spec.group_size)
    # XLA would turn a division by a broadcast array into a product with its reciprocal, which
    # moves a quotient by one ulp now and then, and a tie with it.
    steps = jnp.round(quotient(w, jax.lax.optimization_barrier(wide)))
    if zero_point is None:
        offset = jnp.float32(2 ** (spec.bits - 1))
    else:
        offset = groups.expand_groups(zero_point, w.shape, spec.group_size)
    return jnp.clip(steps + offset, 0, 2**spec.bits - 1).astype(jnp.uint8)


def from_codes(
    codes: Integer[Array, "*lead K N"],
    scale: Num[Array, "*lead G B"],
    zero_point: Num[Array, "*lead G B"] | None,
    spec: WeightSpec,
) -> QTensor:
    """Returns the `QTensor` of codes in `[0, 2**bits - 1]`, however they were rounded.

    `scale`, as `stored_scale` gives it, and `zero_point` are `[..., G, B]`; `zero_point` is None
    when symmetric.
    """
    packed = None if zero_point is None else packing.pack(zero_point.astype(jnp.int32), spec.bits)
    return QTensor(
        codes=packing.pack(codes, spec.bits),
        scale=scale,
        packed_zero_point=packed,
        bits=spec.bits,
        group_size=spec.group_size,
        shape=(codes.shape[-2], codes.shape[-1]),
        fmt=spec.fmt,
    )


@jax.jit
def integer_codes(q: QTensor) -> Integer[Array, "*lead K N"]:
    """Returns the codes unpacked, uint8; signed codes still carry their `2**(bits - 1)`."""
    return packing.unpack(q.codes, q.bits, q.shape[0])


@partial(jax.jit, static_argnames="dtype")
def dequantize(q: QTensor, dtype: DTypeLike = jnp.float32) -> Float[Array, "*lead K N"]:
    """Returns the kernel that `q` stands for, in `dtype` (the arithmetic is float32)."""
    codes = integer_codes(q)
    scale = groups.expand_groups(scale_values(q), q.shape, q.group_size)
    if q.fmt is not None:
        return (q.fmt.value(codes) * scale).astype(dtype)
    zero_point = q.zero_point
    if zero_point is None:
        offset = jnp.float32(2 ** (q.bits - 1))
    else:
        offset = groups.expand_groups(zero_point, q.shape, q.group_size).astype(jnp.float32)
    return ((codes.astype(jnp.float32) - offset) * scale).astype(dtype)


def select_columns(q: QTensor, index: Integer[Array, " M"]) -> QTensor:
    """Returns the columns `index` of `q`, `[K, M]`, still packed."""
    block = index // q.channel_group
    zero_point = q.packed_zero_point
    return dataclasses.replace(
        q,
        codes=q.codes[..., index],
        scale=q.scale[..., block],
        packed_zero_point=None if zero_point is None else zero_point[..., block],
        shape=(q.shape[0], index.shape[0]),
    )


def scale_values(q: QTensor) -> Float[Array, "*lead G B"]:
    """Returns the scales in float32, a format's stored bytes decoded and its factor applied."""
    if q.fmt is None:
        return scale_value(q.scale)
    scale = q.fmt.scale_value(q.scale)
    return scale if q.tensor_scale is None else scale * q.tensor_scale[..., None, None]


def _scale_dtype(spec: WeightSpec) -> np.dtype:
    byte = spec.fmt is not None and spec.fmt.has_byte_scale
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
