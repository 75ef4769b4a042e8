"""Our checkpoints as files that ComfyUI loads: the authors' names, weights in a format of `comfy_writing`.

The inverse of a layout's plan: its leaves say which tensors each parameter comes from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qdit_convert.inverse import written_in
from qdit_convert.plan import Leaf, Transform, linear, same
from qdit_convert.quantized import row_order
from qdit_jax.errors import UserError

if TYPE_CHECKING:
    from qdit_jax.checkpoint import Checkpoint
    from qdit_jax.files import PathLike
    from qdit_jax.types import Params

FORMATS = ("int8_tensorwise", "asym_w4a8_int8", "nvfp4")
WRITTEN_BY = {"format": "pt", "qdit_jax_weights": "1"}


class Written(NamedTuple):
    """What an export holds: `quantized` weights in its format, `kept` tensors as they were."""

    layout: str
    quantized: int
    kept: int


def export(
    checkpoint: Checkpoint, out: PathLike, *, format: str, overwrite: bool = False
) -> Written:
    """Writes the network of `checkpoint` to the safetensors file `out`, in the authors' names.

    Quantized weights are written in ComfyUI's `format`, one of `FORMATS`, exactly; everything else as it
    is. An autoencoder is not written.

    Raises:
        UserError: if the checkpoint is not quantized, its family has no layout that is written, or a
            layer does not fit the format; nothing is written then.
    """
    from safetensors.numpy import save_file

    from qdit_jax.files import check_free, check_space, replaced_file

    check_free(out, overwrite, "weights")
    if format not in FORMATS:
        raise UserError(f"format={format!r} is not known; use one of {', '.join(FORMATS)}.")
    layout, plan = written_in(checkpoint.model)
    arrays, quantized = tensors_of(checkpoint.params, plan.leaves, format)
    check_space(out, sum(array.nbytes for array in arrays.values()))
    with replaced_file(out, "weights") as file:
        save_file(arrays, file, metadata=WRITTEN_BY)
    sources = sum(len(leaf.sources) for leaf in plan.leaves)
    return Written(layout.title, quantized, sources - quantized)


def tensors_of(
    params: Params, leaves: Sequence[Leaf], format: str
) -> tuple[dict[str, np.ndarray], int]:
    """Returns the tensors of a file by name, and how many of its weights are quantized."""
    from flax.traverse_util import flatten_dict

    from qdit_convert import comfy_writing
    from qdit_jax.quant import LEAVES, QTensor

    flat = dict(flatten_dict(params, sep="/"))
    arrays: dict[str, np.ndarray] = {}
    quantized = 0
    slots = [row.slot for row in LEAVES.values() if row.slot is not None]
    for leaf in leaves:
        if leaf.path not in flat:
            continue  # computed, not stored
        value = flat.pop(leaf.path)
        if not isinstance(value, QTensor):
            arrays |= plain_tensors(leaf, np.asarray(value))
            continue
        path = leaf.path.removesuffix("/kernel")
        found = {slot: flat.pop(f"{path}/{slot}") for slot in slots if f"{path}/{slot}" in flat}
        layer = comfy_writing.Layer(path, value, found)
        order = row_order(leaf.transform, value.shape[1])
        if order is None or leaf.copies or not leaf.path.endswith("/kernel"):
            raise layer.refuse(format, "is quantized and no kernel of a linear layer in the file")
        arrays |= layer_tensors(leaf, comfy_writing.written(layer, format), np.argsort(order))
        quantized += len(leaf.sources)
    if flat:
        path = next(iter(flat))
        raise UserError(
            f"the checkpoint has {path} ({type(flat[path]).__name__}), for which the format {format} has "
            f"no place ({len(flat)} such entries); quantize again without it, or export without --format."
        )
    if not quantized:
        raise UserError(
            f"the checkpoint has no quantized weights to write in the format {format}; quantize it first "
            f"({comfy_writing.FIT[format]})."
        )
    return arrays, quantized


def layer_tensors(
    leaf: Leaf, tensors: Mapping[str, np.ndarray], order: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns a quantized layer's tensors under the file's names, its rows in the file's order."""
    from qdit_convert.comfy_writing import SHARED, parts_of_rows

    whole = dict(tensors)
    if len(leaf.sources) > 1 or not np.array_equal(order, np.arange(len(order))):
        if "weight_scale_2" in whole:
            raise UserError(
                f"{leaf.path}: block scales lie in tiles of 128 rows, which the tensors of a layer that is "
                "several in the file, or has its rows in another order there, do not have."
            )
        whole = {k: v if k in SHARED else v[order] for k, v in whole.items()}
    found: dict[str, np.ndarray] = {}
    first = 0
    for key in leaf.sources:
        last = first + leaf.expected[key][0][0]
        parts = parts_of_rows(whole, first, last) if len(leaf.sources) > 1 else whole
        name = key.removesuffix(".weight")
        found |= {f"{name}.{part}": np.ascontiguousarray(array) for part, array in parts.items()}
        first = last
    return found


def plain_tensors(leaf: Leaf, array: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the tensors of the file that a leaf in full precision comes from."""
    shapes = leaf.expected
    sizes = [shapes[key][0] for key in leaf.sources]
    if not sizes:
        return {}
    shape = (sum(size[0] for size in sizes), *sizes[0][1:])
    whole = restored(leaf.transform, array, shape)
    ends = np.cumsum([size[0] for size in sizes])[:-1]
    parts = np.split(whole, ends)
    found = {k: np.ascontiguousarray(part) for k, part in zip(leaf.sources, parts, strict=True)}
    return found | {key: found[leaf.sources[0]] for key in leaf.copies}


def restored(transform: Transform, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the array of that shape of which `transform`, which moves values alone, made `array`."""
    if transform is same:
        return array.reshape(shape)
    if transform is linear:
        return array.T.reshape(shape)
    places = transform(np.arange(math.prod(shape)).reshape(shape))
    whole = np.empty(math.prod(shape), array.dtype)
    whole[places.reshape(-1)] = array.reshape(-1)
    return whole.reshape(shape)
