"""Our quantized kernels in ComfyUI's formats: what `qdit_convert.comfy` reads, written.

Dimensions: N rows (output channels), K columns (input channels), G groups along K.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qdit_convert.bits import in_tiles, packed_nibbles
from qdit_convert.comfy import INT8, LUT
from qdit_convert.stored_layer import MARKER
from qdit_jax.errors import UserError
from qdit_jax.quant import (
    ActQuant,
    ActSpec,
    QTensor,
    Rotation,
    code_rows,
    formats,
    ranges,
    scale_values,
    slots,
)

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
NVFP4 = "nvfp4"
INPUT_SCALE = "input_scale"
INT8_INPUT = ActSpec(8, 0, True)
FIT = {
    INT8: "qdit quantize --recipe w8a8-fast, with --method convrot for rotations",
    LUT: 'method "convrot" and Recipe.preset("w4a8", weight_format="lut4_e4m3", group_size=16, '
    "act_group_size=0, act_symmetric=True)",
    NVFP4: 'Recipe.preset("w4a16", weight_format="nvfp4")',
}


class Layer(NamedTuple):
    """A quantized layer of ours.

    Attributes:
        path: such as `blocks_0/attn/qkv`.
        kernel: of it.
        beside: the leaves beside the kernel, by slot.
    """

    path: str
    kernel: QTensor
    beside: Mapping[str, Any]

    def refuse(self, name: str, why: str) -> UserError:
        """Returns the error that the format `name` cannot hold this layer."""
        return UserError(
            f"{self.path} {why}, which the format {name} cannot hold; quantize again to fit it "
            f"({FIT[name]}), or export without --format."
        )


def written(layer: Layer, name: str) -> dict[str, np.ndarray]:
    """Returns the tensors of a layer in a format, by what stands after its name, rows first.

    Raises:
        UserError: if the format cannot hold the layer, naming it, and why.
    """
    check_beside(layer, name)
    return WRITERS[name](layer)


def check_beside(layer: Layer, name: str) -> None:
    """Raises `UserError` unless the format has a place for what stands beside a kernel."""
    for slot in slots("input") + slots("output"):
        if slot in layer.beside and not (slot == "rotation" and name != NVFP4):
            words = {"input_map": "scales or shifts its input", "low_rank": "has a 16-bit branch"}
            raise layer.refuse(name, words.get(slot, "rotates its input"))
    turn = layer.beside.get("rotation")
    if turn is not None and (turn.kind != "regular" or turn.signs is not None):
        raise layer.refuse(name, f"rotates its input by a {turn.kind} matrix, not a regular one")
    quantizer = layer.beside.get("act_quant")
    if quantizer is not None and not fits(quantizer, name, layer.kernel.shape[0]):
        raise layer.refuse(name, f"quantizes its input to {in_words(quantizer.spec)}")


def fits(quantizer: ActQuant, name: str, num_channels: int) -> bool:
    """Returns whether a layer's input is quantized as ComfyUI does for a format."""
    spec = quantizer.spec
    if name == NVFP4:
        return spec.fmt is formats.nvfp4 and not spec.per_timestep
    whole = spec.group_size == 0 or spec.group_size >= num_channels
    alike = (spec.bits, spec.symmetric, spec.mode) == (8, True, "dynamic") and whole
    plain = spec.fmt is None and not spec.unsigned and not spec.shift
    return alike and plain and spec.range_fn in (ranges.minmax, ranges.absmax)


def in_words(spec: ActSpec) -> str:
    """Returns how an input is quantized, briefly."""
    if spec.fmt is not None:
        return spec.fmt.name + (", static per timestep" if spec.per_timestep else "")
    sides = "symmetric" if spec.symmetric else "asymmetric"
    size = f"in groups of {spec.group_size}" if spec.group_size else "per token"
    return f"{spec.bits} bits, {sides}, {spec.mode}, {size}"


def marked(layer: Layer, name: str, **settings: Any) -> np.ndarray:
    """Returns the marker of a layer: JSON in bytes."""
    said: dict[str, Any] = {"format": name, **settings}
    turn: Rotation | None = layer.beside.get("rotation")
    if turn is not None:
        said |= {"convrot": True, "convrot_groupsize": turn.size}
    if "act_quant" not in layer.beside:
        said["full_precision_matrix_mult"] = True
    return np.frombuffer(json.dumps(said).encode(), np.uint8).copy()


