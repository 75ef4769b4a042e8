"""What a method did, layer by layer, told while it runs and kept for the checkpoint's metadata."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from qdit_jax.methods.input_transforms import Place, Transform
from qdit_jax.ptq import RoundedLayer, precision_of, precision_warning
from qdit_jax.quant import QTensor
from qdit_jax.types import Progress, ProgressFn, untold

# What is fitted to inputs may be further from the kernel by choice.
FITTED_ALLOWANCE_DB = 15.0


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """How well one layer's kernel or label table was quantized.

    Attributes:
        path: of the layer.
        measured_on: what the errors are of: the `"weights"`, or the layer's `"outputs"` on
            calibration inputs (held-out ones where there are any).
        error_db: signal-to-error ratio of what the method made, in dB; higher is better.
        nearest_db: the same of rounding to nearest; None if the method does nothing else.
        fell_back: rounding to nearest was kept, because it is better on held-out inputs.
        warning: a few words if the weights are much further off than their bits explain.
    """

    path: str
    measured_on: Literal["weights", "outputs"]
    error_db: float
    nearest_db: float | None = None
    fell_back: bool = False
    warning: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns everything but the path, rounded to 0.01 dB."""
        data = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        del data["path"]
        return {k: round(v, 2) if isinstance(v, float) else v for k, v in data.items()}


@dataclasses.dataclass
class Report:
    """Collects what a method says, and passes it on to whoever listens.

    Attributes:
        progress_fn: told of each layer, of sentences that the user should read as `text`, of the
            batches finished, and of how many there are, each time that more are known.
        layers, notes: all of them so far.
        transforms: what became of each input, by the path of its first layer.
        num_batches: the last `total` that was told.
    """

    progress_fn: ProgressFn = untold
    layers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    transforms: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    num_batches: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    def layer(self, layer: LayerReport) -> None:
        self.layers[layer.path] = layer.to_json()
        self.progress_fn(Progress(layer=layer))

    def weights(self, path: str, kernel: Any, q: QTensor) -> None:
        """Reports a layer rounded without inputs."""
        found = precision_of(kernel, q)
        warning = precision_warning(found, q)
        self.layer(LayerReport(path, "weights", found.measured, warning=warning))

    def fitted(self, layer: RoundedLayer) -> None:
        """Reports a layer rounded on its inputs."""
        errors = decibel(layer.rounded), decibel(layer.nearest)
        found = precision_of(layer.kernel, layer.q)
        warning = precision_warning(found, layer.q, FITTED_ALLOWANCE_DB)
        self.layer(LayerReport(layer.path, "outputs", *errors, layer.fell_back, warning))

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)
        self.progress_fn(Progress(text=sentence))

    def transform(self, place: Place, chosen: Transform, before: float, after: float) -> None:
        """Reports the coordinates chosen for an input, with the output errors before and after."""
        kinds = ["scale"] if chosen.scale is not None else []
        kinds += ["shift"] if chosen.shift is not None else []
        self.transforms[place.layers[0]] = {
            "layers": list(place.layers),
            "kinds": kinds + ([chosen.rotation.kind] if chosen.rotation is not None else []),
            "folded": place.folded and place.is_free(chosen),
            "before_db": round(decibel(before), 2),
            "after_db": round(decibel(after), 2),
        }

    def branch(self, place: Place) -> None:
        """Reports that a layer of a place that was reported has a low-rank branch."""
        self.transforms[place.layers[0]]["kinds"].append("branch")

    def total(self, num_batches: int) -> None:
        """Says that `num_batches` more will be run."""
        self.num_batches += num_batches
        self.progress_fn(Progress(total=self.num_batches))


def decibel(error: float) -> float:
    """Returns a relative squared error as a signal-to-error ratio in dB."""
    return -10 * math.log10(max(error, 1e-30))
