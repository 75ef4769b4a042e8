"""The formats of quantized weights that ComfyUI writes, read: a row per format.

Weights are exactly those of the file. Inputs are quantized when the network runs, as ComfyUI does, by the
file's `input_scale` where it has one. Without it ComfyUI takes 1 for FP8, and for NVFP4 the greatest value of
the whole input; here every token has its own scale.

Dimensions: N rows (output channels), K columns (input channels), G groups along K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from qdit_convert.bits import from_tiles, nibbles, tiled_shape
from qdit_convert.kernels import Kernel, StoredKernel
from qdit_convert.stored_layer import E4M3, E8M0, FLOATS, StoredLayer
from qdit_jax.errors import UserError
from qdit_jax.quant import ActSpec, WeightSpec, formats, regular_size

Shape = tuple[int, int]
INT4_GROUP = 64  # of which `convrot_w4a4` has multiples
CONVROT = 256  # channels of a rotated block, where the marker does not say
INT8, LUT, INT4 = ROTATED = ("int8_tensorwise", "asym_w4a8_int8", "convrot_w4a4")
ALWAYS_ROTATED = (LUT, INT4)
# The formats with one scale for a whole input, and what ComfyUI takes where a file has no input_scale.
ONE_FOR_ALL = {
    "float8_e4m3fn": "1 for all",
    "float8_e5m2": "1 for all",
    "nvfp4": "the greatest value of all of them",
}
# Settings of a marker that are read, or repeat what tensors say.
UNDERSTOOD = {
    *("format", "params", "convrot", "convrot_groupsize", "group_size", "per_row"),
    *("full_precision_matrix_mult", "orig_dtype", "orig_shape"),
    *("quant_group_size", "linear_dtype"),
}


@dataclass(frozen=True)
class StoredFormat:
    """How a format is stored.

    Attributes:
        dtypes: of the weight.
        per_byte: weights in a byte of it.
        parts: the tensors beside the weight that the format must have.
        check: raises `UserError` unless a layer's weight of this shape fits the format.
        read: returns the kernel.
        optional: further tensors beside it that are understood.
    """

    dtypes: tuple[str, ...]
    per_byte: int
    parts: tuple[str, ...]
    check: Callable[[StoredLayer, Shape], None]
    read: Callable[[StoredLayer, Shape], Kernel]
    optional: tuple[str, ...] = ("pre_quant_scale",)


def stored_kernel(layer: StoredLayer, name: str) -> tuple[Shape, StoredKernel]:
    """Returns the shape `[N, K]` of a layer's weight, and how to read it.

    Raises:
        UserError: if the format is unknown, or a tensor is missing or not as the format has it.
    """
    if name not in FORMATS:
        raise UserError(
            f"{layer.name} has the format {name!r}, which convert does not read; it reads "
            f"{', '.join(FORMATS)}. Take the full-precision file, or one in these formats."
        )
    fmt = FORMATS[name]
    weight = layer.need("weight", f"the format {name}")
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise UserError(
            f"{layer.name}.weight is stored as {name} with {len(weight.shape)} axes; only weights of "
            "linear layers, with two, are read quantized."
        )
    layer.check("weight", (weight.shape,), fmt.dtypes)
    shape = (weight.shape[0], weight.shape[1] * fmt.per_byte)
    for part in fmt.parts:
        layer.need(part, f"the format {name}")
    if layer.setting("convrot", False) and name not in ROTATED:
        raise UserError(f"{layer.name} says convrot, which the format {name} does not have.")
    fmt.check(layer, shape)
    if layer.has("pre_quant_scale"):
        layer.check("pre_quant_scale", ((shape[1],), (1, shape[1])), FLOATS)
    if layer.has("input_scale"):
        layer.check("input_scale", ((), (1,)), FLOATS)

    def read() -> Kernel:
        kernel = fmt.read(layer, shape)
        if (scale := input_scale(layer)) is not None and kernel.act is not None:
            kernel = replace(kernel, act=replace(kernel.act, mode="static"), act_scale=scale)
        if not layer.has("pre_quant_scale"):
            return kernel
        return replace(kernel, inverse_scale=layer.finite("pre_quant_scale").reshape(-1))

    nbytes = sum(tensor.nbytes for tensor in layer.parts.values())
    return shape, StoredKernel(
        name, read, nbytes, rotation(layer, shape), tuple(notes(layer, name))
    )


def notes(layer: StoredLayer, name: str) -> list[str]:
    """Returns what of a layer is not followed to the letter."""
    found = []
    if layer.has("input_scale") and exact(layer):
        found.append("input_scale left out: the input stays in full precision")
    elif layer.has("input_scale") and name not in ONE_FOR_ALL:
        found.append("input_scale left out: blocks of an input have scales of their own")
    elif name in ONE_FOR_ALL and not layer.has("input_scale") and not exact(layer):
        found.append(f"each token of an input has a scale, where ComfyUI has {ONE_FOR_ALL[name]}")
    more = [f"{key}={value!r}" for key, value in layer.settings.items() if key not in UNDERSTOOD]
    return [*found, *(f"{setting} of the marker not read" for setting in more)]


def input_scale(layer: StoredLayer) -> np.ndarray | None:
    """Returns the scale of a layer's input, `[1]`, or None if the file has none that is used.

    Raises:
        UserError: if it is no scale.
    """
    if not layer.has("input_scale") or layer.settings["format"] not in ONE_FOR_ALL:
        return None
    found = layer.scales("input_scale").reshape(1)
    if not found.all():
        raise UserError(f"{layer.name}.input_scale is 0, which inputs are divided by.")
    return found


def exact(layer: StoredLayer) -> bool:
    """Returns whether a layer's input is left in full precision."""
    return bool(layer.setting("full_precision_matrix_mult", False))


