"""Static activation quantizers from calibration statistics.

Dimensions: S timesteps, K input channels, G groups, M tokens, R all tokens of all timesteps used.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qdit_jax.calibration import Stats, check_layer
from qdit_jax.quant import (
    ActQuant,
    ActSpec,
    group_extremes,
    map_groups,
    static_act_quant,
    static_act_quant_of_limits,
)


def act_quantizer(path: str, spec: ActSpec, stats: Stats | None) -> ActQuant:
    """Returns the activation quantizer of one layer; static ones take their range from `stats`.

    A range rule that needs more than extremes, such as `ranges.mse()`, computes its limits from the
    tokens that the statistics keep.

    Raises:
        ValueError: if the layer's statistics, or tokens that the range rule needs, are absent, or
            cannot be used: not finite, low above high, of another shape.
    """
    if spec.mode == "dynamic":
        return ActQuant(spec)
    if stats is None or path not in stats.low:
        raise ValueError(
            f"the recipe quantizes the input of {path} with mode='static', which needs calibration "
            "statistics of that layer; pass stats=calibrate(...), or use mode='dynamic'."
        )
    check_layer(path, stats)
    if spec.range_fn.from_extremes:
        parts = np.stack([stats.low[path], stats.high[path]], axis=1)  # [S, 2, K]
    elif path in stats.tokens:
        parts = stats.tokens[path]  # [S, M, K]
    else:
        raise ValueError(
            f"range rule {spec.range_fn.name!r} of the input of {path} needs tokens; calibrate with "
            "num_tokens (--tokens), or use a rule such as ranges.minmax."
        )
    rows = parts if spec.per_timestep else parts.reshape(1, -1, parts.shape[-1])
    limits = [group_limits(part, spec) for part in rows]
    low, high = (np.stack(side) for side in zip(*limits, strict=True))
    make = static_act_quant if spec.range_fn.from_extremes else static_act_quant_of_limits
    if not spec.per_timestep:
        return make(low[0], high[0], spec)
    quantizer = make(low, high, spec)
    timesteps = jnp.asarray(stats.timesteps, jnp.float32)
    return dataclasses.replace(quantizer, timesteps=timesteps)


def group_limits(x: Float[np.ndarray, "R K"], spec: ActSpec) -> tuple[np.ndarray, np.ndarray]:
    """Returns the interval that each group of channels has to cover, `[G]` each, without the shift."""
    if spec.range_fn.from_extremes:
        return group_extremes(x, spec.static_group_size)
    symmetric = spec.symmetric and not spec.unsigned

    def limits(
        members: Float[Array, "G S R"],
    ) -> tuple[Float[Array, "G 1"], Float[Array, "G 1"]]:  # [G, S, R]
        flat = members.reshape(members.shape[0], -1)
        low, high = spec.range_fn.limits(flat, spec.bits, symmetric, 1)
        return low[:, None], high[:, None]

    shifted = jnp.asarray(x, jnp.float32).T + spec.shift  # [K, R]
    low, high = map_groups(limits, shifted, spec.static_group_size)
    return np.asarray(low)[:, 0] - spec.shift, np.asarray(high)[:, 0] - spec.shift
