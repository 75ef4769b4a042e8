"""`quantize`: a whole checkpoint in, a quantized checkpoint out, by any method of the table."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import import_module
from typing import Any, overload

import jax
from flax.traverse_util import flatten_dict

from qdit_jax.calibration import Items
from qdit_jax.checkpoint import Checkpoint, load, materialized, open_checkpoint, save, with_dtype
from qdit_jax.files import PathLike, as_path, check_free
from qdit_jax.methods.data import CalibrationData, with_own_guidance
from qdit_jax.methods.default import method_for
from qdit_jax.methods.input_transforms import places
from qdit_jax.methods.method import Method
from qdit_jax.methods.named_transforms import check_named, check_shared
from qdit_jax.methods.report import Report
from qdit_jax.methods.table import method_named
from qdit_jax.models import check_all_run, expert_alone, expert_numbers, experts_of, merged
from qdit_jax.ptq import check_finite_params, check_one_weight_format, plan
from qdit_jax.quant import QTensor, WeightSpec, quantize_array
from qdit_jax.recipes import LayerSpec, Recipe
from qdit_jax.types import Params, ProgressFn, untold

Source = Checkpoint | PathLike
# How to get what `CalibrationData` lacks.
REMEDIES = {
    "items": "items=qdit.collect_items(checkpoint, key)",
    "stats": "stats=qdit.calibrate(checkpoint, key)",
}


@overload
def quantize(
    source: Source,
    method: str | Method | None = None,
    recipe: PathLike | Recipe = "w4a8",
    *,
    data: CalibrationData | None = None,
    out: PathLike | None = None,
    overwrite: bool = False,
    progress_fn: ProgressFn = untold,
) -> Checkpoint: ...
@overload
def quantize(source: Any, spec: WeightSpec) -> QTensor: ...
def quantize(source: Any, *settings: Any, **options: Any) -> Any:
    """Returns a checkpoint quantized by a method, or an array as `quantize_array(w, spec)` does.

    `quantize(checkpoint, method=None, recipe="w4a8", *, data=None, out=None, overwrite=False, ...)`:
    the metadata of the result says under `"quantization"` what was done: method, versions, date,
    recipe, calibration data, notes and the error of every layer.

    Args:
        source: a `Checkpoint`, or the path of one; an array `[K, N]` with `spec`.
        method: a name of `METHODS`, or a `Method`. None is the one that the preset is meant for, `"best"`
            for most and for every other recipe, which samples inputs first; `"rtn"` looks at none.
        recipe: a `Recipe`, the path of one, or a preset's name, which gets the method's own ranges.
        data: what the method learns from; None has it sampled from the checkpoint's trajectories.
        out: a folder, or a `.safetensors` file, to write. A method that can (rtn) takes one layer
            after another from disk to the folder; the others hold the network. From a path, the
            result of the former is as `open_checkpoint` reads it, its arrays still on disk:
            `generate` and `denoiser` read them, `load(out)` puts them into memory.
        overwrite: replace `out` if it exists.
        progress_fn: told of each finished `layer` by a `LayerReport`, of sentences that the user should
            read as `text`, and of the batches `done` and in `total`, where they are known.

    Raises:
        TypeError: if `source` is a bare parameter tree (`quantize_params` takes those).
        ValueError: if the method or recipe is unknown or does not fit the network, a layer is
            quantized already, or data that the method needs are absent and cannot be collected.
        UserError: as `open_checkpoint` and `save`.
    """
    if isinstance(source, (Checkpoint, str, os.PathLike)):
        return quantize_whole(source, *settings, **options)
    if isinstance(source, Mapping):
        raise TypeError(
            "quantize takes a Checkpoint, its path, or one array; a parameter tree is for "
            "quantize_params(params, recipe=recipe)."
        )
    return quantize_array(source, *settings, **options)


def quantize_whole(
    source: Source,
    method: str | Method | None = None,
    recipe: Any = "w4a8",
    *,
    data: CalibrationData | None = None,
    out: PathLike | None = None,
    overwrite: bool = False,
    progress_fn: ProgressFn = untold,
) -> Checkpoint:
    """Returns the quantized checkpoint; see `quantize`."""
    if out is not None:
        check_free(out, overwrite)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    asked = recipe_or_name(recipe)
    chosen = method_for(asked) if method is None else method
    method = chosen if isinstance(chosen, Method) else method_named(chosen)
    recipe = asked if isinstance(asked, Recipe) else method.preset(asked, checkpoint.params)
    data = with_own_guidance(checkpoint, CalibrationData() if data is None else data)
    check(method, checkpoint, recipe, data)
    report = Report(progress_fn)
    facts = {} if isinstance(source, Checkpoint) else {"quantized_from": str(source)}
    if method.stream is not None and out is not None and as_path(out).suffix != ".safetensors":
        told = data.to_json(fitted=bool(method.needs), sampled=False)
        metadata = metadata_of(checkpoint, method, recipe, told, report) | facts
        written = method.stream(
            checkpoint,
            out,
            recipe=recipe,
            stats=data.stats,
            on_layer=report.weights,
            overwrite=overwrite,
            metadata=metadata,
        )
        return load(out) if isinstance(source, Checkpoint) else written
    whole = with_dtype(materialized(checkpoint), data.dtype)
    if method.needs:  # before the network runs on its inputs for long
        check_finite_params(whole.params, recipe.resolve(whole.params))
    sampled = any(getattr(data, name) is None for name in method.needs)
    data = completed(method, whole, data)
    params, data = applied(method, whole.model, whole.params, recipe, data, report)
    told = data.to_json(fitted=bool(method.needs), sampled=sampled)
    metadata = metadata_of(checkpoint, method, recipe, told, report) | facts
    result = dataclasses.replace(
        whole, model=checkpoint.model, params=params, recipe=recipe, metadata=metadata
    )
    if out is not None:
        save(out, result, overwrite=overwrite)
    return result


def applied(
    method: Method,
    model: Any,
    params: Params,
    recipe: Recipe,
    data: CalibrationData,
    report: Report,
) -> tuple[Params, CalibrationData]:
    """Returns quantized parameters, and the data with what was collected on the way.

    Experts are fitted one by one, each on its own timesteps.

    Raises:
        ValueError: as `quantize`, or if an expert runs at none of the items' timesteps.
    """
    names = () if data.items is None else experts_of(model)
    if not names:
        given = {"model": model, "recipe": recipe, "report": report}
        for step in method.prepare:
            params, data = step(params, data=data, **given)
        return method.apply(params, data=data, **{**given, "recipe": recipe.for_rounding()}), data
    items = data.items
    assert items is not None
    check_all_run(model, items.timestep, "the calibration inputs")
    numbers = expert_numbers(model, items.timestep)
    parts, collected = [], data.stats
    for number, name in enumerate(names):
        alone, held = expert_alone(model, params, name)
        own = recipe.within(held)
        if own is not None:
            mine = items.only(numbers == number)
            kept = None if data.unfinished is None else as_path(data.unfinished) / name
            its = dataclasses.replace(data, items=mine, unfinished=kept)
            held, used = applied(method, alone, held, own, its, report)
            collected = used.stats if collected is None else collected
        parts.append(held)
    return merged(parts), dataclasses.replace(data, stats=collected)


def recipe_or_name(recipe: Any) -> Recipe | str:
    """Returns the recipe that was given or is read from a file; or the name of a preset as it is.

    Raises:
        ValueError: if a name is neither a preset's nor a file's.
        TypeError: if it is something else.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, (str, os.PathLike)):
        raise TypeError(
            f"recipe={recipe!r} is a {type(recipe).__name__}; give a Recipe, a preset such as "
            "'w4a8', or the path of a recipe.json."
        )
    path = as_path(recipe)
    if isinstance(recipe, str) and path.suffix != ".json" and not path.is_file():
        return recipe
    return Recipe.from_json(path)


