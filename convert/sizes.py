"""What the shapes of a file tell of a transformer, in any layout."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qdit_convert.plan import most_common
from qdit_convert.tensors import StoredTensor
from qdit_jax.errors import UserError


def voted_width(tensors: Mapping[str, StoredTensor], votes: Mapping[str, tuple[int, int]]) -> int:
    """Returns the width that most tensors have; a single wrong one is outvoted, to be named later.

    Args:
        votes: tensor -> (the axis that is as long as the width, the number of axes it must have).
    """
    found = {key: tensors[key].shape for key in votes if key in tensors}
    return most_common(
        [found[key][axis] for key, (axis, rank) in votes.items() if len(found.get(key, ())) == rank]
    )


def mlp_ratio(mlp_width: int, width: int) -> float:
    """Returns the ratio that gives `mlp_width` when multiplied with `width` and truncated."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)


def check_channels(in_channels: int, out_channels: int) -> None:
    """Raises `UserError` unless the output is as the input, or twice that (a variance)."""
    if out_channels not in (in_channels, 2 * in_channels):
        raise UserError(
            f"the network has {out_channels} output channels for {in_channels} input channels; "
            f"{in_channels} or {2 * in_channels} are known."
        )


def check_heads(width: int, heads: int) -> None:
    """Raises `UserError` unless heads and the quarters of sinusoidal positions divide the width."""
    if width % heads or width % 4:
        raise UserError(f"the width {width} must be divisible by num_heads={heads} and by 4.")
