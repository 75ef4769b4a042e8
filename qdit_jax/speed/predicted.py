"""What a step costs by counting: bytes, operations and the time of a roofline, from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.allocation import FLOAT32_MAC, BitOps, SearchLayer
from qdit_jax.checkpoint import Checkpoint, default_dtype, dtype_of
from qdit_jax.models import (
    AttentionCall,
    abstract_params,
    attention_calls,
    expert_alone,
    experts_of,
    rows_per_sample,
)
from qdit_jax.ptq import plan
from qdit_jax.quant import ActQuant, QTensor, WeightSpec
from qdit_jax.recipes import LayerSpec, Recipe
from qdit_jax.sampling import narrow_names
from qdit_jax.speed.contenders import Contender, QuantizedLayer, contenders_of
from qdit_jax.speed.devices import Device
from qdit_jax.speed.roofline import Step


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What counting says of one network at one batch size.

    Attributes:
        title, batch: as of `Row`.
        weight_bytes: of all parameters, as they are held when the network runs.
        multiply_adds: of all linear layers in a step.
        bit_operations: of these, see `allocation.BitOps`; a layer in full precision counts 32 x 32
            bits. Attention products are the same in all networks and are not counted.
        live_bytes: by device, what a step needs at once beside the weights, see `roofline`.
        milliseconds: by device, of a step at the device's full rates, see `roofline`; attention is counted.
    """

    title: str
    batch: int
    weight_bytes: int
    multiply_adds: int
    bit_operations: float
    live_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    milliseconds: dict[str, float] = dataclasses.field(default_factory=dict)


class Counted:
    """One network at a time: what all of its formats have in common, traced once."""

    def __init__(self, checkpoint: Checkpoint, rows: Mapping[str, int]) -> None:
        model: Any = checkpoint.model
        if experts := experts_of(model):  # a step runs one of them
            model, _ = expert_alone(model, checkpoint.params, experts[-1])
            rows = rows_per_sample(model)
        self.rows = rows
        self.attentions: tuple[AttentionCall, ...] = attention_calls(model)
        self.shapes = shapes_of(checkpoint, self.rows)

    def step(self, contender: Contender, inputs: int, implementation: str | None = None) -> Step:
        """Returns a step of one format, of so many network inputs, by `Step.implementation`."""
        specs = {layer.path: spec_of(layer) for layer in contender.layers}
        rows = {path: count * inputs for path, count in self.rows.items()}
        dtype = dtype_of(contender.checkpoint)
        return Step(self.shapes, rows, specs, self.attentions, inputs, dtype, implementation)


def predicted(
    checkpoint: Checkpoint,
    recipes: Iterable[Recipe],
    batches: Sequence[int],
    calls: int,
    *,
    devices: Sequence[Device] = (),
    dtype: str | None = None,
) -> list[Predicted]:
    """Returns what counting says of each network, by batch size; nothing is computed.

    The arrays of `checkpoint` may still be on disk, or be shapes alone (`abstract_checkpoint`). Quantized
    products are counted as integer numerics compute them.

    Args:
        calls: of the network per sample: 2 with guidance, see `sampling.calls_per_step`.
        devices: of which memory and time are counted too.
        dtype: that quantized networks compute in beside their quantized layers; the platform's own
            by default.

    Raises:
        UserError, ValueError: as `bench`.
    """
    recipes = list(recipes)
    dtype = dtype or default_dtype()
    entrants = contenders_of(checkpoint, recipes, dtype=dtype)
    num_full = len(entrants) - len(recipes)
    num_bytes = [held_bytes(c, None) for c in entrants[:num_full]]
    num_bytes += [
        held_bytes(c, recipe) for c, recipe in zip(entrants[num_full:], recipes, strict=True)
    ]
    shared = Counted(checkpoint, entrants[0].rows)
    found = []
    for batch in batches:
        inputs = batch * calls
        for contender, size in zip(entrants, num_bytes, strict=True):
            macs, operations = counted(contender, shared)
            step = shared.step(contender, inputs)
            found.append(
                Predicted(
                    contender.title,
                    batch,
                    size,
                    inputs * macs,
                    inputs * operations,
                    {device.name: step.live_bytes(device) for device in devices},
                    {device.name: 1000 * step.seconds(device) for device in devices},
                )
            )
    return found


def abstract_checkpoint(model: nn.Module) -> Checkpoint:
    """Returns a checkpoint of a network with shapes in place of arrays."""
    return Checkpoint(model, unflatten_dict(abstract_params(model), sep="/"))


def held_bytes(contender: Contender, recipe: Recipe | None) -> int:
    """Returns the bytes of a network's parameters when it runs, rounded by `recipe` if there is one.

    What `with_narrow_kernels` stores in 16 bits is held so.
    """
    checkpoint = contender.checkpoint
    params = checkpoint.params
    total = nbytes(params) if recipe is None else bytes_after(checkpoint, recipe)
    specs = {} if recipe is None else recipe.resolve(params)
    rounded = {f"{path}/kernel" for path, spec in specs.items() if spec is not None}
    flat = {n: leaf for n, leaf in flatten_dict(params, sep="/").items() if n not in rounded}
    for name in narrow_names(checkpoint.model, flat):
        leaf = flat[name]
        total -= math.prod(leaf.shape) * max(np.dtype(leaf.dtype).itemsize - 2, 0)
    return total


def nbytes(params: object) -> int:
    """Returns the bytes of all arrays, of abstract ones too."""
    return sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(params)
    )


def bytes_after(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Returns the bytes of all parameters under a recipe, by the formula."""
    plans = plan(checkpoint.params, recipe)
    return nbytes(checkpoint.params) + sum(p.bytes_after - p.bytes_before for p in plans)


def counted(contender: Contender, shared: Counted) -> tuple[int, float]:
    """Returns multiply-adds and bit operations of a network's linear layers, of one input."""
    by_path = {layer.path: layer for layer in contender.layers}
    cost, macs, operations = BitOps(), 0, 0.0
    for path, shape in shared.shapes.items():
        rows = shared.rows[path]
        macs += rows * math.prod(shape)
        if path in by_path:
            spec = spec_of(by_path[path])
            operations += cost(SearchLayer(path, shape, (spec,), rows), spec)
        else:
            operations += rows * math.prod(shape) * FLOAT32_MAC
    return macs, operations


def shapes_of(checkpoint: Checkpoint, rows: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Returns the shape `(K, N)` of every linear layer's kernel, by path."""
    flat = flatten_dict(checkpoint.params, sep="/")
    found = {}
    for path in rows:
        *channels, width = flat[f"{path}/kernel"].shape
        found[path] = (math.prod(channels), width)
    return found


def spec_of(layer: QuantizedLayer) -> LayerSpec:
    """Returns a layer's specs; of what is stored, those that counting reads."""
    weight, act = layer.weight, layer.act
    if isinstance(weight, QTensor):
        is_plain = weight.fmt is None and not weight.has_levels
        weight = WeightSpec(
            *(weight.bits, weight.group_size, weight.symmetric),
            scale_dtype=weight.scale.dtype.name if is_plain else "float32",
            channel_group=weight.channel_group,
            fmt=weight.fmt,
            scale_levels=2 if weight.has_levels and weight.fmt is None else 1,
        )
    return LayerSpec(weight, act.spec if isinstance(act, ActQuant) else act)
