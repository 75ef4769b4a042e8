"""The part that methods share which learn rounding over whole blocks."""

from __future__ import annotations

from collections.abc import Mapping

from flax import linen as nn

from qdit_jax.methods.data import HOLDOUT, CalibrationData
from qdit_jax.methods.fitting import note_fallen, note_few_rows, report_tables
from qdit_jax.methods.report import Report
from qdit_jax.models import rows_per_sample
from qdit_jax.ptq import (
    ReconstructionSettings,
    num_reconstruction_batches,
    reconstruct_params,
    units_of,
)
from qdit_jax.recipes import LayerSpec, Recipe
from qdit_jax.types import Params


def check_stages(specs: Mapping[str, LayerSpec], data: CalibrationData) -> None:
    """Raises `ValueError` if stages are asked for: a block is always reconstructed as a whole."""
    if data.stages is not None:
        raise ValueError(
            f"stages={data.stages!r}: block reconstruction has stages of its own, one per block; "
            "leave stages (--stages) out, or use another method such as adaround."
        )


def reconstruct_blocks(
    params: Params,
    *,
    model: nn.Module,
    recipe: Recipe,
    data: CalibrationData,
    report: Report,
    settings: ReconstructionSettings | None = None,
) -> Params:
    """Returns `params` with the kernels of `recipe` rounded block by block on the items of `data`.

    Each layer is reported with the errors of its block's output. `settings` None is the default.

    Raises:
        ValueError: as `ptq.reconstruct_params`.
        UserError: if `data.unfinished` was written with other settings.
    """
    items = data.items
    assert items is not None
    share = HOLDOUT if data.holdout is None else data.holdout
    num_units = len(units_of(model, params, recipe))
    report.total(num_reconstruction_batches(items, data.batch_size, num_units))
    num_items = len(items.x) * (1 - share)
    note_few_rows(params, recipe, rows_per_sample(model), num_items, report)
    rounded = reconstruct_params(
        model,
        params,
        items,
        recipe=recipe,
        settings=settings,
        holdout=share,
        stats=data.stats,
        batch_size=data.batch_size,
        unfinished=data.unfinished,
        on_layer=report.fitted,
        progress_fn=report.progress_fn,
    )
    report_tables(params, rounded, set(recipe.resolve(params)), report)
    report.note("a layer's output error is that of the block which it lies in")
    note_fallen(share, report)
    return rounded
