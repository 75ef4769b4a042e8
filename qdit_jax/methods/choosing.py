"""The part that methods share which chooses new coordinates for the input of every layer.

Each choice is made by the error of the layer's output on held-out inputs, with input and kernel both
rounded to nearest; to leave a layer as it is is one of the candidates.

Dimensions: M rows, K input channels, N output channels, S of them, C candidates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jaxtyping import Float

from qdit_jax.calibration import Items, LayerInputs, layer_inputs
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
from qdit_jax.methods.report import Report
from qdit_jax.methods.scales import ScalesFn
from qdit_jax.methods.scoring import output_errors
from qdit_jax.models import rows_per_sample
from qdit_jax.ptq import held_out_items
from qdit_jax.quant import LowRank, Rotation, regular_size, whole_size
from qdit_jax.recipes import LayerSpec, Recipe
from qdit_jax.types import Params

# A transform at run time has to pay for itself: it must lower the squared error to this share.
WORTH_IT = 0.95
HOLDOUT = 0.25
NUM_ROWS = 512  # of a layer's inputs, on which candidates are compared
# Of a kernel as well: all its columns, or as many as hold this many values, but not fewer than 256.
MAX_VALUES, LEAST_COLUMNS = 2**18, 256


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
            report.transforms[place.layers[0]]["kinds"].append("branch")
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


@dataclasses.dataclass(frozen=True)
class Bench:
    """One place's layers with the inputs on which transforms are compared.

    Attributes:
        inputs: extremes of the inputs that candidates are made from.
        rows: `[M, K]`, the held-out inputs on which errors are measured.
        kernels: `[K, N]`, by spec.
        scored: some of their columns, on which errors are measured.
    """

    inputs: LayerInputs
    rows: Float[np.ndarray, "M K"]
    kernels: Mapping[LayerSpec, Float[np.ndarray, "K N"]]
    scored: Mapping[LayerSpec, Float[np.ndarray, "K S"]]

    @classmethod
    def of(
        cls,
        params: Params,
        place: Place,
        specs: Mapping[str, LayerSpec],
        inputs: tuple[LayerInputs, LayerInputs],
    ) -> Bench:
        """Returns the bench of a place; `inputs` are those fitted to and those held out."""
        by_spec: dict[LayerSpec, list[str]] = {}
        for path in place.layers:
            if path in specs:
                by_spec.setdefault(specs[path], []).append(path)
        kernels = {spec: matrix_of(params, paths) for spec, paths in by_spec.items()}
        scored = {spec: some_columns(kernel, spec) for spec, kernel in kernels.items()}
        return cls(inputs[0], inputs[1].rows, kernels, scored)

    @property
    def kernel(self) -> Float[np.ndarray, "K N"]:
        """All kernels side by side."""
        return np.concatenate(list(self.kernels.values()), axis=1)

    @property
    def middle(self) -> Float[np.ndarray, " K"]:
        """The middle of each channel's range."""
        return (self.inputs.low + self.inputs.high) / 2

    def shifted(self, shift: Float[np.ndarray, " K"] | None) -> LayerInputs:
        """Returns the inputs' extremes after a shift."""
        if shift is None:
            return self.inputs
        ends = {"low": self.inputs.low - shift, "high": self.inputs.high - shift}
        return dataclasses.replace(self.inputs, **ends)

    def error(self, transform: Transform) -> float:
        """Returns the relative squared error of the outputs in given coordinates."""
        width = self.rows.shape[1]
        scale = np.ones(width, np.float32) if transform.scale is None else transform.scale
        return float(self.errors(scale[None], transform.shift, transform.rotation)[0])

    def errors(
        self,
        scales: Float[np.ndarray, "C K"],
        shift: Float[np.ndarray, " K"] | None,
        rotation: Rotation | None,
    ) -> Float[np.ndarray, " C"]:
        """Returns the relative squared error of the outputs for every candidate scale."""
        shift = np.zeros(self.rows.shape[1], np.float32) if shift is None else shift
        lost = np.zeros(len(scales))
        power = 0.0
        for spec, kernel in self.scored.items():
            power += float(np.square(self.rows @ kernel).sum())
            found = output_errors(self.rows, kernel, scales, shift, rotation, spec=spec)
            lost += np.asarray(found)
        return lost / max(power, 1e-30)

    def rotation(self, kind: str, scaled: Transform, seed: int) -> Rotation | None:
        """Returns the rotation of that kind for the scaled input; None if its blocks have size 1."""
        width = self.rows.shape[1]
        if kind != "pca":
            return rotation_of(kind, width, seed)
        size = regular_size(width)
        rows = scaled.of_rows(self.inputs.rows)
        blocks = rows.reshape(len(rows), -1, size)
        covariance = np.einsum("mbi,mbj->bij", blocks, blocks)
        matrix = np.linalg.eigh(covariance.astype(np.float64))[1].astype(np.float32)
        return Rotation("dense", size, matrix=jnp.asarray(matrix)) if size > 1 else None


