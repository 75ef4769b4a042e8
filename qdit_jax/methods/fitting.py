"""The part that methods share which round on calibration inputs, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from flax.traverse_util import flatten_dict

from qdit_jax.methods.data import HOLDOUT, CalibrationData
from qdit_jax.methods.report import Report
from qdit_jax.models import TABLE, family_of, rows_per_sample
from qdit_jax.ptq import (
    StagesFn,
    as_matrix,
    by_block,
    by_layer,
    num_batches,
    num_passes,
    plan,
    round_params,
    weight_name,
)
from qdit_jax.quant import QTensor
from qdit_jax.recipes import LayerSpec, Recipe

STAGES: dict[str, StagesFn] = {"block": by_block, "layer": by_layer}
# A layer is fitted well to this many inputs per channel; with fewer, gains may be illusory.
ROWS_PER_CHANNEL = 4


def fit_rounding(
    params: Any,
    *,
    model: nn.Module,
    recipe: Recipe,
    data: CalibrationData,
    report: Report,
    round_fn: Callable[..., QTensor],
    stages_fn: StagesFn | None = None,
    holdout: float | int = HOLDOUT,
    note_fn: Callable[[Mapping[str, LayerSpec]], str | None] = lambda specs: None,
) -> Any:
    """Returns `params` with every kernel of `recipe` rounded by `round_fn` on the items of `data`.

    Args:
        round_fn: `(kernel [K, N], hessian [K, K], spec) -> QTensor`.
        stages_fn: the method's own stages; None lets `data.stages` choose.
        holdout: the method's own share, where `data.holdout` is None.
        note_fn: what the method notes on the specs by path, if anything.

    Raises:
        ValueError: as `round_params`.
    """
    items = data.items
    assert items is not None
    share = holdout if data.holdout is None else data.holdout
    stages_fn = chosen_stages(data.stages, stages_fn)
    rows = rows_per_sample(model)
    specs = recipe.resolve(params)
    if (note := note_fn(specs)) is not None:
        report.note(note)
    chosen = set(specs)
    num_stages = sum(bool(chosen & set(stage)) for stage in stages_fn(list(rows), family_of(model)))
    num_stages *= num_passes(params, recipe)
    report.total(num_batches(items, share, data.batch_size, num_stages, data.timestep_weights))
    note_few_rows(params, recipe, rows, len(items.x) * (1 - share), report)
    rounded = round_params(
        model,
        params,
        items,
        recipe=recipe,
        round_fn=round_fn,
        stages_fn=stages_fn,
        holdout=share,
        stats=data.stats,
        batch_size=data.batch_size,
        timestep_weights=data.timestep_weights,
        on_layer=report.fitted,
        progress_fn=report.progress_fn,
    )
    report_tables(params, rounded, chosen, report)
    note_fallen(share, report)
    return rounded


def refuse_levels(specs: Mapping[str, LayerSpec], data: CalibrationData) -> None:
    """Raises `ValueError` if a layer has two levels of scales, which the Q-DiT release has not."""
    for path, spec in specs.items():
        if spec.weight is not None and spec.weight.has_levels:
            raise ValueError(
                f"{path} has two levels of scales, which the Q-DiT release has not; use method='gptq' "
                "(--method gptq), or a recipe such as w4a8."
            )


def chosen_stages(name: str | None, own: StagesFn | None) -> StagesFn:
    """Returns the method's own stages, or those that `name` asks for."""
    return STAGES[name or "block"] if own is None else own


def note_few_rows(
    params: Any, recipe: Recipe, rows: dict[str, int], num_items: float | int, report: Report
) -> None:
    """Notes if a layer that sees tokens has too few inputs per channel to be fitted to."""
    planned = [
        layer
        for layer in plan(params, recipe)
        if layer.spec.weight is not None and rows.get(layer.path, 0) > 1
    ]
    widest = max(planned, key=lambda layer: layer.shape[0] / rows[layer.path], default=None)
    if widest is None:
        return
    seen = int(num_items * rows[widest.path])
    if seen < ROWS_PER_CHANNEL * widest.shape[0]:
        report.note(
            f"note: {seen:,} inputs for the {widest.shape[0]:,} channels of {widest.path}; gains on "
            f"inputs not seen need {ROWS_PER_CHANNEL} a channel or more: raise --num-samples "
            "(num_samples)"
        )


def report_tables(params: Any, rounded: Any, paths: set[str], report: Report) -> None:
    """Reports the label tables, which have no inputs and are rounded to nearest."""
    before, after = flatten_dict(params, sep="/"), flatten_dict(rounded, sep="/")
    for path in sorted(paths):
        name = weight_name(before, path)
        if name is not None and name.endswith(TABLE):
            report.weights(path, as_matrix(name, before[name]), after[name])


def note_fallen(share: float | int, report: Report) -> None:
    """Notes what the errors were measured on, and how many layers kept rounding to nearest."""
    inputs = "held-out inputs" if share else "the inputs themselves (nothing was held out)"
    fallen = sum(layer["fell_back"] for layer in report.layers.values())
    report.note(
        f"output errors are measured on {inputs}; {fallen} layers kept rounding to nearest, which "
        "was better there"
    )
