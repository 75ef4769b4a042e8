"""`search`: a checkpoint in, the recipe of a good allocation out.

The strategies are in `allocation.strategies`; here they get networks, samplers and a store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qdit_jax.allocation.asked import AnyObjective, Asked
from qdit_jax.allocation.budget import Budget, Priced, check_limiting, parse_budget
from qdit_jax.allocation.choices import describe
from qdit_jax.allocation.cost import CostFn
from qdit_jax.allocation.fitting import fitted_coordinates
from qdit_jax.allocation.latency import Latency
from qdit_jax.allocation.problem import Found, Front, Problem, Strategy
from qdit_jax.allocation.records import Store
from qdit_jax.allocation.rollout_settings import Rollouts
from qdit_jax.allocation.rollouts import Sensitivities
from qdit_jax.allocation.space import Space, recipe_of, search_space
from qdit_jax.allocation.strategies import strategy_named
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.files import PathLike, as_path
from qdit_jax.models import check_all_run, step_shares
from qdit_jax.processes import naming_lost_workers
from qdit_jax.recipes import Recipe
from qdit_jax.sampling import check_diffusion_model, chosen_guidance, sample_rows, sampler_timesteps
from qdit_jax.types import Key, Progress, ProgressFn, untold

ROLLOUTS = Rollouts()


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
    key: Key,
    *,
    budget: str | Priced | None = None,
    objective: AnyObjective = "paired",
    strategy: str | Strategy = "default",
    space: Space | Mapping[str, Any] | None = None,
    rollouts: Rollouts = ROLLOUTS,
    progress_fn: ProgressFn = untold,
) -> SearchResult:
    """Returns the allocation with the least error within a budget.

    Args:
        checkpoint: full precision.
        key: determines everything random, on any number of devices and processes.
        budget: such as `bitops=1.0x-g128` or `bytes=300M`, see `parse_budget`; `Priced` where it
            names costs of your own, such as measured times.
        objective: "paired": error of final latents with the same noise; "predicted": the
            sensitivities alone, nothing measured; a function `(params, key) -> scalar`; or an
            objective such as `frechet_objective(...)`.
        strategy: a name in `STRATEGIES`: "default": sensitivities and the exact knapsack, verified;
            "qdit-paper" and "qdit-release": the published evolution, and what its published code
            does; "nsga2": a measured front, begun from the predicted one; "random"; "cheapest": the
            least cost within an error. Or an object such as `Allocate(settings)`,
            `Evolve(settings)`, or `Cheapest("bytes", within="0.5dB-of-g128")`.
        space: a `Space`, or settings of `search_space` as a dict
            (`{"weight_bits": 3, "sides": "separate"}`).
        rollouts: how candidates are sampled, what their transforms are fitted to, and the folder
            that keeps what was computed, from which the same call resumes.
        progress_fn: told of `text`, the `total` of items, those `done`, and the `best` error.

    Raises:
        ValueError: if a setting does not fit, a budget is impossible or limits nothing, or a
            fitness is not a number.
        UserError: if `rollouts.state` holds another search; the first setting that differs is named.
    """
    began = time.perf_counter()
    check_network(checkpoint)
    strategy = strategy_named(strategy)
    guidance = chosen_guidance(checkpoint.model, rollouts.guidance)
    rollouts = dataclasses.replace(rollouts, guidance=guidance)
    rows = sample_rows(checkpoint.model, rollouts.shape, rollouts.conditions)
    sampler = rollouts.rollout(checkpoint, strategy.guided).sampler
    space = space_of(checkpoint, strategy, space, rows, sampler_timesteps(sampler))
    priced = Priced.of(budget, strategy.budget)
    check_measured(priced, space)
    limit = limit_of(strategy, priced, space, progress_fn)
    times = latency_facts(priced.costs[limit.name], space, progress_fn)
    asked = Asked(checkpoint, key, strategy, objective, space, rollouts, limit)
    settings = asked.settings()
    with naming_lost_workers(), contextlib.ExitStack() as stack:
        store, fit_store = stores(stack, rollouts.state, settings)
        coordinates = fitted_coordinates(
            checkpoint, space, rollouts.data, store=fit_store, progress_fn=progress_fn
        )
        problem, predict_fn = asked.problem(coordinates, store, progress_fn)
        found = strategy.run(problem)
    report = found.report | {"network_evaluations": evaluations(found, problem, predict_fn)}
    history = {
        **settings,
        "method": strategy.name,
        "objective": name_of(objective),
        **record(space, limit, found),
        **times,
        "report": report,
        "seconds": time.perf_counter() - began,
    }
    recipe = recipe_of(space, found.assignment, f"search-{strategy.name}-{limit.text}")
    return SearchResult(recipe, found.assignment, found.front, history, space, limit)


def limit_of(
    strategy: Strategy, priced: Priced, space: Space, progress_fn: ProgressFn = untold
) -> Budget:
    """Returns the budget in costs of the space's choices; without a limit if a cost is minimized."""
    assert priced.text is not None, "a strategy has a budget"
    limit: Budget = getattr(strategy, "budget_of", parse_budget)(priced.text, space, priced.costs)
    check_limiting(limit)
    if limit.leaves_no_choice:
        text = "nothing to search: only the cheapest assignment fits; allow more, or coarser sizes"
        progress_fn(Progress(text=f"{limit.text}: {text}"))
    return limit


