"""The transforms and branches that a recipe asks for by name and rank, and what they need of a layer.

Dimensions: K input channels, N output channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qdit_jax.methods.bench import Bench
from qdit_jax.methods.branches import weight_branch
from qdit_jax.methods.input_transforms import Place, Transform
from qdit_jax.methods.scales import ALPHAS, smoothing
from qdit_jax.quant import LowRank, Rotation
from qdit_jax.recipes import TRANSFORMS, LayerSpec, rotated_block


def named_transform(name: str, bench: Bench, seed: int) -> Transform:
    """Returns the transform of that name for the input of a bench.

    `smooth` is the candidate scale with the least output error on held-out inputs, in the
    coordinates of a rotation that looks at no data, if there is one.
    """
    parts = TRANSFORMS[name]
    shift = bench.middle if "shift" in parts else None
    size = None if "pca" in parts else rotated_block(name, bench.rows.shape[1])
    fixed = None if size is None else Rotation("regular", size)
    scale = None
    if "smooth" in parts:
        scales = smoothing(ALPHAS)(bench.shifted(shift), bench.kernel)
        scale = scales[int(bench.errors(scales, shift, fixed).argmin())]
    plain = Transform(scale, shift)
    turned = bench.rotation("pca", plain, seed) if "pca" in parts else fixed
    return dataclasses.replace(plain, rotation=turned)


def named_branch(
    spec: LayerSpec, kernel: np.ndarray, bench: Bench, transform: Transform
) -> LowRank | None:
    """Returns the branch of the rank that a spec asks for; None for rank 0.

    Args:
        kernel: `[K, N]`, in the coordinates of `transform`.
    """
    if not spec.rank:
        return None
    rank: int = spec.rank
    rows, held_out = (transform.of_rows(x) for x in (bench.inputs.rows, bench.rows))
    return weight_branch(lambda shape: rank)(kernel, rows, held_out, spec.plain)


def missing_for(spec: LayerSpec, shape: tuple[int, int], has_bias: bool) -> str | None:
    """Returns in a few words why a layer cannot have the transform and rank of a spec, or None."""
    if "shift" in TRANSFORMS[spec.transform or "none"] and not has_bias:
        return "it has no bias, which a shift of its input needs"
    size = rotated_block(spec.transform, shape[0])
    if size is not None and (size == 1 or shape[0] % size):
        return f"{max(size, 4)} does not divide its {shape[0]} input channels"
    if (spec.rank or 0) > min(shape):
        return f"its kernel is {shape[0]}x{shape[1]}"
    return None


def check_named(specs: Mapping[str, LayerSpec], flat: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a layer cannot have the transform or the rank that its spec asks for.

    Args:
        flat: the parameters, paths joined by `/`.
    """
    for path, spec in specs.items():
        kernel = flat.get(f"{path}/kernel")
        if spec.asks_for is None or kernel is None:
            continue
        shape = (int(np.prod(kernel.shape[:-1])), int(kernel.shape[-1]))
        if (why := missing_for(spec, shape, f"{path}/bias" in flat)) is not None:
            raise ValueError(
                f"the recipe asks for transform={spec.transform!r}, rank={spec.rank} of {path}, "
                f"but {why}; ask for another."
            )


def check_shared(places: Sequence[Place], specs: Mapping[str, LayerSpec]) -> None:
    """Raises `ValueError` if layers that read one input ask for different transforms of it."""
    for place in places:
        first = place.layers[0]
        for path in place.layers[1:]:
            if specs[path].transform != specs[first].transform:
                raise ValueError(
                    f"{first} and {path} read one input, but the recipe asks for "
                    f"transform={specs[first].transform!r} and {specs[path].transform!r}; ask for "
                    "the same."
                )
