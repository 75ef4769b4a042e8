"""One input's layers, and how much of their output is lost in candidate coordinates.

Dimensions: M rows, K input channels, N output channels, S of them, C candidates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qdit_jax.calibration import LayerInputs
from qdit_jax.methods.input_transforms import Place, Transform, matrix_of
from qdit_jax.methods.rotating import rotation_of
from qdit_jax.methods.scoring import output_errors
from qdit_jax.quant import Rotation, regular_size
from qdit_jax.recipes import LayerSpec
from qdit_jax.types import Params

# Of a kernel: all its columns, or as many as hold this many values, but not fewer than 256.
MAX_VALUES, LEAST_COLUMNS = 2**18, 256


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
                by_spec.setdefault(specs[path].plain, []).append(path)
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
