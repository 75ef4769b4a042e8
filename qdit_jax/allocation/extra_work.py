"""What a layer's input transform and low-rank branch cost at run time, beside its quantized product.

Dimensions: K input channels, N output channels, S channels of a rotated block, R rank.
"""

from __future__ import annotations

import dataclasses

from qdit_jax.allocation.space import SearchLayer
from qdit_jax.recipes import TRANSFORMS, LayerSpec, rotated_block


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


def extra_work(layer: SearchLayer, spec: LayerSpec) -> ExtraWork:
    """Returns what the transform and the rank that a spec asks for cost a layer.

    What is left to the method (None) counts nothing.
    """
    channels, width = layer.shape
    parts = TRANSFORMS[spec.transform or "none"]
    vectors = [part for part in parts if part in ("smooth", "shift")]
    mapped = channels if vectors and not layer.folded else 0
    block = rotated_block(spec.transform, channels) or 1
    is_dense = "pca" in parts
    factors = (block.bit_length() - 1) // 2
    branch = (spec.rank or 0) * (channels + width)
    # A map has a scale in any case, a shift where one is asked for.
    num_vectors = (1 + ("shift" in parts)) if mapped else 0
    num_bytes = 4 * channels * (num_vectors + is_dense * block) + 2 * branch
    turned = channels * (block if is_dense else 4 * factors)
    return ExtraWork(mapped, turned, block, branch, num_bytes)
