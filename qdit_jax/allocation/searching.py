"""`search`: a checkpoint in, the recipe of a good allocation out.

The search itself is in the other files of this room; here it meets networks, samplers and the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from qdit_jax.allocation.allocate import AllocationSettings, allocate, predicted_only
from qdit_jax.allocation.budget import Budget, parse_budget
from qdit_jax.allocation.cost import named_costs
from qdit_jax.allocation.descent import additive_solution, own_errors
from qdit_jax.allocation.evaluate import Evaluator
from qdit_jax.allocation.evolution import EvolutionSettings, evolve, random_children
from qdit_jax.allocation.journal import Journal
from qdit_jax.allocation.knapsack import lagrangian_front, pareto
from qdit_jax.allocation.nsga import offspring
from qdit_jax.allocation.objectives import function_objective, paired_error
from qdit_jax.allocation.records import Measured, Store
from qdit_jax.allocation.rollouts import Rollout, Sensitivities, seeds
from qdit_jax.allocation.sensitivity import Prediction
from qdit_jax.allocation.space import (
    Space,
    describe,
    recipe_of,
    search_space,
    uniform_assignment,
    uniform_sizes,
)
from qdit_jax.calibration import default_sampler
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.files import PathLike
from qdit_jax.recipes import Recipe

METHODS = ("default", "nsga2", "qdit-paper", "qdit-release", "random")
DEFAULT_BUDGET = "bitops=1.0x-g128"
# What the release really searches (see its loop): weight groups only, symmetric, without guidance,
# under a mean group size.
RELEASE = {"sides": "weights", "symmetric": True}
RELEASE_BUDGET = "mean-group=128"


@dataclasses.dataclass(frozen=True, eq=False)
class Front:
    """Assignments `[F, L]` that no other beats in both cost and error, cheapest first.

    `error` is predicted by the default search, measured by the others.
    """

    assignments: np.ndarray
    cost: np.ndarray
    error: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found.

    Attributes:
        recipe: for `quantize_params`.
        assignment: the same as choices of `space`, `[L]`.
        front: cost against error.
        history: JSON-able: settings, everything measured, the report, network evaluations.
    """

    recipe: Recipe
    assignment: np.ndarray
    front: Front
    history: dict[str, Any]
    space: Space
    budget: Budget