def stores(
    stack: contextlib.ExitStack, state: PathLike | None, settings: dict[str, Any]
) -> tuple[Store | None, Store | None]:
    """Returns what keeps the search and its fits in the folder `state`, closed with `stack`."""
    if state is None:
        return None, None
    fits = {name: settings.get(name) for name in ("space", "params", "model", "data")}
    folders = ((as_path(state), settings), (as_path(state) / "fits", fits))
    search, fit = (stack.enter_context(Store(folder, of)) for folder, of in folders)
    return search, fit


def check_measured(priced: Priced, space: Space) -> None:
    """Raises `UserError` if the cost is measured times, and those of a choice are missing."""
    cost_fn = priced.costs.get(str(priced.text).partition("=")[0])
    if isinstance(cost_fn, Latency):
        cost_fn.check(space)


def latency_facts(cost_fn: CostFn, space: Space, progress_fn: ProgressFn) -> dict[str, Any]:
    """Returns what the history says of measured times, if the cost is one of those."""
    if not isinstance(cost_fn, Latency):
        return {}
    if note := cost_fn.device_note():
        progress_fn(Progress(text=note))
    return {"latency": cost_fn.facts(space)}


def check_network(checkpoint: Checkpoint) -> None:
    """Raises `ValueError` unless the checkpoint is a diffusion model in full precision."""
    check_diffusion_model(checkpoint.model)
    if checkpoint.recipe is not None:
        raise ValueError(
            f"the checkpoint is quantized already ({checkpoint.recipe.name}); search on the "
            "full-precision checkpoint."
        )


def space_of(
    checkpoint: Checkpoint,
    strategy: Strategy,
    space: Space | Mapping[str, Any] | None,
    rows: Mapping[str, int],
    timesteps: Sequence[float],
) -> Space:
    """Returns the given space, or the one of the given settings, which override the strategy's.

    Raises:
        ValueError: if an expert runs at none of the timesteps.
    """
    check_all_run(checkpoint.model, timesteps, "the rollouts' sampler")
    if isinstance(space, Space):
        return space
    settings = {**strategy.space, **(space or {})}
    shares = step_shares(checkpoint.model, rows, timesteps)
    return search_space(checkpoint.params, rows=rows, shares=shares, **settings)


def evaluations(found: Found, problem: Problem, predict_fn: Sensitivities) -> int:
    """Returns the number of network evaluations of one sample, references included."""
    counted = found.report["num_predictions"] * predict_fn.evaluations
    if problem.evaluator is None:
        return counted
    batch_size = predict_fn.data[0].shape[1]
    per_item = batch_size * predict_fn.rollout.evaluations
    objective = problem.evaluator.objective
    reference = objective.num_batches * per_item if hasattr(objective, "reference") else 0
    return reference + found.report["num_items"] * per_item + counted


def name_of(value: AnyObjective) -> str:
    """Returns what people call an objective."""
    return value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)


def record(space: Space, limit: Budget, found: Found) -> dict[str, Any]:
    """Returns what was searched and found in JSON's types."""
    return {
        "limit": limit.limit,
        "layers": [layer.path for layer in space.layers],
        "choices": [[describe(spec) for spec in layer.choices] for layer in space.layers],
        "measured": found.measured.rows(),
        "assignment": found.assignment.tolist(),
        "cost": float(limit.cost(found.assignment)),
    }