def some_columns(kernel: Float[np.ndarray, "K N"], spec: LayerSpec) -> Float[np.ndarray, "K S"]:
    """Returns evenly spread columns of a kernel, `MAX_VALUES` values at most.

    Columns are rounded by themselves (or with the neighbors that share their scale), so that the
    error on some of them stands for that on all.
    """
    shared = 1 if spec.weight is None else spec.weight.channel_group
    blocks = kernel.shape[1] // shared
    wanted = max(LEAST_COLUMNS, MAX_VALUES // len(kernel)) // shared
    chosen = np.linspace(0, blocks - 1, min(blocks, max(1, wanted))).round()
    return kernel[:, (chosen[:, None] * shared + np.arange(shared)).astype(int).reshape(-1)]


def rotation_of(kind: str, num_channels: int, seed: int = 0) -> Rotation | None:
    """Returns a rotation that looks at no data; None where its blocks would have size 1.

    Args:
        kind: `"regular"`, a regular Hadamard matrix of 256, 64, 16 or 4 channels per block, or
            `"hadamard"`, one of all channels (of the largest block that there is one for) with
            random signs.
        seed: of the signs.
    """
    if kind == "regular":
        size = regular_size(num_channels)
        return Rotation("regular", size) if size > 1 else None
    size = whole_size(num_channels)
    signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), num_channels)
    return Rotation("hadamard", size, jnp.asarray(signs)) if size > 1 else None


@dataclasses.dataclass(frozen=True)
class Rotate:
    """Rotates the input of every layer that a recipe quantizes; looks at no data.

    Attributes:
        kind: see `rotation_of`.
    """

    kind: str

    def __call__(
        self,
        params: Params,
        *,
        model: nn.Module,
        recipe: Recipe,
        data: CalibrationData,
        report: Report,
    ) -> tuple[Params, CalibrationData]:
        """Returns `params` of the same function with rotated inputs, and `data`."""
        for path in linear_specs(params, model, recipe):
            width = len(matrix_of(params, [path]))
            rotation = rotation_of(self.kind, width, data.seed)
            params = transformed(params, Place((path,), folded=False), Transform(rotation=rotation))
        return params, data


def linear_specs(params: Params, model: nn.Module, recipe: Recipe) -> dict[str, LayerSpec]:
    """Returns the specs of the linear layers that a recipe names; not of tables and operands.

    Raises:
        ValueError: if one has a kernel and is no `models.Linear`, which alone knows its leaves.
    """
    flat = flatten_dict(params, sep="/")
    linear = rows_per_sample(model)
    found = {p: s for p, s in recipe.resolve(params).items() if f"{p}/kernel" in flat}
    if other := sorted(set(found) - set(linear)):
        raise ValueError(
            f"{other[0]} is no linear layer of this network's forward pass, so its input cannot be "
            "given other coordinates; leave it out of the recipe (--layers)."
        )
    return found


def fitted_and_held_out(
    params: Params, model: nn.Module, paths: Sequence[str], data: CalibrationData, report: Report
) -> dict[str, tuple[LayerInputs, LayerInputs]]:
    """Returns the inputs of layers on the items to fit to, and on those held out (all, if none is).

    They are the full-precision network's.
    """
    items = data.items
    assert isinstance(items, Items)
    held_out = held_out_items(items, HOLDOUT if data.holdout is None else data.holdout)
    sides = [np.flatnonzero(~held_out), np.flatnonzero(held_out)]
    sides = [side for side in sides if len(side)]
    report.total(sum(-(-len(side) // min(data.batch_size, len(side))) for side in sides))
    found = [
        layer_inputs(
            model,
            params,
            items,
            side,
            paths,
            num_rows=NUM_ROWS,
            batch_size=data.batch_size,
            progress_fn=report.progress_fn,
        )
        for side in sides
    ]
    return {path: (found[0][path], found[-1][path]) for path in paths}