def int8_tensors(layer: Layer) -> dict[str, np.ndarray]:
    """Returns the tensors of `int8_tensorwise`."""
    q = layer.kernel
    if q.bits != 8 or q.fmt is not None or not q.symmetric:
        raise layer.refuse(INT8, f"has {weights_in_words(q)}, not symmetric integers of 8 bits")
    if q.num_groups != 1 or q.channel_group != 1:
        raise layer.refuse(INT8, f"has {weights_in_words(q)}, not a scale per output channel")
    return {
        "weight": (np.asarray(code_rows(q)) ^ np.uint8(128)).view(np.int8),
        "weight_scale": np.asarray(scale_values(q), np.float32).T,
        MARKER: marked(layer, INT8, per_row=True),
    }


def lut_tensors(layer: Layer) -> dict[str, np.ndarray]:
    """Returns the tensors of `asym_w4a8_int8`."""
    q = layer.kernel
    if q.codebook is None or q.fmt is None:
        raise layer.refuse(LUT, f"has {weights_in_words(q)}, not a codebook (lut4_e4m3)")
    if "rotation" not in layer.beside:
        raise layer.refuse(LUT, "does not rotate its input")
    num_channels = q.shape[0]
    size = q.group_size
    if not size or num_channels % size or num_channels % 16:
        raise layer.refuse(LUT, f"has {num_channels} input channels in groups of {size}")
    steps = np.asarray(q.fmt.step_value(q.scale)).T
    stored = steps.astype(E4M3)
    if (stored.astype(np.float32) != steps).any():
        raise layer.refuse(LUT, "has whole steps of levels that E4M3 does not hold")
    return {
        "weight": packed_nibbles(np.asarray(code_rows(q)), high_first=False).view(np.int8),
        "weight_s_rel": stored,
        "weight_s_channel": np.asarray(q.channel_scale, np.float32),
        "weight_codebook": np.asarray(q.codebook, np.float32),
        MARKER: marked(layer, LUT, group_size=size),
    }


def nvfp4_tensors(layer: Layer) -> dict[str, np.ndarray]:
    """Returns the tensors of `nvfp4`."""
    q = layer.kernel
    if q.fmt is not formats.nvfp4:
        raise layer.refuse(NVFP4, f"has {weights_in_words(q)}, not NVFP4")
    if q.shape[0] % q.group_size:
        raise layer.refuse(NVFP4, f"has {q.shape[0]} input channels, no multiple of 16")
    found = {
        "weight": packed_nibbles(np.asarray(code_rows(q)), high_first=True),
        "weight_scale": in_tiles(np.asarray(q.scale).T).view(E4M3),
        "weight_scale_2": np.asarray(q.tensor_scale, np.float32),
        MARKER: marked(layer, NVFP4),
    }
    quantizer = layer.beside.get("act_quant")
    if quantizer is not None and quantizer.scale is not None:
        found[INPUT_SCALE] = np.asarray(quantizer.scale, np.float32).reshape(())
    return found


def weights_in_words(q: QTensor) -> str:
    """Returns how a kernel is quantized, briefly."""
    name = f"{'symmetric' if q.symmetric else 'asymmetric'} int{q.bits}"
    size = f"in groups of {q.group_size}" if q.group_size else "per channel"
    return f"{q.fmt.name if q.fmt is not None else name} weights {size}"


WRITERS: dict[str, Callable[[Layer], dict[str, np.ndarray]]] = {
    INT8: int8_tensors,
    LUT: lut_tensors,
    NVFP4: nvfp4_tensors,
}
# Of a layer that is several tensors in the file: those that all of them share, not cut by rows.
SHARED = (MARKER, "weight_codebook", "weight_scale_2", INPUT_SCALE)


def parts_of_rows(
    tensors: Mapping[str, np.ndarray], first: int, last: int
) -> dict[str, np.ndarray]:
    """Returns the tensors of some of a layer's output channels."""
    return {part: array if part in SHARED else array[first:last] for part, array in tensors.items()}
