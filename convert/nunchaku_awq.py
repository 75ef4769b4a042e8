"""The weight-only layers of diffusers' `nunchaku_lite`: 4 bits in groups of 64, and any zero.

`w = code * wscales + wzeros`, with a zero in units of the weight that need be no whole number of steps.
Here a group's zero is the nearest code, as ever, and what it lacks is a branch beside the kernel: the sum
of a group's inputs times what its zero is off. Scales, zeros and bias lie in the order of the channels;
codes lie as Nunchaku's kernels read them, four output channels in a row of int32 words.

Dimensions: N output channels, K input channels, G groups along K.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int32, UInt8

from qdit_convert.bits import nibbles
from qdit_convert.kernels import Kernel, StoredKernel
from qdit_convert.nunchaku import GROUP, Shape, unpacked
from qdit_convert.stored_layer import FLOATS, StoredLayer
from qdit_convert.tensors import bfloat16
from qdit_jax.errors import UserError
from qdit_jax.quant import WeightSpec

NAME = "awq_w4a16"
ZEROS = "wzeros"  # which no other format has
INTERLEAVED = "adanorm_awq_w4a16"  # in Nunchaku's own order of modulations, with 1 added to scales
ROWS = 4  # output channels in a row of words
GREATEST_CODE = 15


def stored_kernel(layer: StoredLayer) -> tuple[Shape, StoredKernel]:
    """Returns the shape `[N, K]` of a layer's weight, and how to read it.

    Raises:
        UserError: if a tensor is missing or not as the format has it.
    """
    for part in ("qweight", "wscales", ZEROS):
        layer.need(part, f"the format {NAME}")
    words = layer.parts["qweight"].shape
    if len(words) != 2 or 0 in words or (2 * words[1]) % GROUP:
        raise UserError(
            f"{layer.name}.qweight has shape {list(words)}; layers of {NAME} have a row of int32 words "
            f"for {ROWS} output channels, and a multiple of {GROUP} input channels."
        )
    layer.check("qweight", (words,), ("int32", "uint32"))
    rows, columns = shape = (ROWS * words[0], 2 * words[1])
    for part in ("wscales", ZEROS):
        layer.check(part, ((columns // GROUP, rows),), FLOATS)
    nbytes = sum(tensor.nbytes for tensor in layer.parts.values())
    return shape, StoredKernel(NAME, lambda: read(layer), nbytes)


def codes_of(words: Int32[np.ndarray, "N4 K2"]) -> UInt8[np.ndarray, "N K"]:
    """Returns the codes of a weight, 0 to 15.

    A row of words holds, group by group of 64 input channels, eight words of each of four output
    channels. Of a channel's bits, those of 32, 4 and 2 say which word, those of 1, 16 and 8 which four
    bits of it, the lowest first.
    """
    codes = nibbles(words.astype("<u4").view(np.uint8), high_first=False)
    quarters, groups = len(codes), codes.shape[1] // (ROWS * GROUP)
    sizes = (quarters, ROWS, groups, 2, 4, 4, 2)  # of channels: 32s, 8s, 2s, units
    order = (0, 2, 1, 3, 5, 6, 4)
    return unpacked(codes, sizes, order).reshape(quarters * ROWS, groups * GROUP)


def read(layer: StoredLayer) -> Kernel:
    """Returns the kernel, and the branch of its zeros unless all are whole codes."""
    scale, zero = layer.scales("wscales").T, layer.finite(ZEROS).T  # [N, G]
    zero_point, missing = whole_zeros(scale, zero)
    spec = WeightSpec(4, GROUP, symmetric=False)
    codes = codes_of(layer.read("qweight"))
    if not missing.any():
        return Kernel(codes, scale, spec, None, zero_point)
    down = np.repeat(np.eye(missing.shape[1], dtype=bfloat16()), GROUP, axis=0)
    return Kernel(codes, scale, spec, None, zero_point, down=down, up=narrowed(missing.T))


def whole_zeros(
    scale: Float[np.ndarray, "N G"], zero: Float[np.ndarray, "N G"]
) -> tuple[UInt8[np.ndarray, "N G"], Float[np.ndarray, "N G"]]:
    """Returns the code nearest to 0.0 of every group, and what has to be added to its weights."""
    steps = np.divide(-zero, scale, out=np.zeros_like(zero), where=scale > 0)
    zero_point = np.clip(np.rint(steps), 0, GREATEST_CODE)
    missing = zero.astype(np.float64) + zero_point * scale.astype(np.float64)
    return zero_point.astype(np.uint8), missing.astype(np.float32)


def narrowed(values: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Returns values in bfloat16 if it holds them all exactly, else as they are."""
    narrow = values.astype(bfloat16())
    return narrow if np.array_equal(narrow.astype(np.float32), values) else values


def check_order(metadata: Mapping[str, str]) -> None:
    """Raises `UserError` if a file's header says that modulations are in Nunchaku's own order.

    Their tensors have the same names and shapes.
    """
    if INTERLEAVED in metadata.get("quantization_config", ""):
        raise UserError(
            f"the file's quantization_config says {INTERLEAVED}: its modulations lie in the order of "
            "Nunchaku's own networks, channel by channel; take the folder that diffusers loads."
        )
