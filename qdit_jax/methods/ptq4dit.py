"""PTQ4DiT: salient channels are balanced between input and kernel, weighted over time."""

from __future__ import annotations

import numpy as np
from flax import linen as nn
from jaxtyping import Float
from scipy.stats import spearmanr

from qdit_jax.calibration import item_statistics
from qdit_jax.methods.data import CalibrationData, spread_items
from qdit_jax.methods.input_transforms import Transform, matrix_of, places, transformed
from qdit_jax.methods.method import Method
from qdit_jax.methods.network_inputs import linear_specs
from qdit_jax.methods.reconstruction import check_stages, reconstruct_blocks
from qdit_jax.methods.report import Report
from qdit_jax.methods.scales import balanced
from qdit_jax.methods.static_ranges import PER_TENSOR, PER_TENSOR_HARDWARE, static_ranges
from qdit_jax.recipes import Recipe
from qdit_jax.types import Params


def balance(
    params: Params, *, model: nn.Module, recipe: Recipe, data: CalibrationData, report: Report
) -> tuple[Params, CalibrationData]:
    """Returns `params` whose foldable inputs and their kernels have equal salience, and `data`."""
    items = data.items
    assert items is not None
    paths = linear_specs(params, model, recipe)
    stats = item_statistics(
        model, params, items, per_timestep=True, num_tokens=0, batch_size=data.batch_size
    )
    folded = [place for place in places(params, paths) if place.folded]
    for place in folded:
        weights = np.abs(matrix_of(params, place.layers)).max(axis=1)
        largest = np.max([stats.absmax(path) for path in place.layers], axis=0)
        salience = weighted_salience(largest, weights)
        scale = balanced(salience, weights, 0.5, 0.5)
        params = transformed(params, place, Transform(scale))
    report.note(f"salience is balanced at {len(folded)} places")
    return params, data


def weighted_salience(
    activations: Float[np.ndarray, "S K"], weights: Float[np.ndarray, " K"]
) -> Float[np.ndarray, " K"]:
    """Returns the channels' salience, averaged over S timesteps.

    A timestep counts the more, the less its salient channels are those of the weights: by the
    softmax of minus Spearman's rank correlation.
    """
    rho = np.array([correlation(row, weights) for row in activations])
    share = np.exp(-rho) / np.exp(-rho).sum()
    return share @ activations


def correlation(a: Float[np.ndarray, " K"], b: Float[np.ndarray, " K"]) -> float:
    """Returns Spearman's rank correlation; 0 where one side is constant and has no order."""
    return 0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else float(spearmanr(a, b).statistic)


METHOD = Method(
    name="ptq4dit",
    paper="PTQ4DiT: Post-training Quantization for Diffusion Transformers, arXiv:2405.16005",
    idea="Divides each foldable input by the square root of the ratio of its salience, weighted over "
    "timesteps, to that of its weights; one static range per input, one scale per output channel. "
    "Rounding and the inputs' step sizes are learned block by block.",
    runtime_cost="None: the scales are folded, static ranges are constants.",
    hardware=PER_TENSOR_HARDWARE.format(ranges="one static range per input"),
    needs={"items": spread_items},
    check=check_stages,
    prepare=(balance, static_ranges),
    apply=reconstruct_blocks,
    settings=PER_TENSOR,
)
