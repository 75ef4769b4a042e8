"""`search`: a checkpoint in, the recipe of a good allocation out.

The strategies are in `allocation.strategies`; here they get networks, samplers and a store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from qdit_jax import diffusion
from qdit_jax.allocation.budget import Budget, check_limiting, parse_budget
from qdit_jax.allocation.coordinates import Coordinates
from qdit_jax.allocation.cost import CostFn, named_costs
from qdit_jax.allocation.evaluate import Evaluator, naming_lost_workers
from qdit_jax.allocation.fitting import asks_for_fits, fitted_coordinates
from qdit_jax.allocation.latency import Latency
from qdit_jax.allocation.objectives import Objective, function_objective, paired_error
from qdit_jax.allocation.problem import Found, Front, Problem, ReportFn, Strategy
from qdit_jax.allocation.records import Store
from qdit_jax.allocation.rollouts import Rollout, Seeds, Sensitivities, seeds
from qdit_jax.allocation.space import (
    Space,
    beside_of,
    describe,
    recipe_of,
    search_space,
    uniform_assignment,
    uniform_sizes,
)
from qdit_jax.allocation.strategies import strategy_named
from qdit_jax.calibration import default_sampler
from qdit_jax.checkpoint import Checkpoint, fingerprint
from qdit_jax.errors import check_counts
from qdit_jax.files import PathLike, as_path
from qdit_jax.methods import CalibrationData
from qdit_jax.models import check_all_run, step_shares
from qdit_jax.recipes import Recipe
from qdit_jax.sampling import (
    PUBLISHED,
    Guidance,
    check_diffusion_model,
    check_takes,
    chosen_guidance,
    denoiser,
    sample_rows,
    sampler_timesteps,
)
from qdit_jax.types import UNSAID, Condition, Key, Numbers, Params

# "paired" or "predicted", an objective, or a traced `(params, key) -> scalar`.
AnyObjective: TypeAlias = str | Objective | Callable[[Params, Key], Numbers]


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """How candidates are sampled.

    Attributes:
        sampler: of the rollouts; `num_steps` of the checkpoint's default one if None.
        guidance: of the rollouts; the network's own by default, see `sampling.own_guidance`.
        conditions: labels or prompts, cycled over the samples; every class by default.
        num_batches, batch_size: samples on which an assignment can be measured. The default
            strategy uses few for most and all of them for finalists; the others use all.
        num_calibration: batches for the sensitivities; their samples are different ones.
        num_probes: random directions per sample in which sensitivities are measured.
        per_device: items a device measures in one call.
        shape: of one sample, channels last; the network's own by default. Costs are of that size.
    """

    sampler: diffusion.Sampler | None = None
    num_steps: int = 20
    guidance: Guidance | None = PUBLISHED
    conditions: Condition = None
    num_batches: int = 16
    batch_size: int = 16
    num_calibration: int = 2
    num_probes: int = 8
    per_device: int = 1
    shape: Sequence[int] | None = dataclasses.field(default=None, metadata=UNSAID)

    def __post_init__(self) -> None:
        check_counts(
            num_steps=self.num_steps,
            num_batches=self.num_batches,
            batch_size=self.batch_size,
            num_calibration=self.num_calibration,
            num_probes=self.num_probes,
            per_device=self.per_device,
        )

    def rollout(self, checkpoint: Checkpoint, guided: bool) -> Rollout:
        """Returns the checkpoint's sampler as a function of the parameters."""
        sampler = self.sampler
        if sampler is None:
            sampler = default_sampler(checkpoint, self.num_steps, self.shape)
        return Rollout.of(checkpoint.model, sampler, self.guidance if guided else None)


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
    budget: str | None = None,
    objective: AnyObjective = "paired",
    strategy: str | Strategy = "default",
    space: Space | Mapping[str, Any] | None = None,
    rollouts: Rollouts | None = None,
    costs: Mapping[str, CostFn] | None = None,
    data: CalibrationData | None = None,
    state: PathLike | None = None,
    report_fn: ReportFn = lambda event: None,
) -> SearchResult:
    """Returns the allocation with the least error within a budget.

    Args:
        checkpoint: full precision.
        key: determines everything random, on any number of devices and processes.
        budget: such as `bitops=1.0x-g128` or `bytes=300M`, see `parse_budget`.
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
        rollouts: how candidates are sampled.
        costs: cost functions that the budget may name, beside `named_costs`, such as
            `{"latency": Latency.read("latency.json")}`.
        data: what the transforms and branches of the space are fitted to, once at the start, as
            `qdit.quantize(..., method="best", data=data)` fits them afterwards; sampled by default.
        state: a folder that keeps what was computed; the same call resumes from it.
        report_fn: called with a dict that has some of `text`, `total`, `items` (just measured) and
            `best`, whenever there is news.

    Raises:
        ValueError: if a setting does not fit, a budget is impossible or limits nothing, or a
            fitness is not a number.
        UserError: if `state` holds another search; the first setting that differs is named.
    """
    began = time.perf_counter()
    check_network(checkpoint)
    strategy = strategy_named(strategy)
    names = {"method": strategy.name, "objective": name_of(objective)}
    rollouts = Rollouts() if rollouts is None else rollouts
    guidance = chosen_guidance(checkpoint.model, rollouts.guidance)
    rollouts = dataclasses.replace(rollouts, guidance=guidance)
    rows = sample_rows(checkpoint.model, rollouts.shape, rollouts.conditions)
    sampler = rollouts.rollout(checkpoint, strategy.guided).sampler
    space = space_of(checkpoint, strategy, space, rows, sampler_timesteps(sampler))
    budget = strategy.budget if budget is None else budget
    known = {**named_costs(), **(costs or {})}
    # A strategy that minimizes a cost has no limit of it.
    limit = getattr(strategy, "budget_of", parse_budget)(budget, space, known)
    check_limiting(limit)
    times = latency_facts(known[limit.name], space, report_fn)
    if limit.leaves_no_choice:
        text = "nothing to search: only the cheapest assignment fits; allow more, or coarser sizes"
        report_fn({"text": f"{budget}: {text}"})
    settings = fingerprint(
        strategy=strategy,
        budget=budget,
        limit=limit,
        objective=objective,
        key=key,
        space=space,
        params=checkpoint.params,
        model=checkpoint.model,
        sampler=sampler,
        rollouts=dataclasses.replace(rollouts, sampler=None, per_device=1),
    )
    if asks_for_fits(space):
        settings |= fingerprint(data=data)
    with naming_lost_workers(), contextlib.ExitStack() as stack:
        store, fit_store = stores(stack, state, settings)
        coordinates = fitted_coordinates(
            checkpoint, space, data, store=fit_store, report_fn=report_fn
        )
        problem, predict_fn = problem_of(
            checkpoint,
            key,
            rollouts,
            strategy.guided,
            objective,
            space,
            coordinates,
            limit,
            store,
            report_fn,
        )
        found = strategy.run(problem)
    report = found.report | {"network_evaluations": evaluations(found, problem, predict_fn)}
    history = {
        **settings,
        **names,
        **record(space, limit, found),
        **times,
        "report": report,
        "seconds": time.perf_counter() - began,
    }
    recipe = recipe_of(space, found.assignment, f"search-{strategy.name}-{budget}")
    return SearchResult(recipe, found.assignment, found.front, history, space, limit)


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


