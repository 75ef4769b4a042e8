"""Descent on a quadratic prediction under a budget, and its correction by measured errors.

Dimensions: L layers, C most choices of a layer, N measured assignments.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from qdit_jax.allocation.budget import Budget
from qdit_jax.allocation.knapsack import Solution, solve
from qdit_jax.allocation.sensitivity import Prediction
from qdit_jax.allocation.space import Space
from qdit_jax.types import Numbers

RIDGES = tuple(10.0**power for power in range(-3, 4))


def additive_solution(prediction: Prediction, space: Space, budget: Budget) -> Solution:
    """Returns the exact knapsack solution of each choice's own share of the error."""
    return solve(own_errors(prediction, space), list(budget.table), budget.limit + budget.slack)


def own_errors(prediction: Prediction, space: Space) -> list[np.ndarray]:
    """Returns each layer's own errors, one array per layer (without padding)."""
    return [row[:n] for row, n in zip(prediction.table, space.num_choices, strict=True)]


def descend(
    prediction: Prediction, space: Space, budget: Budget, start: Numbers, max_moves: int = 200
) -> list[np.ndarray]:
    """Returns the path from `start` to a local optimum of the joint prediction within the budget.

    Each move changes one layer, or two at once (one may pay for the other), and is the best of all.
    """
    path = [space.check(start)]
    costs = padded_costs(space, budget)
    for _ in range(max_moves):
        move = best_move(prediction, costs, budget, path[-1])
        if move is None:
            break
        path.append(move)
    return path[1:]


def padded_costs(space: Space, budget: Budget) -> np.ndarray:
    """Returns the costs as one array `[L, C]`, infinite where a layer has fewer choices."""
    costs = np.full((len(space.layers), int(space.num_choices.max())), np.inf)
    for row, table in zip(costs, budget.table, strict=True):
        row[: len(table)] = table
    return costs


def best_move(
    prediction: Prediction, costs: np.ndarray, budget: Budget, current: np.ndarray
) -> np.ndarray | None:
    """Returns the assignment after the legal move that lowers the prediction most, or None."""
    layers = np.arange(len(prediction.linear))
    gram = prediction.gram
    # Sum over the other layers m of gram[l, c, m, current_m]: [L, C].
    with_rest = gram[:, :, layers, current].sum(axis=2) - gram[layers, :, layers, current]
    # Every pair of layers stands twice in the sum over l and m, hence the factor 2.
    own = prediction.linear + np.einsum("lclc->lc", gram) + 2 * with_rest  # [L, C]
    gain = own - own[layers, current][:, None]  # [L, C] of a single move
    extra = costs - costs[layers, current][:, None]  # [L, C]; infinite for padding
    room = budget.limit + budget.slack - costs[layers, current].sum()
    # What two moves change together beyond each alone: the mixed difference of the gram matrix.
    shifted = gram - gram[layers, current][:, None]  # [L, C, L, C]
    mixed = shifted - shifted[:, :, layers, current][..., None]  # [L, C, L, C]
    pair = gain[:, :, None, None] + gain + 2 * mixed
    pair[layers, :, layers, :] = np.inf  # two choices of one layer are no pair
    price = extra[:, :, None, None] + extra  # [L, C, L, C]
    pair = np.where(price <= room, pair, np.inf)
    single = np.where(extra <= room, gain, np.inf)
    # A smaller gain than this is rounding.
    least = -1e-9 * abs(prediction.constant + own[layers, current].sum())
    moved = current.copy()
    if single.min() <= pair.min():
        if single.min() >= least:
            return None
        layer, choice = np.unravel_index(single.argmin(), single.shape)
        moved[layer] = choice
        return moved
    if pair.min() >= least:
        return None
    one, first, two, second = np.unravel_index(pair.argmin(), pair.shape)
    moved[[one, two]] = first, second
    return moved


def corrected(
    prediction: Prediction,
    assignments: Int[np.ndarray, "N L"],
    measured: Float[np.ndarray, " N"],
    *,
    additive: bool,
) -> Prediction:
    """Returns the prediction scaled and shifted to measured errors: a ridge regression.

    `measured ~ a prediction + b + sum_l theta[l, c_l]`; the strength of the ridge on theta is the
    one with the least leave-one-out error.

    Args:
        assignments, measured: `[N, L]` and `[N]`.
        additive: whether to start from the additive prediction, without terms between layers.
    """
    base = own_only(prediction) if additive else prediction
    predicted = base.joint(assignments)
    spread = predicted.var()
    slope = 0.0 if spread == 0 else float(np.cov(predicted, measured, bias=True)[0, 1] / spread)
    slope = max(slope, 0.0)  # a prediction that ranks the wrong way round is not used
    residual = measured - slope * predicted
    count, choices = base.linear.shape
    onehot = (assignments[:, :, None] == np.arange(choices)).reshape(len(measured), -1)  # [N, L C]
    theta, offset = ridge(onehot.astype(np.float64), residual)
    return Prediction(
        slope * base.constant + offset,
        slope * base.linear + theta.reshape(count, choices),
        slope * base.gram,
    )


def own_only(prediction: Prediction) -> Prediction:
    """Returns the prediction without its terms between layers."""
    return dataclasses.replace(
        prediction, linear=prediction.table, gram=np.zeros_like(prediction.gram)
    )


def ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns weights and offset of the ridge regression with the least leave-one-out error."""
    mean, offset = x.mean(axis=0), y.mean()
    centered, target = x - mean, y - offset
    # The dual problem is [N, N], N mostly far below L C; one factorization serves all strengths.
    values, vectors = np.linalg.eigh(centered @ centered.T)
    values = np.maximum(values, 0)
    best: tuple[float, np.ndarray] | None = None
    for strength in RIDGES:
        shrink = values / (values + strength)
        hat = (vectors * shrink) @ vectors.T + 1 / len(y)
        # A left-out row's residual is its own over 1 - leverage; 1 / N is the offset's leverage.
        left_out = (target - (hat - 1 / len(y)) @ target) / np.maximum(1 - np.diag(hat), 1e-6)
        dual = (vectors / (values + strength)) @ (vectors.T @ target)
        error = float(np.square(left_out).mean())
        if best is None or error < best[0]:
            best = (error, centered.T @ dual)
    assert best is not None
    weights = best[1]
    return weights, float(offset - mean @ weights)
