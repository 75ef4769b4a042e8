"""What a caller asked of a search, and the problem that it is for a strategy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np

from qdit_jax.allocation.budget import Budget
from qdit_jax.allocation.coordinates import Coordinates
from qdit_jax.allocation.evaluate import Evaluator
from qdit_jax.allocation.fitting import asks_for_fits
from qdit_jax.allocation.objectives import Objective, function_objective, paired_error
from qdit_jax.allocation.problem import Problem, Strategy
from qdit_jax.allocation.records import Store
from qdit_jax.allocation.rollout_settings import Rollouts
from qdit_jax.allocation.rollouts import Rollout, Seeds, Sensitivities, seeds
from qdit_jax.allocation.space import Space, beside_of, uniform_assignment, uniform_sizes
from qdit_jax.checkpoint import Checkpoint, fingerprint
from qdit_jax.sampling import check_takes, denoiser
from qdit_jax.types import Key, Numbers, Params, ProgressFn

# "paired" or "predicted", an objective, or a traced `(params, key) -> scalar`.
AnyObjective: TypeAlias = str | Objective | Callable[[Params, Key], Numbers]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A search as its caller described it, checked: what its result depends on."""

    checkpoint: Checkpoint
    key: Key
    strategy: Strategy
    objective: AnyObjective
    space: Space
    rollouts: Rollouts
    limit: Budget

    @property
    def rollout(self) -> Rollout:
        return self.rollouts.rollout(self.checkpoint, self.strategy.guided)

    def settings(self) -> dict[str, Any]:
        """Returns digests of everything that determines the result, by name."""
        plain = dataclasses.replace(
            self.rollouts, sampler=None, per_device=1, data=None, state=None
        )
        found = fingerprint(
            strategy=self.strategy,
            budget=self.limit.text,
            limit=self.limit,
            objective=self.objective,
            key=self.key,
            space=self.space,
            params=self.checkpoint.params,
            model=self.checkpoint.model,
            sampler=self.rollout.sampler,
            rollouts=plain,
        )
        fitted = asks_for_fits(self.space)
        return found | (fingerprint(data=self.rollouts.data) if fitted else {})

    def problem(
        self,
        coordinates: Mapping[str, Coordinates],
        store: Store | None,
        progress_fn: ProgressFn,
    ) -> tuple[Problem, Sensitivities]:
        """Returns the problem for a strategy, and the sensitivities that predictions use."""
        model, params, rollouts = self.checkpoint.model, self.checkpoint.params, self.rollouts
        rollout, space = self.rollout, self.space
        denoise_fn = denoiser(model, params, rollout.guidance)
        check_takes(denoise_fn, model, rollouts.shape, rollouts.conditions)
        noise_key, probe_key = jax.random.split(self.key)
        size = rollouts.batch_size
        first = rollouts.num_batches * size  # sensitivities have samples of their own
        same: dict[str, Any] = {"conditions": rollouts.conditions, "shape": rollouts.shape}
        calibration = seeds(model, noise_key, rollouts.num_calibration, size, first, **same)
        predict_fn = Sensitivities(
            rollout, space, params, calibration, probe_key, rollouts.num_probes, coordinates
        )
        evaluator = None
        if self.objective != "predicted":
            data = seeds(model, noise_key, rollouts.num_batches, size, **same)
            evaluator = Evaluator(
                space,
                params,
                as_objective(self.objective, rollout, params, data, noise_key),
                coordinates=coordinates,
                per_device=rollouts.per_device,
                progress_fn=progress_fn,
            )
        given = given_assignments(space, self.limit)
        seed = int(np.asarray(jax.random.key_data(self.key)).ravel()[-1])
        problem = Problem(space, self.limit, evaluator, predict_fn, seed, given, store, progress_fn)
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
