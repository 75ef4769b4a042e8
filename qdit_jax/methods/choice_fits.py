"""The transform and the branch of every choice of every layer, for a search over them.

They are what `ChooseTransforms` makes of a recipe that asks for one of the choices, on the same data.

Dimensions: K input channels, N output channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from flax import linen as nn
from jaxtyping import Float

from qdit_jax.calibration import LayerInputs
from qdit_jax.methods.bench import Bench
from qdit_jax.methods.data import CalibrationData
from qdit_jax.methods.input_transforms import Place, Transform, matrix_of, places
from qdit_jax.methods.named_transforms import named_branch, named_transform
from qdit_jax.methods.network_inputs import fitted_and_held_out
from qdit_jax.methods.report import Report
from qdit_jax.quant import LowRank
from qdit_jax.recipes import LayerSpec, layer_paths
from qdit_jax.types import Params


@dataclasses.dataclass(frozen=True, eq=False)
class FittedChoice:
    """The coordinates of a layer's input under one choice, and the branch beside its kernel."""

    transform: Transform
    branch: LowRank | None


def fitted_choices(
    params: Params,
    *,
    model: nn.Module,
    choices: Mapping[str, Sequence[LayerSpec]],
    data: CalibrationData,
    report: Report,
) -> Iterator[tuple[str, list[FittedChoice]]]:
    """Yields each layer with its fitted choices, in the order of the tree.

    Args:
        choices: of every layer that will be quantized, by path.
        data: has `items`.
    """
    every = places(params, [path for path in layer_paths(params) if path in choices])
    inputs = fitted_and_held_out(params, model, every, data, report)
    for place in every:
        for path in place.layers:
            own = dataclasses.replace(place, layers=(path,))
            yield path, fitted(params, own, choices[path], inputs[place.layers[0]], data.seed)


def fitted(
    params: Params,
    place: Place,
    choices: Sequence[LayerSpec],
    inputs: tuple[LayerInputs, LayerInputs],
    seed: int,
) -> list[FittedChoice]:
    """Returns the fitted choices of a place of one layer; equal transforms are one object."""
    path = place.layers[0]
    kernel = matrix_of(params, [path])
    transforms: dict[LayerSpec, tuple[Bench, Transform]] = {}
    plain = FittedChoice(Transform(), None)
    found = []
    for spec in choices:
        if spec.asks_for is None:
            found.append(plain)
            continue
        name = dataclasses.replace(spec, rank=None)
        if name not in transforms:
            bench = Bench.of(params, place, {path: spec}, inputs)
            transforms[name] = bench, named_transform(spec.transform or "none", bench, seed)
        bench, transform = transforms[name]
        found.append(FittedChoice(transform, branch_of(spec, kernel, bench, transform)))
    return found


def branch_of(
    spec: LayerSpec, kernel: Float[np.ndarray, "K N"], bench: Bench, transform: Transform
) -> LowRank | None:
    """Returns the branch of one choice; `kernel` is in the layer's own coordinates."""
    if not spec.rank:
        return None
    return named_branch(spec, transform.of_kernel(kernel), bench, transform)
