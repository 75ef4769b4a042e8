"""Number formats other than integers: FP8, FP4, the block formats MXFP4, MXFP8, NVFP4, NF4, LUT4.

A format is an element (a table with one value per code) and the scale of a block. Elements round
to nearest, ties to even, and saturate; a block's codes are `element(x / scale)`. A product may sum
elements before it multiplies by scales: they are whole numbers (E2M1, doubled) or exact in a dtype
that has a dot. LUT4 has no table of its own: each kernel learns one, see `codebooks`.

Dimensions: K channels, G groups (blocks), S members of a group.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from qdit_jax.quant import ranges, stored_scales
from qdit_jax.quant.division import quotient, quotient_by_number
from qdit_jax.types import AnyArray

# 16 quantiles of a standard normal, scaled to [-1, 1] (QLoRA, arXiv:2305.14314, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_DTYPES = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "e2m1": "float4_e2m1fn"}
# The dtype that holds an element exactly in a dot, and the unit: E2M1 is counted in halves.
_OPERANDS = {
    "e2m1": ("int8", 0.5), "e4m3": ("bfloat16", 1.0), "e5m2": ("bfloat16", 1.0),
    "nf4": ("float32", 1.0), "codebook": ("int8", 1.0),
}  # fmt: skip


_E8M0_NAN = 255
_LEAST_STEP = 2.0**-6  # the least normal number of E4M3


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
        name: what recipes call it.
        element: "e4m3", "e5m2", "e2m1", "nf4", or "codebook" for a table that each kernel learns.
        bits: bits per element.
        block_size: members of a block; 0 leaves the group size to the spec.
        block_scale: "float" (in the spec's scale dtype), "e8m0" (a power of two, one byte) or
            "e4m3" (one byte, times one float32 factor for the whole tensor) or "levels" (one
            byte, a whole number of the output channel's levels) or "e4m3_levels" (one byte, in those
            levels too, as ComfyUI's `asym_w4a8_int8` stores it).
    """

    name: str
    element: str
    bits: int
    block_size: int = 0
    block_scale: str = "float"

    @property
    def has_tensor_scale(self) -> bool:
        """Whether every block scale is multiplied by one float32 factor per tensor."""
        return self.block_scale == "e4m3"

    @property
    def has_calibrated_scale(self) -> bool:
        """Whether an input may have scales (or, if it has one, a factor) that calibration chose."""
        return self.block_scale in ("float", "e4m3")

    @property
    def has_codebook(self) -> bool:
        """Whether a kernel learns the table of values, whose entries become int8 levels."""
        return self.element == "codebook"

    @property
    def needs_whole_tensor(self) -> bool:
        """Whether a block's codes depend on the rest of the tensor."""
        return self.has_tensor_scale or self.has_codebook

    @property
    def has_byte_scale(self) -> bool:
        """Whether a block's scale is stored as one byte."""
        return self.block_scale != "float"

    def values(self) -> np.ndarray:
        """Returns the value of every code, float32 `[2**bits]`; FP8 holds NaN and infinities.

        Raises:
            ValueError: if the format has no table of its own.
        """
        if self.has_codebook:
            raise ValueError(f"format {self.name!r} has a table per kernel; see QTensor.codebook.")
        if self.element == "nf4":
            return np.array(_NF4, np.float32)
        codes = np.arange(2**self.bits, dtype=np.uint8)
        return codes.view(getattr(ml_dtypes, _DTYPES[self.element])).astype(np.float32)

    def max_value(self) -> float:
        """Returns the greatest finite value of an element."""
        values = self.values()
        return float(values[np.isfinite(values)].max())

    def value(self, codes: UInt8[Array, "*s"]) -> Float[Array, "*s"]:
        """Returns the element values of codes, float32.

        FP8 is looked up too, not cast: XLA for GPUs removes a cast to float8 and back, and with it
        the rounding.
        """
        return jnp.asarray(self.values())[codes]

    @property
    def float8_dtype(self) -> np.dtype | None:
        """The dtype whose bytes are the codes; None of formats that are not FP8."""
        return jnp.dtype(_DTYPES[self.element]) if self.element in ("e4m3", "e5m2") else None

    @property
    def operand_dtype(self) -> np.dtype:
        """The narrowest dtype with a dot that holds this format's elements exactly."""
        return jnp.dtype(_OPERANDS[self.element][0])

    @property
    def unit(self) -> float:
        """The value of operand 1: `value(codes) = operand(codes) * unit`, exactly."""
        return _OPERANDS[self.element][1]

    def operand(self, codes: UInt8[Array, "*s"]) -> Num[Array, "*s"]:
        """Returns what a dot multiplies for elements, exact, in `operand_dtype`.

        XLA turns a dot of operands that were cast from float8 into a float8 dot, and Hopper GPUs
        keep 14 bits of its sums (errors of 1e-3, not 1e-7): another reason to look FP8 up.
        """
        values = self.values() / np.float32(self.unit)
        return jnp.asarray(values.astype(self.operand_dtype))[codes]

    def code(self, x: Float[Array, "*s"]) -> UInt8[Array, "*s"]:
        """Returns the codes of the elements nearest to `x`, ties to even, saturating."""
        if self.element == "nf4":
            return _count_above(x, self.values(), ties_to_even=False)
        if self.bits == 8:
            return _byte_of(x, self.element)
        sign = jnp.signbit(x).astype(jnp.uint8) << (self.bits - 1)
        magnitudes = self.values()[: 2 ** (self.bits - 1)]
        return _count_above(jnp.abs(x), magnitudes, ties_to_even=True) | sign

    def step_value(self, stored: Num[Array, "*s"]) -> Float[Array, "*s"]:
        """Returns the steps of a codebook's groups in levels, float32, from the bytes stored."""
        if self.block_scale == "e4m3_levels":
            return fp8_e4m3.value(stored)
        return stored.astype(jnp.float32)

    def stored_step(self, step: Float[Array, "*s"]) -> UInt8[Array, "*s"]:
        """Returns the bytes of a codebook's steps; none is 0."""
        if self.block_scale == "e4m3_levels":
            return _byte_of(jnp.maximum(step, _LEAST_STEP), "e4m3")
        return jnp.clip(jnp.round(step), 1, 255).astype(jnp.uint8)

    def scale_value(self, stored: Num[Array, "*s"]) -> Float[Array, "*s"]:
        """Returns block scales in float32 from what is stored, without the tensor's factor."""
        if self.block_scale == "e8m0":
            # exp2 is not exact; the byte is a float32's exponent, but for 2**-127.
            power = jax.lax.bitcast_convert_type(stored.astype(jnp.int32) << 23, jnp.float32)
            power = jnp.where(stored > 0, power, jnp.float32(2.0**-127))
            return jnp.where(stored == _E8M0_NAN, jnp.nan, power)
        if self.block_scale == "e4m3":
            return fp8_e4m3.value(stored)
        return stored_scales.scale_value(stored)

    def stored_scale(
        self, absmax: Float[Array, "*s"], tensor_scale: Float[Array, "*#s"] | None
    ) -> Num[Array, "*s"]:
        """Returns the block scales, as stored, of blocks whose greatest magnitude is `absmax`.

        `tensor_scale` broadcasts to `absmax`; it is used by formats that have one. A block of
        zeros gets scale 1, or with a tensor scale the code of 0.
        """
        if self.block_scale == "e8m0":
            # An element's greatest power of two meets the block's: 2**2 in E2M1, 2**8 in E4M3.
            power = int(np.floor(np.log2(self.max_value())))
            _, exponent = jnp.frexp(absmax)
            byte = jnp.clip(exponent - 1 - power + 127, 0, 254)
            byte = jnp.where(absmax > 0, byte, 127)
            return jnp.where(jnp.isfinite(absmax), byte, _E8M0_NAN).astype(jnp.uint8)
        top = self.max_value()
        if self.block_scale == "e4m3":
            assert tensor_scale is not None
            return _byte_of(quotient(quotient_by_number(absmax, top), tensor_scale), "e4m3")
        return ranges.positive_or_one(quotient_by_number(absmax, top))

    def tensor_scale(self, absmax: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Returns the factor for tensors of greatest magnitude `absmax`: blocks fill E4M3."""
        scale = quotient_by_number(absmax, self.max_value() * 448.0)
        return ranges.positive_or_one(scale)

    def calibrated_scale(self, absmax: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Returns what a static quantizer keeps for inputs of greatest magnitude `absmax`."""
        return (
            self.tensor_scale(absmax) if self.has_tensor_scale else self.stored_scale(absmax, None)
        )

    def quantize_blocks(
        self,
        x: Float[Array, "*lead K"],
        group_size: int,
        calibrated: Float[AnyArray, "*#lead C"] | None = None,
    ) -> tuple[UInt8[Array, "*lead K"], Float[Array, "*#lead G"]]:
        """Returns the codes of `x` in blocks along its last axis, and their scales in float32.

        The factor of a tensor is one per token here, so that no token depends on another; the
        scales include it.

        Args:
            calibrated: in place of the scales, or of the factor (C = 1) where the format has one;
                values beyond it saturate.
        """
        x = x.astype(jnp.float32)
        size = self.block_size or group_size or x.shape[-1]
        pad = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)]
        blocks = jnp.pad(x, pad).reshape(*x.shape[:-1], -1, size)
        scale = self.block_scales(jnp.max(jnp.abs(blocks), axis=-1), calibrated)
        codes = self.code(divide(blocks, scale[..., None]))
        return codes.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], scale

    def block_scales(
        self, absmax: Float[Array, "*lead G"], calibrated: Float[AnyArray, "*#lead C"] | None
    ) -> Float[Array, "*#lead G"]:
        """Returns the scales of blocks of greatest magnitude `absmax`; see `quantize_blocks`."""
        if not self.has_tensor_scale and calibrated is not None:
            return jnp.asarray(calibrated)
        factor = jnp.float32(1)
        if self.has_tensor_scale:
            own = calibrated is None
            factor = (
                self.tensor_scale(jnp.max(absmax, axis=-1, keepdims=True)) if own else calibrated
            )
        return self.scale_value(self.stored_scale(absmax, factor)) * factor

    def fake_quantize(
        self,
        x: Float[Array, "*lead K"],
        group_size: int,
        calibrated: Float[AnyArray, "*#lead C"] | None = None,
    ) -> Float[Array, "*lead K"]:
        """Returns `x` rounded to this format in blocks along its last axis, float32.

        With `calibrated` scales, values that are not finite become NaN: they do not show in these.
        """
        codes, scale = self.quantize_blocks(x, group_size, calibrated)
        size = self.block_size or group_size or x.shape[-1]
        rounded = self.value(codes) * jnp.repeat(scale, size, axis=-1)[..., : x.shape[-1]]
        return rounded if calibrated is None else jnp.where(jnp.isfinite(x), rounded, jnp.nan)


