"""Block reconstruction of whole networks: block by block, rounding learned over a block's output.

Dimensions: I items, R rows of one sample, F values of one output.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.calibration import Items, Stats, check_items
from qdit_jax.checkpoint import fingerprint, first_difference
from qdit_jax.errors import UserError
from qdit_jax.files import PathLike, as_path, write_arrays
from qdit_jax.models import Call, family_of, layers_in_order, module_calls, recorded_calls
from qdit_jax.ptq.block_learning import (
    NUM_CHUNKS,
    Entries,
    Form,
    ReconstructionSettings,
    Samples,
    errors,
    learn,
    own_costs,
    rounded,
    started,
)
from qdit_jax.ptq.rounding import batches_of, held_out_items
from qdit_jax.ptq.sequential import RoundedLayer, only_tables
from qdit_jax.ptq.transform import matrix_shape, rewrite_kernels
from qdit_jax.quant import (
    GREATEST_WEIGHT,
    QTensor,
    WeightSpec,
    check_finite,
    quantize,
    select_timestep,
)
from qdit_jax.recipes import Recipe
from qdit_jax.types import Condition, Params

# Items that `own_costs` are estimated on.
COST_ITEMS = 64


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


def reconstruct_params(
    model: nn.Module,
    params: Params,
    items: Items,
    *,
    recipe: Recipe,
    settings: ReconstructionSettings | None = None,
    holdout: float | int = 0.25,
    stats: Stats | None = None,
    batch_size: int = 8,
    unfinished: PathLike | None = None,
    on_layer: Callable[[RoundedLayer], None] | None = None,
    progress_fn: Callable[[int], Any] | None = None,
) -> Params:
    """Returns `params` quantized by `recipe`, the rounding learned block by block.

    A block's inputs are those of the network with all earlier blocks quantized, its targets the
    outputs of the full-precision network. Where rounding to nearest gives a block the smaller error
    on held-out items, the block keeps it. Memory holds the parameters, and one block's inputs and
    outputs on all items.

    Args:
        items: from `collect_items`.
        settings: of the learning; None for the defaults.
        holdout: the share of trajectories that are held out; 0 for no check.
        stats: calibration statistics, for static activation scales only.
        batch_size: items in one run of the network.
        unfinished: a folder that a file is written to after every block; where it exists, finished
            blocks are read from it and the result is the same. The caller deletes it.
        on_layer: called after each layer; its errors are those of the output of its block.
        progress_fn: called with numbers that add up to `num_reconstruction_batches(...)`.

    Raises:
        ValueError: as `quantize_params` and `units_of`; also if an item or a block's output is not
            finite, or `holdout` leaves nothing on one of the sides.
        UserError: if `unfinished` was written with other settings.
    """
    check_items(items)
    settings = ReconstructionSettings() if settings is None else settings
    held_out = held_out_items(items, holdout)
    begun = rewrite_kernels(params, only_tables, recipe=recipe, stats=stats)
    flat = dict(flatten_dict(begun, sep="/"))
    facts = {"params": begun, "model": model, "items": items, "recipe": recipe.to_json()}
    facts |= {"settings": settings, "holdout": holdout, "batch_size": batch_size}
    kept = None if unfinished is None else Unfinished(unfinished, fingerprint(**facts))
    for number, unit in enumerate(units_of(model, params, recipe)):
        nearest = nearest_kernels(unit, flat)
        result = None if kept is None else kept.read(number)
        if result is None:
            now = unflatten_dict(flat, sep="/")
            samples = samples_of(unit, model, now, params, items, batch_size, progress_fn)
            result = reconstructed(
                unit, flat, nearest, samples, held_out, settings, number, progress_fn
            )
            if kept is not None:
                kept.write(number, result)
        elif progress_fn is not None:
            progress_fn(num_reconstruction_batches(items, batch_size, 1))
        kernels = {path: flat[f"{path}/kernel"] for path in unit.specs}
        flat |= placed(unit, flat, nearest, result)
        for path, kernel in kernels.items() if on_layer is not None else ():
            whole = jnp.asarray(kernel).reshape(matrix_shape(kernel))
            fell_back = bool(held_out.any()) and not result.learned <= result.nearest
            q = flat[f"{path}/kernel"]
            layer = RoundedLayer(path, whole, q, result.nearest, result.learned, fell_back)
            on_layer(layer)
    return unflatten_dict(flat, sep="/")


def num_reconstruction_batches(items: Items, batch_size: int, num_units: int) -> int:
    """Returns the sum of what `reconstruct_params` calls its `progress_fn` with."""
    count = len(items.x)
    return num_units * (-(-count // min(batch_size, count)) + NUM_CHUNKS)


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found for one module, as it is kept on disk.

    Attributes:
        codes: packed, by the kernels' names within the module.
        scales: learned step sizes, by the quantizers' names within the module.
        nearest, learned: relative squared output errors, on held-out items where there are any.
    """

    codes: dict[str, Any]
    scales: dict[str, Any]
    nearest: float
    learned: float


