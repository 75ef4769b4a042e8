"""The 4-bit layers of SVDQuant that diffusers' `nunchaku_lite` loads.

Their tensors lie in the order in which the kernels of Nunchaku read them from memory: tiles of 128
output channels, inside which bits of output and input channels are exchanged. Every tensor is put back
by the inverse of its permutation; widths that are no multiples of 128 are padded there, and refused.

Dimensions: N output channels, K input channels, G groups along K, R rank.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Shaped, UInt8

from qdit_convert.bits import nibbles
from qdit_convert.kernels import Kernel, StoredKernel
from qdit_convert.stored_layer import E4M3, FLOATS, StoredLayer
from qdit_convert.tensors import StoredTensor
from qdit_jax.errors import UserError
from qdit_jax.quant import ActSpec, WeightSpec, formats

Shape = tuple[int, int]
TILE, GROUP = 128, 64
PARTS = ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up")
NAME = "svdq_w4a4"


def unpacked(
    packed: Shaped[np.ndarray, "..."], sizes: tuple[int, ...], order: tuple[int, ...]
) -> np.ndarray:
    """Returns the axes `sizes` of an array that was stored with them in another order."""
    stored = packed.reshape([sizes[axis] for axis in order])
    return stored.transpose(np.argsort(order))


def codes_of(packed: Shaped[np.ndarray, "N K2"]) -> UInt8[np.ndarray, "N K"]:
    """Returns the codes of a weight, 0 to 15."""
    codes = nibbles(packed.view(np.uint8), high_first=False)
    rows, columns = codes.shape
    sizes = (rows // TILE, 8, 2, 8, columns // 64, 2, 4, 8)
    return unpacked(codes, sizes, (0, 4, 1, 3, 6, 2, 5, 7)).reshape(rows, columns)


def vector_of(packed: Shaped[np.ndarray, " N"]) -> Shaped[np.ndarray, " N"]:
    """Returns a vector of one value per channel: a bias, a smooth factor."""
    sizes = (packed.size // TILE, 8, 2, 4, 2)
    return unpacked(packed, sizes, (0, 1, 3, 2, 4)).reshape(-1)


def group_scales(packed: Shaped[np.ndarray, "G N"]) -> Shaped[np.ndarray, "N G"]:
    """Returns the scales of groups of 64 channels."""
    count, rows = packed.shape
    sizes = (rows // TILE, 8, 2, 4, 2, count)
    return unpacked(packed, sizes, (0, 5, 1, 3, 2, 4)).reshape(rows, count)


def block_scales(packed: Shaped[np.ndarray, "G N"]) -> Shaped[np.ndarray, "N G"]:
    """Returns the scales of blocks of 16 channels."""
    count, rows = packed.shape
    sizes = (rows // TILE, 4, 4, 8, count // 4, 4)
    return unpacked(packed, sizes, (0, 4, 3, 2, 1, 5)).reshape(rows, count)


def branch_side(packed: Shaped[np.ndarray, "C R"], *, down: bool) -> Shaped[np.ndarray, "C R"]:
    """Returns one side of a branch, channels first."""
    channels, rank = packed.shape
    sizes = (channels // 16, rank // 16, 2, 8, 2, 4, 2)
    tiles = unpacked(packed, sizes, (0, 1, 3, 5, 2, 4, 6))
    tiles = tiles.reshape(channels // 16, rank // 16, 16, 16)
    if down:  # tiles have the rank first
        tiles = tiles.transpose(0, 1, 3, 2)
    return tiles.transpose(0, 2, 1, 3).reshape(channels, rank)


def is_fp4(layer: StoredLayer) -> bool:
    """Returns whether the codes are NVFP4, not integers."""
    return layer.parts["wscales"].dtype.name in E4M3


def stored_kernel(layer: StoredLayer) -> tuple[Shape, StoredKernel]:
    """Returns the shape `[N, K]` of a layer's weight, and how to read it.

    Raises:
        UserError: if a tensor is missing or not as the format has it.
    """
    for old in ("lora_down", "smooth"):
        if layer.has(old):
            raise UserError(
                f"{layer.name}.{old} is of Nunchaku's own files; convert reads those of diffusers' "
                "nunchaku_lite (qweight, wscales, smooth_factor, proj_down, proj_up)."
            )
    for part in PARTS:
        layer.need(part, f"the format {NAME}")
    weight, fp4 = layer.parts["qweight"], is_fp4(layer)
    if len(weight.shape) != 2 or weight.shape[0] % TILE or (2 * weight.shape[1]) % TILE:
        raise UserError(
            f"{layer.name}.qweight has shape {list(weight.shape)}; layers of {NAME} have multiples of "
            f"{TILE} channels on both sides, two input channels in a byte."
        )
    rows, columns = shape = (weight.shape[0], 2 * weight.shape[1])
    layer.check("qweight", (weight.shape,), ("int8", "uint8"))
    group = formats.nvfp4.block_size if fp4 else GROUP
    layer.check("wscales", ((columns // group, rows),), E4M3 if fp4 else FLOATS)
    layer.check("smooth_factor", ((columns,),), FLOATS)
    rank = layer.parts["proj_down"].shape[-1:]
    if len(rank) != 1 or rank[0] % 16:
        raise UserError(f"{layer.name}.proj_down has shape {layer.parts['proj_down'].shape}.")
    layer.check("proj_down", ((columns, *rank),), FLOATS)
    layer.check("proj_up", ((rows, *rank),), FLOATS)
    if fp4:
        layer.need("wtscale", f"the format {NAME} with nvfp4")
        layer.check("wtscale", ((1,), ()), FLOATS)
    if layer.has("wcscales"):
        layer.check("wcscales", ((rows,),), FLOATS)
    nbytes = sum(tensor.nbytes for tensor in layer.parts.values())
    name = f"{NAME} {'nvfp4' if fp4 else 'int4'}"
    return shape, StoredKernel(name, lambda: read(layer), nbytes)


def read(layer: StoredLayer) -> Kernel:
    """Returns the kernel: codes, smooth factor and branch, in the order of channels."""
    smooth = vector_of(layer.scales("smooth_factor"))
    if not smooth.all():
        raise UserError(f"a value of {layer.name}.smooth_factor is 0, which inputs are divided by.")
    down = branch_side(layer.finite("proj_down"), down=True)
    up = branch_side(layer.finite("proj_up"), down=False)
    codes = codes_of(layer.read("qweight"))
    kernel = fp4_kernel(layer, codes) if is_fp4(layer) else int4_kernel(layer, codes)
    # The branch of the file reads the input before it is divided; ours reads it afterwards.
    branch = {"down": down * smooth[:, None], "up": up.T} if down.size else {}
    return replace(kernel, inverse_scale=1 / smooth, **branch)


def int4_kernel(layer: StoredLayer, codes: UInt8[np.ndarray, "N K"]) -> Kernel:
    """Returns symmetric integers in groups of 64, with inputs alike."""
    spec = WeightSpec(4, GROUP, True)
    scale = group_scales(layer.scales("wscales"))
    return Kernel(codes ^ np.uint8(8), scale, spec, ActSpec(4, GROUP, True))


def fp4_kernel(layer: StoredLayer, codes: UInt8[np.ndarray, "N K"]) -> Kernel:
    """Returns NVFP4; raises `UserError` for scales per channel, which a kernel has no place for."""
    factor = layer.scales("wtscale").reshape(())
    if layer.has("wcscales"):
        channels = layer.scales("wcscales")
        if (channels != 1).any():
            raise UserError(
                f"{layer.name}.wcscales holds scales per output channel ({channels.min()} to "
                f"{channels.max()}) beside those of blocks, which a kernel has no place for."
            )
    layer.scales("wscales")  # NaN and negative values are named
    scale = block_scales(layer.read("wscales").view(np.uint8))
    return Kernel(
        codes,
        scale,
        WeightSpec(fmt=formats.nvfp4),
        ActSpec(fmt=formats.nvfp4),
        tensor_scale=factor,
    )


def bias_of(tensor: StoredTensor) -> StoredTensor:
    """Returns the bias of such a layer, which lies in the order of the kernels too."""
    return replace(tensor, read=lambda: vector_of(tensor.read()))
