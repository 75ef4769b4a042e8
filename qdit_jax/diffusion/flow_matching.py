"""Flow matching as diffusers samples it: noise levels from 1 to 0, shifted toward the noise.

`x = (1 - sigma) data + sigma noise`; time as `samplers.flow` counts it is `1 - sigma`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from qdit_jax.diffusion.samplers import Sampler, flow


def shifted(sigmas: Float[np.ndarray, " S"], shift: float | int) -> Float[np.ndarray, " S"]:
    """Returns noise levels moved toward 1 for `shift > 1` (Esser et al., arXiv:2403.03206)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def flow_match_sigmas(
    steps: int,
    *,
    shift: float | int = 1.0,
    num_train_timesteps: int = 1000,
    shift_terminal: float | int | None = None,
) -> Float[np.ndarray, " S1"]:
    """Returns the noise levels at the ends of the steps, descending from 1 to 0.

    As in diffusers' `FlowMatchEulerDiscreteScheduler`: the levels are evenly spaced over the
    shifted range of training, then shifted again. `shift_terminal` is the last one before 0.

    Raises:
        ValueError: if `steps` is not from 1 to `num_train_timesteps`.
    """
    if not 1 <= steps <= num_train_timesteps:
        raise ValueError(f"steps={steps} is not supported; use 1 to {num_train_timesteps}.")
    smallest = shifted(np.array([1 / num_train_timesteps]), shift)[0]
    sigmas = shifted(np.linspace(1.0, smallest, steps), shift)
    if shift_terminal is not None:
        if steps == 1:
            raise ValueError("steps=1 has no last noise level to set to shift_terminal; use more.")
        sigmas = 1 - (1 - sigmas) * (1 - shift_terminal) / (1 - sigmas[-1])
    return np.append(sigmas, 0.0)


def flow_match(
    steps: int = 50,
    *,
    shift: float | int = 1.0,
    num_train_timesteps: int = 1000,
    shift_terminal: float | int | None = None,
    make_fn: Callable[..., Sampler] = flow,
) -> Sampler:
    """Returns the sampler of a velocity model over `flow_match_sigmas`, by default Euler's rule.

    `make_fn(steps, edges=...)` returns it, as `SamplerRow.make_fn` of a flow does.

    Raises:
        ValueError: as `flow_match_sigmas`.
    """
    sigmas = flow_match_sigmas(
        steps,
        shift=shift,
        num_train_timesteps=num_train_timesteps,
        shift_terminal=shift_terminal,
    )
    return make_fn(steps, edges=1 - sigmas)
