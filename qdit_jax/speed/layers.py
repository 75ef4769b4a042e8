"""`layer_table`: the time of single layers in every format of a search's choices.

Dimensions: K input channels, N output channels, R rows of a layer's input in one step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdit_jax.allocation import (
    Latency,
    LayerTime,
    SearchLayer,
    Space,
    choice_name,
    reference_spec,
    resized,
    run_time_spec,
)
from qdit_jax.checkpoint import Checkpoint, digest
from qdit_jax.errors import UserError, check_counts
from qdit_jax.files import AnyPath
from qdit_jax.kernels import implementation_of
from qdit_jax.models import Linear
from qdit_jax.ptq import quantize_params
from qdit_jax.quant import InputMap, LowRank, Rotation
from qdit_jax.recipes import TRANSFORMS, LayerSpec, Recipe, Rule, rotated_block
from qdit_jax.report import provenance
from qdit_jax.sampling import (
    PUBLISHED,
    Guidance,
    calls_per_step,
    check_seed,
    fitting_guidance,
    on_one_device,
)
from qdit_jax.speed.contenders import Way, check_known, contenders_of
from qdit_jax.speed.race import Race
from qdit_jax.speed.records import Records
from qdit_jax.speed.rows import Row
from qdit_jax.speed.steps import (
    NUM_ROUNDS,
    SECONDS,
    check_rounds,
    entry_name,
    settings_of,
)
from qdit_jax.speed.timing import Call, TimeFn, interleaved, taken
from qdit_jax.types import Condition, Params, Progress, ProgressFn, untold

BATCH = 8
# Budgets are written relative to these: groups of 128, and one group per channel.
REFERENCES = (128, 0)
DTYPE = "float32"  # of the inputs and the layers that are timed
NOTHING = "nothing"  # the name of a call that computes nothing
Shape = tuple[int, int, int]  # K, N, R


def layer_table(
    checkpoint: Checkpoint,
    space: Space,
    *,
    batch: int = BATCH,
    numerics: str = "simulated",
    guidance: Guidance | None = PUBLISHED,
    num_rounds: int = NUM_ROUNDS,
    seconds: float = SECONDS,
    seed: int = 0,
    conditions: Condition = None,
    state: AnyPath | None = None,
    time_fn: TimeFn | None = None,
    total_fn: Callable[[int], object] = lambda total: None,
    progress_fn: ProgressFn = untold,
) -> Latency:
    """Returns the time of every choice of every distinct shape of a space's layers.

    A choice is computed with what stands beside its kernel: a map of the input where no producer
    absorbs it, a rotation, a branch. Each shape's choices take turns, with full precision and with a
    call that computes nothing; budgets' references (groups of 128 and per channel) are measured too.
    A layer runs alone, on random weights and inputs: in a step its inputs may still be in a cache.

    Args:
        checkpoint: in full precision; a step of it is timed for what no choice changes.
        space: whose layers, with their rows per sample.
        batch, guidance: of a step; guided, layers see twice the samples.
        numerics: of quantized products.
        num_rounds, seconds, seed, conditions, state, time_fn: as in `bench`; seconds are those of a choice.
        total_fn, progress_fn: called with the number of times to take, and how many were just taken.

    Raises:
        UserError: if a choice cannot be computed with these numerics, the checkpoint is quantized, or
            `state` holds other measurements.
    """
    check_counts(batch=batch)
    check_rounds(num_rounds, seconds)
    check_known([numerics], [])
    if checkpoint.recipe is not None:
        raise UserError(
            f"the checkpoint is quantized already ({checkpoint.recipe.name}); give the "
            "full-precision checkpoint."
        )
    entrants = contenders_of(checkpoint, ())
    guidance = fitting_guidance(checkpoint.model, guidance)
    settings = settings_of(entrants, guidance, num_rounds, seconds, check_seed(seed), conditions)
    time_fn = time_fn or partial(interleaved, seconds=seconds)
    records = Records(state, settings)
    inputs = batch * calls_per_step(checkpoint.model, guidance)
    shapes = choices_by_shape(space, inputs)
    check_computable(shapes, numerics)
    total_fn(1 + sum(map(len, shapes.values())))
    job = (entrants[0], batch, Way())
    race = Race(entrants[0], Way(), guidance, num_rounds, seed, time_fn, conditions)
    step_row = Row.from_json(records.entry(entry_name(*job), partial(race.row, *job)))
    progress_fn(Progress(1))
    layers: list[LayerTime] = []
    for shape, choices in shapes.items():
        name = f"layers {shape}, {numerics}, {digest(list(choices))}"
        measure_fn = partial(times_of, shape, choices, numerics, num_rounds, seed, time_fn)
        layers += [LayerTime(**entry) for entry in records.entry(name, measure_fn)["layers"]]
        progress_fn(Progress(len(choices)))
    return Latency(
        batch, inputs, numerics, step_row.milliseconds.median, tuple(layers), provenance()
    )


def choices_by_shape(space: Space, inputs: int) -> dict[Shape, dict[str, LayerSpec]]:
    """Returns what is measured of every distinct shape, by name, full precision first."""
    found: dict[Shape, dict[str, LayerSpec]] = {}
    for layer in space.layers:
        k, n = layer.shape
        chosen = found.setdefault((k, n, layer.rows * inputs), {})
        for spec in (LayerSpec(), *layer.choices, *references(layer)):
            computed = run_time_spec(layer, spec)
            chosen.setdefault(choice_name(computed, k), computed)
    return found


def references(layer: SearchLayer) -> Iterator[LayerSpec]:
    """Yields what budgets are relative to: each bits of the choices, at the references' sizes.

    The inputs have that size too, or keep theirs, as budgets take them; there is no transform and no
    branch.
    """
    first: dict[tuple[int | None, int | None], LayerSpec] = {}
    for spec in layer.choices:
        first.setdefault((side_bits(spec.weight), side_bits(spec.act)), spec.plain)
    for spec in first.values():
        for size in REFERENCES:
            one = dataclasses.replace(layer, choices=(spec, *layer.choices))
            yield reference_spec(one, size, None)
            yield resized(spec, size)


def side_bits(side: Any) -> int | None:
    return None if side is None else side.bits


def check_computable(shapes: dict[Shape, dict[str, LayerSpec]], numerics: str) -> None:
    """Raises `UserError` for a choice that cannot be computed, before anything is measured."""
    for shape, choices in shapes.items():
        for name, spec in choices.items():
            try:
                computed_by(shape, spec, numerics)
            except ValueError as error:
                raise UserError(f"{name} with numerics={numerics!r}: {error}") from error


def computed_by(shape: Shape, spec: LayerSpec, numerics: str) -> str | None:
    """Returns who computes a product; None in full precision.

    Raises:
        ValueError: if nobody can.
    """
    if spec.weight is None:
        return None
    given = ((shape[2], shape[0]), spec.weight, spec.act, numerics)
    with on_one_device():
        return implementation_of(*given, dtype=DTYPE)


def times_of(
    shape: Shape,
    choices: dict[str, LayerSpec],
    numerics: str,
    num_rounds: int,
    seed: int,
    time_fn: TimeFn,
) -> dict[str, list[dict[str, Any]]]:
    """Returns the times of one shape's choices, taken in turn, in JSON's types."""
    k, n, rows = shape
    rng = np.random.default_rng([seed, *shape])
    given = jax.device_put(rng.normal(size=(rows, k)).astype(DTYPE), jax.local_devices()[0])
    kernel = (rng.normal(size=(k, n)) / k**0.5).astype(np.float32)
    bias = np.zeros(n, np.float32)
    calls = [compiled(f"{shape} {NOTHING}", nothing, {"bias": bias}, given)]
    for name, spec in choices.items():
        params = layer_params(kernel, bias, spec, rng)
        linear = partial(applied, Linear(n, numerics=numerics, dtype=DTYPE))
        calls.append(compiled(f"{shape} {name}", linear, params, given))
    seconds = 1000 * time_fn(calls, num_rounds)
    call_ms = float(np.median(seconds[0]))
    found = []
    for (name, spec), values in zip(choices.items(), seconds[1:], strict=True):
        ms = taken(values)
        used = computed_by(shape, spec, numerics)
        time = LayerTime(k, n, rows, name, ms.median, ms.low, ms.high, call_ms, used)
        found.append(dataclasses.asdict(time))
    return {"layers": found}


def layer_params(
    kernel: np.ndarray, bias: np.ndarray, spec: LayerSpec, rng: np.random.Generator
) -> Params:
    """Returns the parameters of a layer in the format of a choice.

    The kernel stays as it is in any coordinates: values make no difference to the time.
    """
    params = {"layer": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}
    if spec != LayerSpec():
        params = quantize_params(params, recipe=Recipe((Rule("layer", spec.plain),)))
    return {**params["layer"], **beside_kernel(kernel.shape[0], kernel.shape[1], spec, rng)}


def beside_kernel(k: int, n: int, spec: LayerSpec, rng: np.random.Generator) -> dict[str, Any]:
    """Returns what a transform and a rank place beside a kernel, by slot, with random values."""
    parts = TRANSFORMS[spec.transform or "none"]
    found: dict[str, Any] = {}
    if {"smooth", "shift"} & set(parts):
        shift = rng.normal(size=k).astype(np.float32) if "shift" in parts else None
        found["input_map"] = InputMap(rng.uniform(0.5, 2, k).astype(np.float32), shift)
    size = rotated_block(spec.transform, k)
    if size is not None and "pca" not in parts:
        found["rotation"] = Rotation("regular", size)
    if size is not None and "pca" in parts:
        blocks = np.linalg.qr(rng.normal(size=(k // size, size, size)))[0]
        found["rotation"] = Rotation("dense", size, matrix=blocks.astype(np.float32))
    if spec.rank:
        down, up = rng.normal(size=(k, spec.rank)), rng.normal(size=(spec.rank, n))
        found["low_rank"] = LowRank(down.astype(np.float16), up.astype(np.float16))
    return found


def applied(module: Linear, params: Params, x: jax.Array) -> jax.Array:
    """Returns a layer's output."""
    return module.apply({"params": params}, x)  # type: ignore[return-value]


def nothing(params: Params, x: jax.Array) -> jax.Array:
    """Returns one value, so that nearly all of the call is the call itself."""
    return x[0, 0] + params["bias"][0]


def compiled(
    name: str, apply: Callable[[Params, jax.Array], jax.Array], params: Params, x: jax.Array
) -> Call:
    """Returns a compiled call with its arguments."""
    params = jax.device_put(params, jax.local_devices()[0])
    with on_one_device():
        call = jax.jit(apply).lower(params, x).compile()
    return Call(name, partial(call, params, x))