def placed(
    unit: Unit, flat: Mapping[str, Any], nearest: Mapping[str, QTensor], result: Result
) -> dict[str, Any]:
    """Returns the entries of the whole tree that a module's result replaces."""
    codes = {name: jnp.asarray(codes) for name, codes in result.codes.items()}
    found: dict[str, Any] = {
        f"{unit.path}/{name}": dataclasses.replace(nearest[name], codes=codes[name])
        for name in codes
    }
    for name, scale in result.scales.items():
        key = f"{unit.path}/{name}"
        found[key] = dataclasses.replace(flat[key], scale=jnp.asarray(scale))
    return found


def nearest_kernels(unit: Unit, flat: Mapping[str, Any]) -> dict[str, QTensor]:
    """Returns a module's kernels rounded to nearest, by their names within it."""
    found = {}
    for path, spec in unit.specs.items():
        kernel = jnp.asarray(flat[f"{path}/kernel"])
        check_finite(path, kernel, GREATEST_WEIGHT)
        found[unit.within(f"{path}/kernel")] = quantize(kernel.reshape(matrix_shape(kernel)), spec)
    return found


def samples_of(
    unit: Unit,
    model: nn.Module,
    params: Params,
    full: Params,
    items: Items,
    batch_size: int,
    progress_fn: Callable[[int], Any] | None,
) -> Samples:
    """Returns a module's inputs in the network with `params`, and its outputs with `full`."""
    count, inputs, targets = len(items.x), [], []
    for batch, _ in batches_of(np.arange(count), batch_size):
        given = jax.tree.map(jnp.asarray, items.taken(batch))
        taken = recorded(params, *given, model=model, path=unit.path, outputs=False)
        made = recorded(full, *given, model=model, path=unit.path, outputs=True)
        size = len(batch)
        inputs.append(
            [
                [x.reshape(size, -1, *x.shape[1:]) if r else x for r, x in zip(c.rows, arrays)]
                for c, arrays in zip(unit.calls, taken, strict=True)
            ]
        )
        targets.append([[out.reshape(size, -1) for out in arrays] for arrays in made])
        if progress_fn is not None:
            progress_fn(1)
    constant = [[not rows for rows in call.rows] for call in unit.calls]
    joined = [
        jax.tree.map(
            lambda same, *parts: parts[0] if same else jnp.concatenate(parts)[:count],
            constant,
            *inputs,
        ),
        jax.tree.map(lambda *parts: jnp.concatenate(parts)[:count], *targets),
    ]
    return Samples(*joined, jnp.asarray(items.timestep))


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


