"""The part that methods share which chooses new coordinates for the input of every layer.

Each choice is made by the error of the layer's output on held-out inputs, with input and kernel both
rounded to nearest; to leave a layer as it is is one of the candidates.

Dimensions: M rows, H held-out rows, K input channels, N output channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from flax import linen as nn

from qdit_jax.calibration import LayerInputs
from qdit_jax.methods.bench import Bench
from qdit_jax.methods.branches import BranchFn, with_folds
from qdit_jax.methods.data import CalibrationData
from qdit_jax.methods.input_transforms import (
    Place,
    Transform,
    matrix_of,
    places,
    transformed,
    with_branch,
)
from qdit_jax.methods.named_transforms import named_branch, named_transform
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

    Where the recipe names a layer's transform or rank, the layer gets that instead.

    Attributes:
        scales: the candidate scales; None for no scaling.
        shifts: whether a channel's middle may be taken off as well.
        rotations: kinds that may follow, see `rotation_of`.
        branch: a low-rank branch for every layer, in the coordinates chosen, where the rule has one.
        leave: whether a layer may stay as it is; else it gets the best of the candidates.
    """

    scales: ScalesFn | None = None
    shifts: bool = False
    rotations: tuple[str, ...] = ()
    branch: BranchFn | None = None
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
        inputs = fitted_and_held_out(params, model, every, data, report)
        whole, chosen, branches = params, {}, {}
        for place in every:
            name = specs[place.layers[0]].transform
            # What is asked for by name is fitted to the kernels as they were, whatever the other
            # places have become: a search measures each layer's choices by themselves.
            source = params if name is None else whole
            bench = Bench.of(source, place, specs, inputs[place.layers[0]])
            found, before, after = self.transform_of(name, bench, place, data.seed)
            report.transform(place, found, before, after)
            for path in place.layers:
                if specs[path].rank is not None:
                    kernel = found.of_kernel(matrix_of(whole, [path]))
                    branches[path] = named_branch(specs[path], kernel, bench, found)
            if not found.is_identity:
                params = transformed(params, place, found)
            chosen[place] = found
        # Last of all, because a fold changes the kernels of what makes an input.
        for place, found in chosen.items():
            params = self.with_branches(
                params, whole, place, specs, inputs[place.layers[0]], found, branches, report
            )
        changed = sum(not found.is_identity for found in chosen.values())
        report.note(f"inputs have new coordinates at {changed} of {len(every)} places")
        return params, data

    def transform_of(
        self, name: str | None, bench: Bench, place: Place, seed: int
    ) -> tuple[Transform, float, float]:
        """Returns the transform of that name, or the best of the candidates, as `best` does."""
        if name is None:
            return self.best(bench, place, seed)
        found = named_transform(name, bench, seed)
        return found, bench.error(Transform()), bench.error(found)

    def with_branches(
        self,
        params: Params,
        whole: Params,
        place: Place,
        specs: Mapping[str, LayerSpec],
        inputs: tuple[LayerInputs, LayerInputs],
        chosen: Transform,
        named: Mapping[str, LowRank | None],
        report: Report,
    ) -> Params:
        """Returns `params`, transformed already, with a branch beside layers of a place.

        Args:
            whole: the parameters before any transform.
            named: the branches of layers whose rank is asked for, of their kernels in `whole`.
        """
        rows, held_out = (chosen.of_rows(x.rows) for x in inputs)
        for path in place.layers:
            kernel, spec = matrix_of(params, [path]), specs[path].plain
            if path in named:
                before = chosen.of_kernel(matrix_of(whole, [path]))
                branch = with_folds(named[path], before, kernel)
            else:
                branch = self.branch and self.branch(kernel, rows, held_out, spec)
            if branch is not None:
                params = with_branch(params, path, branch)
                report.branch(place)
        return params

    def best(self, bench: Bench, place: Place, seed: int) -> tuple[Transform, float, float]:
        """Returns the transform of a place with the least error, and the errors without and with it."""
        before = bench.error(Transform())
        found, after = (Transform(), before) if self.leave else (Transform(), float("inf"))
        for shift in (None, bench.middle)[: 1 + self.shifts]:
            if self.scales is None:
                continue
            scales = self.scales(bench.shifted(shift), bench.kernel)
            errors = bench.errors(scales, shift, None)
            candidate = Transform(scales[int(errors.argmin())], shift)
            share = 1.0 if place.is_free(candidate) or not self.leave else WORTH_IT
            if (least := float(errors.min())) < share * after:
                found, after = candidate, least
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