def divide(x: Float[Array, "*s"], scale: Float[Array, "*#s"]) -> Float[Array, "*s"]:
    """Returns `x / scale` rounded once, 0 where `scale` is 0; NaN stays NaN."""
    wide = jax.lax.optimization_barrier(jnp.broadcast_to(scale, x.shape))
    empty = wide == 0
    return jnp.where(empty, 0.0, quotient(x, jnp.where(empty, 1.0, wide)))


def _byte_of(x: Float[Array, "*s"], element: str) -> UInt8[Array, "*s"]:
    dtype = jnp.dtype(_DTYPES[element])
    top = float(ml_dtypes.finfo(dtype).max)
    return jax.lax.bitcast_convert_type(jnp.clip(x, -top, top).astype(dtype), jnp.uint8)


def _count_above(
    x: Float[Array, "*s"], values: np.ndarray, *, ties_to_even: bool
) -> UInt8[Array, "*s"]:
    """Returns the index of the nearest of ascending `values`, by comparing with midpoints."""
    code = jnp.zeros(x.shape, jnp.uint8)
    for i, (below, above) in enumerate(itertools.pairwise(values)):
        middle = np.float32((float(below) + float(above)) / 2)
        over = x >= middle if ties_to_even and i % 2 else x > middle
        code = code + over.astype(jnp.uint8)
    return code


fp8_e4m3 = Format("fp8_e4m3", "e4m3", 8)
fp8_e5m2 = Format("fp8_e5m2", "e5m2", 8)
fp4_e2m1 = Format("fp4_e2m1", "e2m1", 4)
mxfp4 = Format("mxfp4", "e2m1", 4, block_size=32, block_scale="e8m0")
mxfp8 = Format("mxfp8", "e4m3", 8, block_size=32, block_scale="e8m0")
nvfp4 = Format("nvfp4", "e2m1", 4, block_size=16, block_scale="e4m3")
nf4 = Format("nf4", "nf4", 4)
lut4 = Format("lut4", "codebook", 4, block_scale="levels")
lut4_e4m3 = Format("lut4_e4m3", "codebook", 4, block_scale="e4m3_levels")

FORMATS = {
    fmt.name: fmt
    for fmt in (fp8_e4m3, fp8_e5m2, fp4_e2m1, mxfp4, mxfp8, nvfp4, nf4, lut4, lut4_e4m3)
}


def by_name(name: str) -> Format:
    """Returns the format of that name.

    Raises:
        ValueError: if there is none; the message lists the known ones.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known formats: {', '.join(sorted(FORMATS))}.")
    return FORMATS[name]
