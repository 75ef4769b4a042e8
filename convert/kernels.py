"""A quantized weight as somebody's file stores it, and the leaves that it becomes in our tree.

Dimensions: N rows (output channels), K columns (input channels), G groups along K, R rank.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, Num, UInt8

from qdit_jax.errors import UserError

if TYPE_CHECKING:
    from qdit_jax.quant import ActSpec, WeightSpec
    from qdit_jax.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class StoredKernel:
    """A quantized weight of a file, not yet read.

    Attributes:
        format: the file's name of the format.
        read: returns it.
        nbytes: of all its tensors in the file.
        rotation: channels of a block in which the layer's inputs are rotated; 0 for none.
        notes: what of the file is not followed to the letter.
    """

    format: str
    read: Callable[[], Kernel]
    nbytes: int
    rotation: int = 0
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A quantized weight, a row per output channel, and what its layer needs beside it.

    Attributes:
        codes: as a `QTensor` of `spec` counts them: signed codes with half their range added.
        scale: as a `QTensor` stores it.
        zero_point: the code of 0.0 of every group; None for symmetric codes and number formats.
        spec, act: of the weight and of the layer's input; act None leaves the input as it is.
        act_scale: what a static `act` rounds by (see `ActQuant.scale`); None where it is dynamic.
        tensor_scale, channel_scale, codebook: see `QTensor`; None where the format has none.
        rotation: channels of a block in which the input is rotated; 0 for none.
        inverse_scale: what the input is multiplied by, before that; None for 1.
        down, up: a branch in 16 bits of the input after both, `x @ down @ up`; None for none.
    """

    codes: UInt8[np.ndarray, "N K"]
    scale: Num[np.ndarray, "N G"]
    spec: WeightSpec
    act: ActSpec | None
    act_scale: Float[np.ndarray, " 1"] | None = None
    zero_point: UInt8[np.ndarray, "N G"] | None = None
    tensor_scale: np.ndarray | None = None
    channel_scale: Float[np.ndarray, " N"] | None = None
    codebook: Float[np.ndarray, " E"] | None = None
    rotation: int = 0
    inverse_scale: Float[np.ndarray, " K"] | None = None
    down: Float[np.ndarray, "K R"] | None = None
    up: Float[np.ndarray, "R N"] | None = None

    def rows(self, order: Int[np.ndarray, " N"]) -> Kernel:
        """Returns the kernel with its output channels in another order."""
        return dataclasses.replace(
            self,
            codes=self.codes[order],
            scale=self.scale[order],
            zero_point=None if self.zero_point is None else self.zero_point[order],
            channel_scale=None if self.channel_scale is None else self.channel_scale[order],
            up=None if self.up is None else self.up[:, order],
        )


# What the weights of one layer must have in common, in words.
SHARED = {
    "spec": "formats",
    "act": "quantizers of the input",
    "act_scale": "scales of the input (input_scale)",
    "rotation": "rotations of the input",
    "inverse_scale": "smooth factors",
    "tensor_scale": "scales of the whole tensor",
    "codebook": "codebooks",
}


def joined(kernels: Mapping[str, Kernel]) -> Kernel:
    """Returns kernels, by the names of their tensors, as one with their output channels in a row.

    Raises:
        UserError: if one kernel cannot hold them.
    """
    first, *others = kernels.values()
    for name, words in SHARED.items():
        if any(not _same(getattr(first, name), getattr(other, name)) for other in others):
            raise UserError(
                f"{' and '.join(kernels)} are one layer here, which has one of what they have "
                f"several of: {words}; take a file in which they are one tensor, or quantize the "
                "full-precision weights with qdit quantize."
            )
    whole = [first, *others]
    rows = ("codes", "scale", "zero_point", "channel_scale")
    held = [name for name in rows if getattr(first, name) is not None]
    down, up = _branches(whole)
    return dataclasses.replace(
        first,
        **{name: _concatenated(whole, name) for name in held},
        down=down,
        up=up,
    )


def _concatenated(kernels: Sequence[Kernel], name: str) -> np.ndarray:
    return np.concatenate([getattr(kernel, name) for kernel in kernels])


def _branches(kernels: Sequence[Kernel]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Returns the branches of several kernels as one: ranks side by side, outputs of their own."""
    found = [(k.down, k.up) for k in kernels if k.down is not None and k.up is not None]
    if not found:
        return None, None
    rows = sum(up.shape[0] for _, up in found)
    up = np.zeros((rows, sum(len(k.codes) for k in kernels)), found[0][1].dtype)
    row = column = 0
    for kernel in kernels:
        if kernel.up is not None:
            height, width = kernel.up.shape
            up[row : row + height, column : column + width] = kernel.up
            row += height
        column += len(kernel.codes)
    return np.concatenate([down for down, _ in found], axis=1), up


def _same(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return one is None and other is None if one is None or other is None else bool(one == other)


def leaves_of(path: str, kernel: Kernel) -> dict[str, Any]:
    """Returns the leaves of a layer's quantized kernel by their paths in the tree.

    Args:
        path: of the kernel, such as `blocks_0/attn/qkv/kernel`.
    """
    import jax.numpy as jnp

    from qdit_jax.quant import ActQuant, InputMap, LowRank, Rotation, from_codes, with_leaf

    def array(values: np.ndarray | None) -> Any:
        return None if values is None else jnp.asarray(values)

    zero_point = None if kernel.zero_point is None else array(kernel.zero_point.T)
    q = from_codes(array(kernel.codes.T), array(kernel.scale.T), zero_point, kernel.spec)
    found: dict[str, Any] = {
        path: dataclasses.replace(
            q,
            tensor_scale=array(kernel.tensor_scale),
            channel_scale=array(kernel.channel_scale),
            codebook=array(kernel.codebook),
        )
    }
    layer = path.removesuffix("/kernel")
    if kernel.act is not None:
        found = with_leaf(found, layer, "act_quant", ActQuant(kernel.act, array(kernel.act_scale)))
    if kernel.inverse_scale is not None:
        found = with_leaf(found, layer, "input_map", InputMap(array(kernel.inverse_scale)))
    if kernel.rotation:
        found = with_leaf(found, layer, "rotation", Rotation("regular", kernel.rotation))
    if kernel.down is not None:
        branch = LowRank(array(kernel.down), array(kernel.up))
        found = with_leaf(found, layer, "low_rank", branch)
    return found


def recipe_of(flat: Mapping[str, Any], name: str) -> Recipe | None:
    """Returns the recipe of the quantized kernels in a flat tree, a rule per layer; None if none is."""
    from qdit_jax.quant import QTensor, WeightSpec
    from qdit_jax.recipes import LayerSpec, Recipe, Rule

    rules = []
    for path, leaf in flat.items():
        if isinstance(leaf, QTensor):
            layer = path.removesuffix("/kernel")
            spec = WeightSpec(leaf.bits, leaf.group_size, leaf.symmetric, fmt=leaf.fmt)
            act = flat.get(f"{layer}/act_quant")
            spec_of_layer = LayerSpec(spec, None if act is None else act.spec)
            rules.append(Rule(re.escape(layer), spec_of_layer))
    return Recipe(tuple(rules), name) if rules else None
