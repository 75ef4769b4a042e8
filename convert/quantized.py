"""Weights that a file stores quantized become kernels that are `QTensor`s, below every layout's plan.

A layer says its format by a marker beside its weight (`comfy_quant`), in the file's metadata, or by the
names of its tensors. Its tensors become one, under the weight's name and with the weight's shape, so
that layouts see what they see in a file of full precision.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from qdit_convert import comfy, nunchaku, nunchaku_awq
from qdit_convert.kernels import StoredKernel, joined, leaves_of
from qdit_convert.plan import Leaf, Plan, Transform
from qdit_convert.stored_layer import MARKER, StoredLayer, marker_settings
from qdit_convert.tensors import StateDict, StoredTensor, listing
from qdit_jax.errors import UserError

METADATA = "_quantization_metadata"
SCALED = "scaled_fp8"  # what earlier FP8 files of ComfyUI hold beside `scale_weight`, `scale_input`
OLD_NAMES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
REMEDY = "take the full-precision file and quantize it with qdit quantize"


def with_quantized(state: StateDict, metadata: Mapping[str, str]) -> StateDict:
    """Returns `state` with one tensor for every quantized weight, its scales and marker inside.

    Args:
        metadata: what the file's header says.

    Raises:
        UserError: naming the layer and what is unknown, missing or misshapen.
    """
    tensors = _in_new_names(state.tensors)
    said = _said(tensors, metadata) | _said_earlier(state.tensors)
    packed = [key.rpartition(".")[0] for key in tensors if key.endswith(".qweight")]
    if not said and not packed:
        return state
    nunchaku_awq.check_order(metadata)
    found = dict(tensors)
    names = dict.fromkeys([*said, *packed])
    children = _children(tensors, names)
    for name in names:
        parts = children[name]
        if name in said:
            settings = said[name]
            layer = StoredLayer(
                name, settings, _known(parts, comfy.FORMATS.get(settings["format"]))
            )
            shape, kernel = comfy.stored_kernel(layer, settings["format"])
        else:
            layer = StoredLayer(name, {}, {k: v for k, v in parts.items() if k != "bias"})
            only_weights = layer.has(nunchaku_awq.ZEROS)
            shape, kernel = (nunchaku_awq if only_weights else nunchaku).stored_kernel(layer)
            if "bias" in parts and not only_weights:
                found[f"{name}.bias"] = nunchaku.bias_of(parts["bias"])
        for part in (*layer.parts, MARKER):
            found.pop(f"{name}.{part}", None)
        found[f"{name}.weight"] = _tensor(name, shape, kernel)
    return replace(state, tensors=found)


def _in_new_names(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns the tensors with today's names for the scales of earlier FP8 files."""
    if not any(key.rpartition(".")[2] == SCALED for key in tensors):
        return dict(tensors)
    renamed = {}
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        if part != SCALED:
            renamed[f"{layer}.{OLD_NAMES[part]}" if part in OLD_NAMES else key] = tensor
    return renamed


