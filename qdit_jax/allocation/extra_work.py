"""What a layer's input transform and low-rank branch cost at run time, beside its quantized product.

Dimensions: K input channels, N output channels, S channels of a rotated block, R rank.
"""

from __future__ import annotations

import dataclasses

from qdit_jax.allocation.space import SearchLayer
from qdit_jax.recipes import TRANSFORMS, LayerSpec, rotated_block

FOLDABLE = ("smooth", "shift")  # parts of a transform that a producer of the input can absorb


@dataclasses.dataclass(frozen=True)
class ExtraWork:
    """Counts per row of a layer's input, and bytes.

    Attributes:
        mapped: channels that are scaled and shifted; 0 where that is folded.
        turned: multiply-adds of the rotation as it is computed: `K S` of a dense one, and of a
            regular Hadamard one `4 K` for each of the log4(S) factors.
        block: S, 1 without a rotation.
        branch: multiply-adds of the branch, `R (K + N)`.
        num_bytes: of the map and of a dense rotation in 32 bits, and of the branch in 16.
    """

    mapped: int
    turned: int
    block: int
    branch: int
    num_bytes: int


def run_time_spec(layer: SearchLayer, spec: LayerSpec) -> LayerSpec:
    """Returns a spec with only what a layer computes of its transform and rank at run time.

    Parts that are folded are left out, and what asks for nothing ("none", rank 0) is None. A shift that the
    fold does not take needs a map, which has a scale in any case.
    """
    parts = TRANSFORMS[spec.transform or "none"]
    is_free = layer.folded and not (layer.scale_only and "shift" in parts)
    left = [part for part in parts if not (is_free and part in FOLDABLE)]
    return dataclasses.replace(spec, transform="+".join(left) or None, rank=spec.rank or None)


def extra_work(layer: SearchLayer, spec: LayerSpec) -> ExtraWork:
    """Returns what the transform and the rank that a spec asks for cost a layer.

    What is left to the method (None) counts nothing.
    """
    channels, width = layer.shape
    spec = run_time_spec(layer, spec)
    parts = TRANSFORMS[spec.transform or "none"]
    mapped = channels if set(FOLDABLE) & set(parts) else 0
    block = rotated_block(spec.transform, channels) or 1
    is_dense = "pca" in parts
    factors = (block.bit_length() - 1) // 2
    branch = (spec.rank or 0) * (channels + width)
    # A map has a scale in any case, a shift where one is asked for.
    num_vectors = (1 + ("shift" in parts)) if mapped else 0
    num_bytes = 4 * channels * (num_vectors + is_dense * block) + 2 * branch
    turned = channels * (block if is_dense else 4 * factors)
    return ExtraWork(mapped, turned, block, branch, num_bytes)