def rotation(layer: StoredLayer, shape: Shape) -> int:
    """Returns the channels of a rotated block; 0 where the format or the width has no rotation.

    Raises:
        UserError: if there is no regular Hadamard matrix of that size.
    """
    if layer.settings["format"] not in ALWAYS_ROTATED and not layer.setting("convrot", False):
        return 0
    size = layer.number("convrot_groupsize", CONVROT)
    if regular_size(size, size) != size or size == 1:
        raise UserError(
            f"{layer.name}: convrot_groupsize={size} is no power of 4, of which alone there are "
            "regular Hadamard matrices."
        )
    return 0 if shape[1] % size else size


def act_of(layer: StoredLayer, spec: ActSpec) -> ActSpec | None:
    """Returns `spec`, or None where the layer's input is left in full precision."""
    return None if exact(layer) else spec


def scale_shapes(shape: Shape) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes that a scale per channel, or one for all of them, may have."""
    return (shape[0], 1), (shape[0],), (1, 1), (1,), ()


def channel_scales(layer: StoredLayer, shape: Shape) -> np.ndarray:
    """Returns `weight_scale` as a scale per output channel, `[N, 1]`."""
    return np.broadcast_to(layer.scales("weight_scale").reshape(-1, 1), (shape[0], 1))


def check_scale(layer: StoredLayer, shape: Shape) -> None:
    """Checks the scale of a weight."""
    layer.check("weight_scale", scale_shapes(shape), FLOATS)
    rotation(layer, shape)


def read_int8(layer: StoredLayer, shape: Shape) -> Kernel:
    """Returns the kernel of `int8_tensorwise`."""
    codes = (layer.read("weight").view(np.uint8) ^ np.uint8(128)).reshape(shape)
    return Kernel(
        codes,
        channel_scales(layer, shape),
        WeightSpec(8, 0, True),
        act_of(layer, ActSpec(8, 0, True)),
        rotation=rotation(layer, shape),
    )


def read_float8(fmt: formats.Format, layer: StoredLayer, shape: Shape) -> Kernel:
    """Returns the kernel of `float8_e4m3fn` or `float8_e5m2`."""
    codes = layer.read("weight").view(np.uint8)
    bad = int((~np.isfinite(fmt.values()[codes])).sum())
    if bad:
        raise UserError(f"{bad} of {codes.size} values of {layer.name}.weight are not finite.")
    spec = WeightSpec(group_size=0, fmt=fmt)
    act = act_of(layer, ActSpec(group_size=0, fmt=fmt))
    return Kernel(codes.reshape(shape), channel_scales(layer, shape), spec, act)


def check_nvfp4(layer: StoredLayer, shape: Shape) -> None:
    """Checks the block scales of `nvfp4`: in tiles, padded."""
    size = formats.nvfp4.block_size
    if shape[1] % size:
        raise UserError(
            f"{layer.name}.weight has {shape[1]} input channels, which blocks of {size} do not divide."
        )
    tiles = tiled_shape(shape[0], shape[1] // size)
    layer.check("weight_scale", (tiles, (tiles[0] * tiles[1],)), (*E4M3, "uint8"))
    layer.check("weight_scale_2", ((), (1,)), FLOATS)


def read_nvfp4(layer: StoredLayer, shape: Shape) -> Kernel:
    """Returns the kernel of `nvfp4`."""
    tiled = layer.read("weight_scale").view(np.uint8)
    scale = from_tiles(tiled, shape[0], shape[1] // formats.nvfp4.block_size)
    check_bytes(layer, "weight_scale", scale)
    return Kernel(
        nibbles(layer.read("weight").view(np.uint8), high_first=True),
        scale,
        WeightSpec(fmt=formats.nvfp4),
        act_of(layer, ActSpec(fmt=formats.nvfp4)),
        tensor_scale=layer.scales("weight_scale_2").reshape(()),
    )


def check_bytes(layer: StoredLayer, part: str, scale: np.ndarray) -> None:
    """Raises `UserError` if a scale in E4M3 is NaN or negative."""
    bad = np.flatnonzero(scale.reshape(-1) >= 0x7F)
    if bad.size:
        value = formats.fp8_e4m3.values()[scale.reshape(-1)[bad[0]]]
        raise UserError(
            f"{bad.size} of {scale.size} values of {layer.name}.{part} are not scales: {value}."
        )


def check_lut(layer: StoredLayer, shape: Shape) -> None:
    """Checks the scales and the codebook of `asym_w4a8_int8`."""
    size = layer.number("group_size", 16)
    if shape[1] % size or shape[1] % 16:
        raise UserError(
            f"{layer.name}.weight has {shape[1]} input channels, which groups of {max(size, 16)} do "
            "not divide."
        )
    if not rotation(layer, shape):
        raise UserError(
            f"{layer.name}.weight has {shape[1]} input channels, which blocks of "
            f"{layer.number('convrot_groupsize', CONVROT)} do not divide; the format rotates always."
        )
    layer.check("weight_s_rel", ((shape[0], shape[1] // size),), (*E4M3, "uint8"))
    layer.check("weight_s_channel", ((shape[0],), (shape[0], 1)), FLOATS)
    layer.check("weight_codebook", ((16,),), FLOATS)


def read_lut(layer: StoredLayer, shape: Shape) -> Kernel:
    """Returns the kernel of `asym_w4a8_int8`."""
    steps = layer.read("weight_s_rel").view(np.uint8)
    check_bytes(layer, "weight_s_rel", steps)
    spec = WeightSpec(group_size=layer.number("group_size", 16), fmt=formats.lut4_e4m3)
    return Kernel(
        nibbles(layer.read("weight").view(np.uint8), high_first=False),
        steps,
        spec,
        act_of(layer, ActSpec(8, 0, True)),
        channel_scale=layer.scales("weight_s_channel").reshape(-1),
        codebook=layer.finite("weight_codebook"),
        rotation=rotation(layer, shape),
    )


def check_mxfp8(layer: StoredLayer, shape: Shape) -> None:
    """Checks the block scales of `mxfp8`: bytes of exponents, in tiles, padded.

    A weight whose sides are no multiples of 32 is stored padded, by how much its file does not say.
    """
    size = formats.mxfp8.block_size
    if shape[0] % size or shape[1] % size:
        raise UserError(
            f"{layer.name}.weight has {shape[0]} x {shape[1]} channels, which {size} does not divide: "
            "mxfp8 would have padded them."
        )
    tiles = tiled_shape(shape[0], shape[1] // size)
    layer.check("weight_scale", (tiles, (tiles[0] * tiles[1],)), (*E8M0, "uint8"))


def read_mxfp8(layer: StoredLayer, shape: Shape) -> Kernel:
    """Returns the kernel of `mxfp8`."""
    codes = layer.read("weight").view(np.uint8)
    tiled = layer.read("weight_scale").view(np.uint8)
    scale = from_tiles(tiled, shape[0], shape[1] // formats.mxfp8.block_size)
    for part, bad in (
        ("weight", ~np.isfinite(formats.mxfp8.values()[codes])),
        ("weight_scale", scale == 0xFF),
    ):
        if bad.any():
            raise UserError(
                f"{int(bad.sum())} of {bad.size} values of {layer.name}.{part} are not finite."
            )
    act = act_of(layer, ActSpec(fmt=formats.mxfp8))
    return Kernel(codes.reshape(shape), scale, WeightSpec(fmt=formats.mxfp8), act)


def check_int4(layer: StoredLayer, shape: Shape) -> None:
    """Checks the scales of `convrot_w4a4`, and that its products are of 4 bits on both sides."""
    kind, size = layer.setting("linear_dtype", "int4"), layer.number("quant_group_size", INT4_GROUP)
    if kind != "int4" or size != INT4_GROUP:
        raise UserError(
            f"{layer.name} says linear_dtype={kind!r}, quant_group_size={size} of {INT4}, of which "
            f"convert reads 'int4' and {INT4_GROUP} alone: what others do to the input is not known."
        )
    if shape[1] % INT4_GROUP or not rotation(layer, shape):
        raise UserError(
            f"{layer.name}.weight has {shape[1]} input channels, which blocks of "
            f"{layer.number('convrot_groupsize', CONVROT)} do not divide; the format rotates always."
        )
    layer.check("weight_scale", ((shape[0],), (shape[0], 1)), FLOATS)


def read_int4(layer: StoredLayer, shape: Shape) -> Kernel:
    """Returns the kernel of `convrot_w4a4`: signed codes of 4 bits, both sides with a scale per row."""
    codes = nibbles(layer.read("weight").view(np.uint8), high_first=False)
    return Kernel(
        codes ^ np.uint8(8),
        channel_scales(layer, shape),
        WeightSpec(4, 0, True),
        act_of(layer, ActSpec(4, 0, True)),
        rotation=rotation(layer, shape),
    )


INPUT = ("input_scale", "pre_quant_scale")
FORMATS = {
    INT8: StoredFormat(("int8",), 1, ("weight_scale",), check_scale, read_int8),
    "float8_e4m3fn": StoredFormat(
        (*E4M3, "uint8"),
        1,
        ("weight_scale",),
        check_scale,
        partial(read_float8, formats.fp8_e4m3),
        INPUT,
    ),
    "float8_e5m2": StoredFormat(
        ("float8_e5m2", "uint8"),
        1,
        ("weight_scale",),
        check_scale,
        partial(read_float8, formats.fp8_e5m2),
        INPUT,
    ),
    "nvfp4": StoredFormat(
        ("uint8",), 2, ("weight_scale", "weight_scale_2"), check_nvfp4, read_nvfp4, INPUT
    ),
    "mxfp8": StoredFormat((*E4M3, "uint8"), 1, ("weight_scale",), check_mxfp8, read_mxfp8, INPUT),
    INT4: StoredFormat(("int8", "uint8"), 2, ("weight_scale",), check_int4, read_int4),
    LUT: StoredFormat(
        ("int8", "uint8"),
        2,
        ("weight_s_rel", "weight_s_channel", "weight_codebook"),
        check_lut,
        read_lut,
    ),
}