def latency_facts(cost_fn: CostFn, space: Space, report_fn: ReportFn) -> dict[str, Any]:
    """Returns what the history says of measured times, if the cost is one of those."""
    if not isinstance(cost_fn, Latency):
        return {}
    if note := cost_fn.device_note():
        report_fn({"text": note})
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


def problem_of(
    checkpoint: Checkpoint,
    key: Key,
    rollouts: Rollouts,
    guided: bool,
    objective: AnyObjective,
    space: Space,
    coordinates: Mapping[str, Coordinates],
    limit: Budget,
    store: Store | None,
    report_fn: ReportFn,
) -> tuple[Problem, Sensitivities]:
    """Returns the problem for a strategy, and the sensitivities that predictions use."""
    model, params = checkpoint.model, checkpoint.params
    rollout = rollouts.rollout(checkpoint, guided)
    denoise_fn = denoiser(model, params, rollout.guidance)
    check_takes(denoise_fn, model, rollouts.shape, rollouts.conditions)
    noise_key, probe_key = jax.random.split(key)
    first = rollouts.num_batches * rollouts.batch_size  # sensitivities have samples of their own
    size = rollouts.batch_size
    same: dict[str, Any] = {"conditions": rollouts.conditions, "shape": rollouts.shape}
    calibration = seeds(model, noise_key, rollouts.num_calibration, size, first, **same)
    predict_fn = Sensitivities(
        rollout, space, params, calibration, probe_key, rollouts.num_probes, coordinates
    )
    evaluator = None
    if objective != "predicted":
        data = seeds(model, noise_key, rollouts.num_batches, size, **same)
        evaluator = Evaluator(
            space,
            params,
            as_objective(objective, rollout, params, data, noise_key),
            coordinates=coordinates,
            per_device=rollouts.per_device,
            progress_fn=lambda count: report_fn({"items": count}),
        )
    given = given_assignments(space, limit)
    seed = int(np.asarray(jax.random.key_data(key)).ravel()[-1])
    problem = Problem(space, limit, evaluator, predict_fn, seed, given, store, report_fn)
    return problem, predict_fn


def given_assignments(space: Space, limit: Budget) -> list[np.ndarray]:
    """Returns uniform assignments to measure in any case and to begin from.

    They are those of every group size, and of every transform and rank the dearest within the
    budget: in a network whose errors do not add up, transforms may help only together.
    """
    sizes = uniform_sizes(space)
    given = [uniform_assignment(space, size) for size in sizes]
    for beside in beside_of(space)[1:]:
        drawn = (uniform_assignment(space, size, beside) for size in sizes)
        if legal := [one for one in drawn if limit.allows(one)]:
            given.append(max(legal, key=limit.cost))
    return list({one.tobytes(): one for one in given}.values())


def as_objective(
    objective: AnyObjective, rollout: Rollout, params: Params, data: Seeds, key: Key
) -> Objective:
    """Returns what the evaluator measures."""
    if isinstance(objective, str):
        if objective != "paired":
            raise ValueError(
                f"objective={objective!r} is not known; use 'paired', 'predicted', a function "
                "(params, key) -> scalar, or an objective."
            )
        return paired_error(rollout, params, *data)
    if isinstance(objective, Objective):
        return objective
    return function_objective(objective, key, len(data[0]))


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