def reconstructed(
    unit: Unit,
    flat: Mapping[str, Any],
    nearest: dict[str, QTensor],
    samples: Samples,
    held_out: np.ndarray,
    settings: ReconstructionSettings,
    number: int,
    progress_fn: Callable[[int], Any] | None,
) -> Result:
    """Returns what learning finds for one module, or rounding to nearest where that is better."""
    form, entries = unit.form, unit.entries(flat)
    rows = np.flatnonzero(~held_out)
    size = min(settings.minibatch, len(rows))
    judged = np.flatnonzero(held_out) if held_out.any() else rows
    base = mean_error(form, {**entries, **nearest}, samples, rows, size)[0]
    check_finite(f"the output error of {unit.path}", np.float32(base))
    some = rows[np.linspace(0, len(rows) - 1, min(COST_ITEMS, len(rows))).round().astype(int)]
    costs = own_costs(form, entries, nearest, samples, jnp.asarray(some, jnp.int32))
    state = started(form, entries, nearest, settings)
    batches = minibatches(rows, size, settings, number)
    limit = jnp.float32(max(base, float(jnp.finfo(jnp.float32).tiny)))
    for first in range(0, len(batches), settings.chunk):
        state = learn(
            state,
            jnp.int32(first),
            batches[first : first + settings.chunk],
            entries,
            nearest,
            costs,
            limit,
            samples,
            form=form,
            settings=settings,
        )
        if progress_fn is not None:
            jax.block_until_ready(state)
            progress_fn(1)
    changed = rounded_entries(form, entries, nearest, state[0], settings)
    before = mean_error(form, {**entries, **nearest}, samples, judged, size)
    after = mean_error(form, {**entries, **changed}, samples, judged, size)
    relative = [error / max(power, 1e-30) for error, power in (before, after)]
    keep = not held_out.any() or relative[1] <= relative[0]
    kernels = {name: (changed if keep else nearest)[name].codes for name in nearest}
    scales = {name: changed[name].scale for name in changed if keep and name not in nearest}
    return Result(kernels, scales, *relative)


def rounded_entries(*given: Any) -> Entries:
    return rounded(*given)


def minibatches(
    rows: np.ndarray, size: int, settings: ReconstructionSettings, number: int
) -> jax.Array:
    """Returns the items of every step: one permutation of all after another."""
    num_steps = settings.chunk * NUM_CHUNKS
    rng = np.random.default_rng((settings.seed, number))
    epochs = [rng.permutation(rows) for _ in range(-(-num_steps * size // len(rows)))]
    drawn = np.concatenate(epochs)[: num_steps * size]
    return jnp.asarray(drawn.reshape(num_steps, size), jnp.int32)


def mean_error(
    form: Form, entries: Entries, samples: Samples, rows: Sequence[int] | np.ndarray, size: int
) -> tuple[float, float]:
    """Returns the items' mean squared output error and mean squared output."""
    total = np.zeros(2)
    for batch, weight in batches_of(np.asarray(rows), size):
        found = errors(form, entries, samples, jnp.asarray(batch, jnp.int32), jnp.asarray(weight))
        total += np.asarray(found)
    return float(total[0]) / len(rows), float(total[1]) / len(rows)


class Unfinished:
    """Finished modules of a run that may be stopped, one file each in a folder."""

    def __init__(self, folder: PathLike, settings: dict[str, Any]) -> None:
        self.folder, self.settings = as_path(folder), settings
        self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, number: int) -> Result | None:
        """Returns what was found for a module, or None if it is not finished.

        Raises:
            UserError: if the file is unreadable, or was written with other settings.
        """
        path = self.folder / f"{number:04d}.npz"
        if not path.exists():
            return None
        try:
            with path.open("rb") as file, np.load(file) as data:
                found = {name: data[name] for name in data.files}
            saved = json.loads(str(found["settings"]))
            nearest, learned = map(float, found["errors"])
        except (OSError, KeyError, ValueError) as error:
            raise UserError(
                f"{path} is no unfinished quantization ({error}); delete it."
            ) from error
        if (other := first_difference(saved, self.settings)) is not None:
            raise UserError(
                f"{self.folder} holds an unfinished quantization with other settings or another "
                f"checkpoint (its {other} is not the same); delete it to start over."
            )
        parts = {
            kind: {n.removeprefix(f"{kind}/"): x for n, x in found.items() if n.startswith(kind)}
            for kind in ("codes", "scales")
        }
        return Result(**parts, nearest=nearest, learned=learned)

    def write(self, number: int, result: Result) -> None:
        """Writes a finished module; a reader never sees half of it."""
        named = flatten_dict({"codes": result.codes, "scales": result.scales}, sep="/")
        errors = np.array([result.nearest, result.learned])
        told = {"settings": json.dumps(self.settings, sort_keys=True), "errors": errors}
        write_arrays(self.folder / f"{number:04d}.npz", {**named, **told})