def check(method: Method, checkpoint: Checkpoint, recipe: Recipe, data: CalibrationData) -> None:
    """Raises `ValueError` if the recipe or the data do not fit, before anything is computed."""
    plan(checkpoint.params, recipe)
    specs = recipe.resolve(checkpoint.params)
    if method.rounds_integers:
        check_integers(specs, method)
    if method.learns_blocks:
        check_one_weight_format(checkpoint.params, recipe, f"method {method.name!r}")
    if data.timestep_weights is not None and not method.weighs_timesteps:
        raise ValueError(
            f"method {method.name!r} does not weigh its inputs by timestep; leave timestep_weights "
            "(--weight-timesteps) out, or use a method such as gptq or best."
        )
    check_transforms(method, checkpoint.params, specs)
    if method.check is not None:
        method.check(specs, data)
    check_stats(specs, data, method)
    if data.items is not None and "items" in method.needs:
        found = tuple(data.items.x.shape[1:])
        wanted = tuple(checkpoint.model.sample_shape())
        if found != wanted and not takes(checkpoint, data.items):
            raise ValueError(
                f"data.items holds inputs {list(found)}, but the network takes {list(wanted)}; "
                "collect them from this checkpoint."
            )
        kinds = [
            str(jax.tree.structure(condition))
            for condition in (data.items.condition, checkpoint.model.example_condition(1))
        ]
        if kinds[0] != kinds[1] and not takes(checkpoint, data.items):
            raise ValueError(
                f"data.items holds conditions {kinds[0]}, but the network takes {kinds[1]}; collect "
                "them from this checkpoint."
            )


