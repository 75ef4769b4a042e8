"""The part that methods share which chooses new coordinates for the input of every layer.

Each choice is made by the error of the layer's output on held-out inputs, with input and kernel both
rounded to nearest; to leave a layer as it is is one of the candidates.

Dimensions: M rows, K input channels, N output channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from flax import linen as nn
from jaxtyping import Float

from qdit_jax.methods.bench import Bench
from qdit_jax.methods.branches import BranchFn, branch_error
from qdit_jax.methods.data import CalibrationData
from qdit_jax.methods.input_transforms import (
    Place,
    Transform,
    matrix_of,
    places,
    transformed,
    with_branch,
)
from qdit_jax.methods.network_inputs import fitted_and_held_out, linear_specs
from qdit_jax.methods.report import Report
from qdit_jax.methods.scales import ScalesFn
from qdit_jax.quant import LowRank
from qdit_jax.recipes import LayerSpec, Recipe
from qdit_jax.types import Params

# A transform at run time has to pay for itself: it must lower the squared error to this share.
WORTH_IT = 0.95


@dataclasses.dataclass(frozen=True)
class ChooseTransforms:
    """Gives every layer that a recipe quantizes the input coordinates in which it loses least.

    Attributes:
        scales: the candidate scales; None for no scaling.
        shifts: whether a channel's middle may be taken off as well.
        rotations: kinds that may follow, see `rotation_of`.
        branch: a low-rank branch for every layer, in the coordinates chosen.
        branch_share: a branch stays where it lowers the squared error to this share; None: always.
        leave: whether a layer may stay as it is; else it gets the best of the candidates.
    """

    scales: ScalesFn | None = None
    shifts: bool = False
    rotations: tuple[str, ...] = ()
    branch: BranchFn | None = None
    branch_share: float | None = None
    leave: bool = True

    def __call__(
        self,
        params: Params,
        *,
        model: nn.Module,
        recipe: Recipe,
        data: CalibrationData,
        report: Report,
    ) -> tuple[Params, CalibrationData]:
        """Returns `params` of the same function in the coordinates chosen, and `data`."""
        specs = linear_specs(params, model, recipe)
        every = places(params, specs)
        inputs = fitted_and_held_out(params, model, [p.layers[0] for p in every], data, report)
        changed = 0
        for place in every:
            bench = Bench.of(params, place, specs, inputs[place.layers[0]])
            chosen, before, after = self.best(bench, place.folded, data.seed)
            report.transform(place, chosen, before, after)
            if not chosen.is_identity:
                params, changed = transformed(params, place, chosen), changed + 1
            if self.branch is not None:
                params = self.with_branches(params, place, specs, bench, chosen, report)
        report.note(f"inputs have new coordinates at {changed} of {len(every)} places")
        return params, data

    def with_branches(
        self,
        params: Params,
        place: Place,
        specs: Mapping[str, LayerSpec],
        bench: Bench,
        chosen: Transform,
        report: Report,
    ) -> Params:
        """Returns `params`, transformed already, with a branch beside each layer of a place."""
        assert self.branch is not None
        rows, held_out = (chosen.of_rows(x) for x in (bench.inputs.rows, bench.rows))
        for path in place.layers:
            kernel, spec = matrix_of(params, [path]), specs[path]
            branch = self.branch(kernel, rows, held_out, spec)
            if branch is None or not self.is_worth(branch, kernel, held_out, spec):
                continue
            params = with_branch(params, path, branch)
            report.branch(place)
        return params

    def is_worth(
        self,
        branch: LowRank,
        kernel: Float[np.ndarray, "K N"],
        rows: Float[np.ndarray, "M K"],
        spec: LayerSpec,
    ) -> bool:
        """Returns whether a branch lowers the output error on `rows` enough for what it costs."""
        if self.branch_share is None:
            return True
        lost = branch_error(kernel, branch, rows, spec)
        return lost <= self.branch_share * branch_error(kernel, None, rows, spec)

    def best(self, bench: Bench, is_free: bool, seed: int) -> tuple[Transform, float, float]:
        """Returns the transform with the least error, and the errors without and with it.

        `is_free` says that scale and shift cost nothing at run time.
        """
        before = bench.error(Transform())
        found, after = (Transform(), before) if self.leave else (Transform(), float("inf"))
        share = 1.0 if is_free or not self.leave else WORTH_IT
        for shift in (None, bench.middle)[: 1 + self.shifts]:
            if self.scales is None:
                continue
            scales = self.scales(bench.shifted(shift), bench.kernel)
            errors = bench.errors(scales, shift, None)
            if (least := float(errors.min())) < share * after:
                found, after = Transform(scales[int(errors.argmin())], shift), least
        for kind in self.rotations:
            for scaled in (found, Transform()):
                plain = dataclasses.replace(scaled, rotation=None)
                turned = dataclasses.replace(plain, rotation=bench.rotation(kind, plain, seed))
                if (
                    turned.rotation is not None
                    and (error := bench.error(turned)) < WORTH_IT * after
                ):
                    found, after = turned, error
        return found, before, after
