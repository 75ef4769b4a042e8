"""What a step costs by counting: bytes and operations, from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from qdit_jax.allocation import FLOAT32_MAC, BitOps, SearchLayer
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.models import experts_of
from qdit_jax.ptq import plan
from qdit_jax.quant import ActQuant, QTensor, WeightSpec
from qdit_jax.recipes import LayerSpec, Recipe
from qdit_jax.sampling import Guidance, calls_per_step
from qdit_jax.speed.contenders import (
    Contender,
    QuantizedLayer,
    contenders_of,
)


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What counting says of one network at one batch size.

    Attributes:
        title, batch: as of `Row`.
        weight_bytes: of all parameters, as they are stored.
        multiply_adds: of all linear layers in a step.
        bit_operations: of these, see `allocation.BitOps`; a layer in full precision counts 32 x 32
            bits. Attention products are the same in all networks and are not counted.
    """

    title: str
    batch: int
    weight_bytes: int
    multiply_adds: int
    bit_operations: float


def predicted(
    checkpoint: Checkpoint,
    recipes: Iterable[Recipe],
    batches: Sequence[int],
    guidance: Guidance | None,
) -> list[Predicted]:
    """Returns what counting says of each network, by batch size; nothing is computed.

    The arrays of `checkpoint` may still be on disk.

    Raises:
        UserError, ValueError: as `bench`.
    """
    recipes = list(recipes)
    first, *others = contenders_of(checkpoint, recipes)
    entrants = [first, *(c for c in others if c.layers)]  # other dtypes count the same
    num_bytes = [nbytes(checkpoint.params)]
    if checkpoint.recipe is None:
        num_bytes += [bytes_after(checkpoint, recipe) for recipe in recipes]
    found = []
    for batch in batches:
        inputs = batch * calls_per_step(checkpoint.model, guidance)
        for contender, size in zip(entrants, num_bytes, strict=True):
            macs, operations = counted(contender)
            found.append(
                Predicted(contender.title, batch, size, inputs * macs, inputs * operations)
            )
    return found


def nbytes(params: object) -> int:
    """Returns the bytes of all arrays, of abstract ones too."""
    return sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(params)
    )


def bytes_after(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Returns the bytes of all parameters under a recipe, by the formula."""
    plans = plan(checkpoint.params, recipe)
    return nbytes(checkpoint.params) + sum(p.bytes_after - p.bytes_before for p in plans)


def counted(contender: Contender) -> tuple[int, float]:
    """Returns multiply-adds and bit operations of a network's linear layers, of one input.

    Of experts, which have one form, one runs at a time: each layer counts its share of them.
    """
    by_path = {layer.path: layer for layer in contender.layers}
    cost, macs, operations = BitOps(), 0, 0.0
    experts = experts_of(contender.checkpoint.model)
    for path, shape in shapes_of(contender).items():
        rows = contender.rows[path]
        is_expert = path.split("/")[0] in experts
        share = 1 / len(experts) if is_expert else 1.0
        macs += round(share * rows * math.prod(shape))
        if path in by_path:
            spec = spec_of(by_path[path])
            operations += cost(SearchLayer(path, shape, (spec,), rows, share=share), spec)
        else:
            operations += share * rows * math.prod(shape) * FLOAT32_MAC
    return macs, operations


def shapes_of(contender: Contender) -> dict[str, tuple[int, int]]:
    """Returns the shape `(K, N)` of every linear layer's kernel, by path."""
    found = {}
    for path in contender.rows:
        entry: Any = contender.checkpoint.params
        for name in path.split("/"):
            entry = entry[name]
        *channels, width = entry["kernel"].shape
        found[path] = (math.prod(channels), width)
    return found


def spec_of(layer: QuantizedLayer) -> LayerSpec:
    """Returns a layer's specs; of what is stored, those that `BitOps` reads."""
    weight, act = layer.weight, layer.act
    if isinstance(weight, QTensor):
        weight = WeightSpec(weight.bits, weight.group_size, weight.symmetric)
    return LayerSpec(weight, act.spec if isinstance(act, ActQuant) else act)