def search(
    checkpoint: Checkpoint,
    key: Any,
    *,
    budget: str | None = None,
    objective: Any = "paired",
    method: str = "default",
    space: Space | None = None,
    sampler: Any = None,
    num_steps: int = 20,
    guidance: float | None = 1.5,
    num_batches: int = 16,
    batch_size: int = 16,
    num_calibration: int = 2,
    num_probes: int = 8,
    settings: AllocationSettings | EvolutionSettings | None = None,
    costs: Mapping[str, Any] | None = None,
    state: PathLike | None = None,
    per_device: int = 1,
    report_fn: Callable[[dict[str, Any]], Any] = lambda event: None,
    **space_settings: Any,
) -> SearchResult:
    """Returns the allocation with the least error within a budget.

    Args:
        checkpoint: full precision.
        key: everything random follows from it, on any number of devices and processes.
        budget: such as `bitops=1.0x-g128` or `bytes=300M`, see `search.parse_budget`.
        objective: "paired": error of final latents with the same noise; "predicted": the
            sensitivities alone, nothing measured; a function `(params, key) -> scalar`; or an
            objective such as `rollouts.frechet_objective(...)`.
        method: "default": sensitivities and the exact knapsack, verified; "qdit-paper" and
            "qdit-release": the published evolution, and what its release really does; "nsga2": a
            measured front, begun from the predicted one; "random".
        space: or settings of `search_space` as keywords (`weight_bits=3`, `sides="separate"`).
        sampler: of the rollouts; `num_steps` of the default one if None.
        num_batches, batch_size: samples on which an assignment can be measured. The default search
            uses few for most and all of them for finalists; the others use all.
        num_calibration: batches for the sensitivities, of other samples; num_probes: of each.
        costs: cost functions that the budget may name, beside `search.named_costs`.
        state: a folder that keeps what was computed; the same call goes on from it.
        per_device: items a device measures in one call.
        report_fn: called with `{"text"}`, `{"total"}`, `{"items"}` and `{"best"}` as things happen.

    Raises:
        ValueError: if a setting does not fit, a budget is impossible, or a fitness is no number.
    """
    began = time.perf_counter()
    budget, guidance, space_settings = with_preset(method, budget, guidance, space_settings)
    model, params = checkpoint.model, checkpoint.params
    space = search_space(params, **space_settings) if space is None else space
    height, width = (
        (model.input_size,) * 2 if isinstance(model.input_size, int) else model.input_size
    )
    tokens = (height // model.patch_size) * (width // model.patch_size)
    limit = parse_budget(budget, space, {**named_costs(tokens), **(costs or {})})
    if limit.leaves_no_choice:
        text = "nothing to search: only the cheapest assignment fits; allow more, or coarser sizes"
        report_fn({"text": f"{budget}: {text}"})
    sampler = default_sampler(checkpoint, num_steps) if sampler is None else sampler
    rollout = Rollout.of(model, sampler, guidance)
    noise_key, probe_key = jax.random.split(key)
    data = seeds(model, noise_key, num_batches, batch_size)
    given = [uniform_assignment(space, size) for size in uniform_sizes(space)]
    seed = int(np.asarray(jax.random.key_data(key)).ravel()[-1])
    name = objective if isinstance(objective, str) else type(objective).__name__
    fingerprint = {
        "method": method,
        "budget": budget,
        "objective": name,
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "space": digest(space),
        "params": digest_of_params(params),
        "rollout": [rollout.num_steps, guidance, num_batches, batch_size],
        "sensitivities": [num_calibration, num_probes],
        "settings": repr(settings),
    }
    with contextlib.ExitStack() as stack:
        store = None if state is None else stack.enter_context(Store(state, fingerprint))
        predict_fn = Sensitivities(
            rollout,
            space,
            params,
            seeds(model, noise_key, num_calibration, batch_size, num_batches * batch_size),
            probe_key,
            num_probes,
        )
        if objective == "predicted":
            found = from_predictions(space, limit, predict_fn, report_fn, given=given, store=store)
        else:
            evaluator = Evaluator(
                space,
                params,
                as_objective(objective, rollout, params, data, noise_key),
                per_device=per_device,
                progress_fn=lambda count: report_fn({"items": count}),
            )
            run = by_allocation if method == "default" else by_evolution
            found = run(
                space,
                limit,
                evaluator,
                predict_fn,
                report_fn,
                method=method,
                seed=seed,
                settings=settings,
                given=given,
                store=store,
            )
    assignment, front, measured, report = found
    if objective != "predicted":
        per_item = batch_size * rollout.evaluations
        reference = num_batches * per_item if objective == "paired" else 0
        report["network_evaluations"] = (
            reference
            + report.pop("num_items") * per_item
            + report.pop("num_predictions") * predict_fn.evaluations
        )
    history = {
        **fingerprint,
        "limit": limit.limit,
        "layers": [layer.path for layer in space.layers],
        "choices": [[describe(spec) for spec in layer.choices] for layer in space.layers],
        "measured": measured.rows(),
        "assignment": assignment.tolist(),
        "cost": float(limit.cost(assignment)),
        "report": report,
        "seconds": time.perf_counter() - began,
    }
    recipe = recipe_of(space, assignment, f"search-{method}-{budget}")
    return SearchResult(recipe, assignment, front, history, space, limit)


def with_preset(
    method: str, budget: str | None, guidance: float | None, settings: dict[str, Any]
) -> tuple[str, float | None, dict[str, Any]]:
    """Returns budget, guidance and settings of the space with those that the method implies."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; use one of {', '.join(METHODS)}.")
    if method == "qdit-release":
        return budget or RELEASE_BUDGET, None, {**RELEASE, **settings}
    return budget or DEFAULT_BUDGET, guidance, settings


def as_objective(objective: Any, rollout: Rollout, params: Any, data: Any, key: Any) -> Any:
    """Returns what the evaluator measures."""
    if objective == "paired":
        return paired_error(rollout, params, *data)
    if isinstance(objective, str):
        raise ValueError(
            f"objective={objective!r} is not known; use 'paired', 'predicted', a function "
            "(params, key) -> scalar, or an objective."
        )
    if hasattr(objective, "measure"):
        return objective
    return function_objective(objective, key, len(data[0]))


Found = tuple[np.ndarray, Front, Measured, dict[str, Any]]


def by_allocation(
    space: Space,
    budget: Budget,
    evaluator: Evaluator,
    predict_fn: Any,
    report_fn: Callable,
    *,
    method: str,
    seed: int,
    settings: Any,
    given: list[np.ndarray],
    store: Store | None,
) -> Found:
    settings = allocation_settings(settings, evaluator.objective.num_batches)
    report_fn({"total": settings.planned_items(len(given)), "text": "measuring sensitivities"})
    out = allocate(
        space,
        budget,
        evaluator,
        predict_fn,
        seed=seed,
        settings=settings,
        first=given,
        journal=Journal(store),
        report_fn=lambda text, best=None: report_fn({"text": text, "best": best}),
    )
    front = Front(out.front, out.front_cost, out.front_error)
    return out.assignment, front, out.measured, out.report


def allocation_settings(settings: Any, num_batches: int) -> AllocationSettings:
    """Returns the settings with rungs that the objective has batches for."""
    settings = AllocationSettings() if settings is None else settings
    if not isinstance(settings, AllocationSettings):
        raise TypeError(f"settings={settings!r} are not AllocationSettings, as this method needs.")
    rungs = sorted({min(rung, num_batches) for rung in settings.rungs} | {num_batches})
    return dataclasses.replace(settings, rungs=tuple(rungs))


def by_evolution(
    space: Space,
    budget: Budget,
    evaluator: Evaluator,
    predict_fn: Any,
    report_fn: Callable,
    *,
    method: str,
    seed: int,
    settings: Any,
    given: list[np.ndarray],
    store: Store | None,
) -> Found:
    settings = EvolutionSettings() if settings is None else settings
    if not isinstance(settings, EvolutionSettings):
        raise TypeError(f"settings={settings!r} are not EvolutionSettings, as this method needs.")
    children = settings.num_crossover + settings.num_mutation
    total = settings.population + settings.num_generations * children
    report_fn({"total": total * evaluator.objective.num_batches})
    saved = None if store is None else store.load()

    def after_generation(measured: Measured) -> None:
        if store is not None:
            store.save(measured.arrays())
        text = f"generation {measured.num_rounds - 1}: {len(measured.fitness)} measured"
        best = float(measured.fitness.min())
        report_fn({"text": f"{text}, best {best:.6g}", "best": best})

    first = [a for a in given if budget.allows(a)]
    if method == "nsga2" and saved is None:
        report_fn({"text": "measuring sensitivities"})
        first = predicted_front(predict_fn(None), space, budget, settings.population // 2) + first
    measured = evolve(
        space,
        budget,
        evaluator,
        seed=seed,
        settings=settings,
        first=first,
        measured=None if saved is None else Measured(**saved),
        save_fn=after_generation,
        draw_fn={"nsga2": offspring, "random": random_children}.get(method),
    )
    kept = pareto(measured.cost, measured.fitness)
    front = Front(measured.assignments[kept], measured.cost[kept], measured.fitness[kept])
    items = len(measured.fitness) * evaluator.objective.num_batches
    report = {"num_items": items, "num_predictions": int(method == "nsga2")}
    return measured.best, front, measured, report


def predicted_front(
    prediction: Prediction, space: Space, budget: Budget, count: int
) -> list[np.ndarray]:
    """Returns at most `count` legal assignments of the predicted front, the knapsack's first."""
    front = lagrangian_front(own_errors(prediction, space), list(budget.table))[0]
    legal = front[budget.allows(front)]
    spread = np.unique(np.linspace(0, len(legal) - 1, max(count - 1, 1)).round().astype(int))
    return [additive_solution(prediction, space, budget).assignment, *legal[spread]][:count]


def from_predictions(
    space: Space,
    budget: Budget,
    predict_fn: Any,
    report_fn: Callable,
    *,
    given: list[np.ndarray],
    store: Store | None,
) -> Found:
    report_fn({"total": 0, "text": "measuring sensitivities"})
    out = predicted_only(space, budget, predict_fn, first=given, journal=Journal(store))
    report_fn({"text": "rank correlation not checked: nothing is measured by this objective"})
    report = {**out.report, "network_evaluations": predict_fn.evaluations}
    return out.assignment, Front(out.front, out.front_cost, out.front_error), out.measured, report


def digest(space: Space) -> str:
    """Returns a short fingerprint of a space."""
    return hashlib.sha256(repr(space).encode()).hexdigest()[:16]


def digest_of_params(params: Any) -> str:
    """Returns a short fingerprint of parameters: shapes and a sample of the values."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        values = np.asarray(leaf).ravel()
        total.update(f"{leaf.shape}{leaf.dtype}".encode())
        total.update(values[:: max(1, values.size // 256)].tobytes())
    return total.hexdigest()[:16]