def _said(
    tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Returns the settings of every layer that says its format."""
    said = dict(_in_metadata(tensors, metadata))
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        if part == MARKER:
            settings = marker_settings(name, tensor)
            if name in said and said[name].get("format") != settings.get("format"):
                raise UserError(
                    f"{name} has the format {settings.get('format')!r} by its marker, and "
                    f"{said[name].get('format')!r} by the file's {METADATA}."
                )
            said[name] = settings
        elif part == "weight_scale" and name not in said:
            # Without a marker, a scale beside an 8-bit float can be one thing only.
            weight = tensors.get(f"{name}.weight")
            if weight is not None and weight.dtype.name in FLOAT8:
                said[name] = {"format": weight.dtype.name}
    for name, settings in said.items():
        if not isinstance(settings.get("format"), str):
            raise UserError(f"{name} is said to be quantized, but not in which format.")
    return said


def _said_earlier(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, Any]]:
    """Returns the settings of layers of earlier FP8 files whose inputs stay in full precision.

    A network says so by two values in `scaled_fp8`; a file may hold several networks.
    """
    markers = {
        key.removesuffix(SCALED): math.prod(tensor.shape)
        for key, tensor in tensors.items()
        if key.rpartition(".")[2] == SCALED
    }
    found = {}
    for key in tensors:
        name, _, part = key.rpartition(".")
        weight = tensors.get(f"{name}.weight")
        own = max((p for p in markers if key.startswith(p)), key=len, default=None)
        is_stored = weight is not None and weight.dtype.name in FLOAT8
        if part == "scale_weight" and is_stored and own is not None and markers[own] == 2:
            found[name] = {"format": weight.dtype.name, "full_precision_matrix_mult": True}
    return found


def _in_metadata(
    tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    if METADATA not in metadata:
        return {}
    try:
        content = json.loads(metadata[METADATA])
        layers = content["layers"]
        prefix = _prefix(tensors, next(iter(layers), ""))
        said = {prefix + name: dict(settings) for name, settings in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the file's {METADATA} is not understood ({error!r}).") from None
    absent = [name for name in said if f"{name}.weight" not in tensors]
    if absent:
        raise UserError(
            f"the file's {METADATA} names {len(absent)} layers that the file lacks: {listing(absent)}."
        )
    return said


def _prefix(tensors: Mapping[str, StoredTensor], name: str) -> str:
    """Returns what stands before a layer's name in the file, where its metadata leaves that out."""
    end = f"{name}.weight"
    found = [key for key in tensors if key.endswith(f".{end}")]
    return found[0].removesuffix(end) if end not in tensors and len(found) == 1 else ""


def _children(
    tensors: Mapping[str, StoredTensor], names: Mapping[str, None]
) -> dict[str, dict[str, StoredTensor]]:
    """Returns the tensors of every layer by what stands after its name."""
    found: dict[str, dict[str, StoredTensor]] = {name: {} for name in names}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        if name in found:
            found[name][part] = tensor
    return found


def _known(
    parts: Mapping[str, StoredTensor], fmt: comfy.StoredFormat | None
) -> dict[str, StoredTensor]:
    """Returns the tensors that a format knows; others stay in the file, where they are unexpected."""
    names = ("weight",) if fmt is None else ("weight", *fmt.parts, *fmt.optional)
    return {name: parts[name] for name in names if name in parts}


def _tensor(name: str, shape: tuple[int, int], kernel: StoredKernel) -> StoredTensor:
    def read() -> np.ndarray:
        raise UserError(
            f"{name}.weight is stored quantized ({kernel.format}) where no layer holds a quantized "
            f"kernel; {REMEDY}."
        )

    return StoredTensor(shape, np.dtype("f4"), read, quantized=kernel)


def check_places(plan: Plan, tensors: Mapping[str, StoredTensor]) -> None:
    """Raises `UserError` for a quantized tensor that is no kernel of a linear layer, by name."""
    for leaf in plan.leaves:
        keys = [key for key in leaf.expected if key in tensors]
        stored = [key for key in keys if tensors[key].quantized is not None]
        if not stored:
            continue
        kernel = tensors[stored[0]].quantized
        assert kernel is not None
        if len(stored) < len(leaf.sources):
            plain = next(key for key in keys if key not in stored)
            raise UserError(
                f"{stored[0]} is stored quantized ({kernel.format}) and {plain} is not, but both are "
                f"one layer here; {REMEDY}."
            )
        num_rows = sum(tensors[key].shape[0] for key in leaf.sources)
        in_network = plan.family not in ("vae", "inception") and leaf.path.endswith("/kernel")
        if leaf.copies or not in_network or row_order(leaf.transform, num_rows) is None:
            raise UserError(
                f"{stored[0]} is stored quantized ({kernel.format}), but is no kernel of a linear layer "
                f"that can be; {REMEDY}."
            )


def row_order(transform: Transform, num_rows: int) -> np.ndarray | None:
    """Returns which row of a file's weight each output channel is; None if it makes no kernel."""
    try:
        moved = transform(np.arange(num_rows).reshape(num_rows, 1))
    except ValueError:
        return None
    return moved[0] if moved.shape == (1, num_rows) else None


def quantized_leaves(leaf: Leaf, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Returns the leaves of a quantized kernel by path; empty if the leaf is not quantized."""
    found = {key: tensors[key].quantized for key in leaf.sources}
    kernels = {key: kernel.read() for key, kernel in found.items() if kernel is not None}
    if not kernels:
        return {}
    whole = joined(kernels)
    order = row_order(leaf.transform, len(whole.codes))
    assert order is not None, "check_places refuses it"
    return leaves_of(leaf.path, whole.rows(order))


def formats_of(plan: Plan, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Returns the formats of a network's quantized kernels, each once."""
    return list(dict.fromkeys(kernel.format for kernel in _kernels(plan, tensors)))


def quantized_notes(plan: Plan, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Returns what was found, by format, and what is not followed to the letter."""
    kernels = _kernels(plan, tensors)
    notes = []
    for name in dict.fromkeys(kernel.format for kernel in kernels):
        group = [kernel for kernel in kernels if kernel.format == name]
        sizes = Counter(kernel.rotation for kernel in group if kernel.rotation)
        turned = [f"{n} with inputs rotated in blocks of {size}" for size, n in sizes.items()]
        notes.append(
            f"{len(group)} weights stored as {name} kept bit for bit"
            + (f" ({', '.join(turned)})" if turned else "")
        )
        more = Counter(note for kernel in group for note in kernel.notes)
        notes += [f"{name}: {note} ({count} weights)" for note, count in more.items()]
    return notes


def _kernels(plan: Plan, tensors: Mapping[str, StoredTensor]) -> list[StoredKernel]:
    keys = [key for leaf in plan.leaves for key in leaf.sources if key in tensors]
    return [kernel for key in keys if (kernel := tensors[key].quantized) is not None]