def takes(checkpoint: Checkpoint, items: Items) -> bool:
    """Returns whether the network takes inputs of another size, or without optional entries."""
    inputs = items.taken(slice(0, 1))
    x, _, condition = inputs
    wanted = checkpoint.model.sample_shape()
    if x.ndim - 1 != len(wanted) or x.shape[-1] != wanted[-1]:
        return False
    try:
        checkpoint.model.check_condition(condition)
        jax.eval_shape(
            lambda params, *given: checkpoint.model.apply({"params": params}, *given),
            jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), checkpoint.params
            ),
            *inputs,
        )
    except Exception:  # whatever it says, it does not take them
        return False
    return True


def check_transforms(method: Method, params: Params, specs: Mapping[str, LayerSpec]) -> None:
    """Raises `ValueError` if the method or a layer cannot have what the recipe asks for."""
    asked = {path: spec for path, spec in specs.items() if spec.asks_for is not None}
    if asked and not method.makes_transforms:
        path, spec = next(iter(asked.items()))
        raise ValueError(
            f"method={method.name!r} makes no input transforms and no branches, but the recipe asks "
            f"for {spec.asks_for} of {path}; use method 'best' (--method best), or leave transform "
            "and rank out of the recipe."
        )
    flat = flatten_dict(params, sep="/")
    check_named(asked, flat)
    check_shared(places(params, [path for path in specs if f"{path}/kernel" in flat]), specs)


def check_integers(specs: Mapping[str, LayerSpec], method: Method) -> None:
    """Raises `ValueError` for weights of a number format, which learned roundings cannot reach."""
    for path, spec in specs.items():
        if spec.weight is not None and spec.weight.fmt is not None:
            raise ValueError(
                f"method {method.name!r} rounds to integer codes, but the recipe gives {path} weights of "
                f"the format {spec.weight.fmt.name!r}; use a method such as 'smoothquant' or 'rtn'."
            )


def check_stats(specs: Mapping[str, LayerSpec], data: CalibrationData, method: Method) -> None:
    """Raises `ValueError` if static activations lack statistics, or the method takes its own."""
    static = [path for path, spec in specs.items() if spec.act and spec.act.mode == "static"]
    if method.takes_own_ranges:
        if data.stats is not None:
            raise ValueError(
                f"method {method.name!r} takes the ranges of static activations from its own inputs, "
                "after its change of coordinates; leave stats (--stats) out, or use a method such as 'rtn'."
            )
        return
    if static and method.prepare:
        raise ValueError(
            f"the recipe quantizes the input of {static[0]} with mode='static', but method "
            f"{method.name!r} looks at no data; use mode='dynamic'."
        )
    if static and data.stats is None:
        raise ValueError(
            f"the recipe quantizes the input of {static[0]} with mode='static', which needs "
            f"statistics: pass data=qdit.CalibrationData({REMEDIES['stats']}), or use "
            "mode='dynamic'."
        )


def completed(method: Method, checkpoint: Checkpoint, data: CalibrationData) -> CalibrationData:
    """Returns `data` with all that the method needs, collected where it can be.

    Raises:
        ValueError: if something is absent and the method cannot collect it.
    """
    for name, collect_fn in method.needs.items():
        if getattr(data, name) is not None:
            continue
        if collect_fn is None:
            raise ValueError(
                f"method {method.name!r} needs {name}, which the data lack: pass "
                f"data=qdit.CalibrationData({REMEDIES.get(name, name + '=...')})."
            )
        data = dataclasses.replace(data, **{name: collect_fn(checkpoint, data)})
    return data


def metadata_of(
    checkpoint: Checkpoint,
    method: Method,
    recipe: Recipe,
    data: dict[str, Any],
    report: Report,
) -> dict[str, Any]:
    """Returns the checkpoint's metadata and what is done to it now.

    Notes and layers are the lists of `report` itself, which may still grow until they are written.
    """
    summary = {
        "method": method.name,
        "recipe": recipe.name,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"qdit_jax": import_module("qdit_jax").__version__, "jax": jax.__version__},
        "data": data,
        "notes": report.notes,
        "layers": report.layers,
        **({"transforms": report.transforms} if report.transforms else {}),
    }
    if (earlier := checkpoint.metadata.get("quantization")) is not None:
        summary["earlier"] = earlier
    return {**checkpoint.metadata, "quantization": summary}
