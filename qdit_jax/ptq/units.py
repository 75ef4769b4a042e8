"""The modules that block reconstruction learns one after another, and what they take and return.

Dimensions: I items, R rows of one sample, F values of one output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from qdit_jax.calibration import Items
from qdit_jax.models import Call, family_of, layers_in_order, module_calls, recorded_calls
from qdit_jax.ptq.block_learning import Form, Samples
from qdit_jax.ptq.rounding import batches_of
from qdit_jax.quant import WeightSpec, select_timestep
from qdit_jax.recipes import Recipe
from qdit_jax.types import Condition, Params, Progress, ProgressFn


@dataclasses.dataclass(frozen=True)
class Unit:
    """A module that is reconstructed: a block, or what stands before and after the blocks.

    Attributes:
        path: of the module.
        calls: of the module in one run of the network.
        specs: of its kernels that are rounded, by the paths of their layers.
    """

    path: str
    calls: tuple[Call, ...]
    specs: Mapping[str, WeightSpec]

    @property
    def form(self) -> Form:
        """What the module has in common with those that are alike."""
        specs = ((self.within(f"{path}/kernel"), spec) for path, spec in self.specs.items())
        return Form(self.calls, tuple(sorted(specs, key=lambda pair: pair[0])))

    def within(self, name: str) -> str:
        """Returns the name of an entry within the module."""
        return name.removeprefix(f"{self.path}/")

    def entries(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the module's entries of a flat tree by their names within it."""
        start = f"{self.path}/"
        return {self.within(name): leaf for name, leaf in flat.items() if name.startswith(start)}


def units_of(model: nn.Module, params: Params, recipe: Recipe) -> list[Unit]:
    """Returns the modules to reconstruct, in the order in which the network first runs their layers.

    A layer outside of the blocks belongs to the module that its path begins with, if that is called
    as a whole and holds no block; otherwise it is a unit by itself.

    Raises:
        ValueError: if the network never runs a layer of the recipe, or a spec has a number format.
    """
    family, calls = family_of(model), module_calls(model, params)
    order = layers_in_order(partial(model.apply, {"params": params}), *model.example_inputs())
    flat = flatten_dict(params, sep="/")
    specs = {
        path: spec.weight
        for path, spec in recipe.resolve(params).items()
        if spec.weight is not None and f"{path}/kernel" in flat
    }
    if missing := sorted(set(specs) - set(order)):
        raise ValueError(f"the network never runs {missing[0]}, which the recipe quantizes.")
    for path, spec in specs.items():
        if spec.fmt is not None:
            raise ValueError(
                f"block reconstruction learns integer codes, not the format {spec.fmt.name!r} of "
                f"{path}."
            )
    with_blocks = {path.split("/")[0] for path in order if family.block_of(path)}

    def unit(path: str) -> str:
        block, first = family.block_of(path), path.split("/")[0]
        if block is None and first not in with_blocks:
            block = first
        return path if block is None or block not in calls else block

    found: dict[str, dict[str, WeightSpec]] = {}
    for path in order:
        if path in specs:
            found.setdefault(unit(path), {})[path] = specs[path]
    return [Unit(path, calls[path], inside) for path, inside in found.items()]


def samples_of(
    unit: Unit,
    model: nn.Module,
    params: Params,
    full: Params,
    items: Items,
    batch_size: int,
    progress_fn: ProgressFn,
) -> Samples:
    """Returns a module's inputs in the network with `params`, and its outputs with `full`."""
    count, inputs, targets = len(items.x), [], []
    for batch, _ in batches_of(np.arange(count), batch_size):
        given = jax.tree.map(jnp.asarray, items.taken(batch))
        taken = recorded(params, *given, model=model, path=unit.path, outputs=False)
        returned = recorded(full, *given, model=model, path=unit.path, outputs=True)
        size = len(batch)
        pairs = zip(unit.calls, taken, strict=True)
        inputs.append([by_item(call, arrays, size) for call, arrays in pairs])
        targets.append([[out.reshape(size, -1) for out in arrays] for arrays in returned])
        progress_fn(Progress(1))
    constant = [[not rows for rows in call.rows] for call in unit.calls]

    def joined(same: bool, *parts: Any) -> Any:
        return parts[0] if same else jnp.concatenate(parts)[:count]

    return Samples(
        jax.tree.map(joined, constant, *inputs),
        jax.tree.map(partial(joined, False), *targets),
        jnp.asarray(items.timestep),
    )


def by_item(call: Call, arrays: list[Any], size: int) -> list[Any]:
    """Returns a call's arrays with an axis of items in front of their R rows."""
    pairs = zip(call.rows, arrays, strict=True)
    return [x.reshape(size, -1, *x.shape[1:]) if rows else x for rows, x in pairs]


@partial(jax.jit, static_argnames=("model", "path", "outputs"))
def recorded(
    params: Params,
    x: Any,
    timestep: Any,
    condition: Condition,
    *,
    model: nn.Module,
    path: str,
    outputs: bool,
) -> list[list[Any]]:
    """Returns the arrays that a module takes, or with `outputs` returns, call by call.

    What the network computes after it is left out by the compiler.
    """
    chosen = select_timestep(params, timestep)
    found = recorded_calls(lambda: model.apply({"params": chosen}, x, timestep, condition), path)
    return found[int(outputs)]
