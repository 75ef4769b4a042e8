"""Flow matching by noise levels from 1 to 0, shifted toward the noise: SD3, FLUX, Open-Sora, Wan.

Dimension letters: S = number of steps, S1 = S + 1 ends of steps.

`x = (1 - sigma) data + sigma noise`; time as `velocity_flow` counts it is `1 - sigma`.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from qdit_jax.diffusion.velocity_flow import SIT_TIMES, Flow, FlowTimes, euler, flow_over
from qdit_jax.errors import check_counts
from qdit_jax.types import Numbers

# Noise levels before the shift, see `flow_match_sigmas`.
SPACINGS = ("uniform", "trained", "unipc", "wan", "dpm")


def shifted(sigmas: Float[np.ndarray, " S"], shift: float | int) -> Float[np.ndarray, " S"]:
    """Returns noise levels moved toward 1 for `shift > 1` (Esser et al., arXiv:2403.03206)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def dynamic_shift(
    num_tokens: int,
    *,
    base_shift: float | int = 0.5,
    max_shift: float | int = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    kind: str = "exponential",
) -> float:
    """Returns the shift of an image of `num_tokens` tokens (FLUX's, by default).

    A number mu is linear in the tokens, `base_shift` at `base_tokens` and `max_shift` at
    `max_tokens`, and continues so beyond them; the shift is `e**mu`, or mu itself if `kind` is
    `"linear"`.

    Raises:
        ValueError: if the number of tokens is not positive, or the shift would not be.
    """
    check_counts(num_tokens=num_tokens)
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    mu = base_shift + slope * (num_tokens - base_tokens)
    shift = math.exp(mu) if kind == "exponential" else mu
    if not shift > 0:
        raise ValueError(f"num_tokens={num_tokens} gives a shift of {shift:g}; give shift.")
    return shift


def empirical_shift(num_tokens: int, steps: int, kind: str = "exponential") -> float:
    """Returns the shift of an image of `num_tokens` tokens in `steps` steps: FLUX.2's, by fits.

    A number mu is linear in the tokens at 10 and at 200 steps, and linear in the steps between and
    beyond them; above 4300 tokens it is that of 200 steps. The shift is `e**mu`, or mu itself if
    `kind` is `"linear"`.

    Raises:
        ValueError: if the numbers are not positive, or the shift would not be.
    """
    check_counts(num_tokens=num_tokens, steps=steps)
    mu = at_200 = 0.00016927 * num_tokens + 0.45666666
    if num_tokens <= 4300:
        at_10 = 8.73809524e-05 * num_tokens + 1.89833333
        mu = at_200 + (at_200 - at_10) / 190 * (steps - 200)
    shift = math.exp(mu) if kind == "exponential" else mu
    if not shift > 0:
        raise ValueError(
            f"num_tokens={num_tokens} in steps={steps} gives a shift of {shift:g}; give shift."
        )
    return shift


def resolution_shift(height: float | int, width: float | int, num_frames: int = 1) -> float:
    """Returns the shift of a video by its pixels and frames: Open-Sora v1.2's timestep transform.

    That is `sqrt(height * width / 512**2)`, for videos times `sqrt(num_frames // 17 * 5)`: five
    latent frames for every 17.

    Raises:
        ValueError: for 2 to 16 frames, for which the published rule gives 0, or if a number is not
            positive.
    """
    check_counts(num_frames=num_frames)
    if not (height > 0 and width > 0):
        raise ValueError(f"height={height} and width={width} must be positive numbers of pixels.")
    if 1 < num_frames < 17:
        raise ValueError(f"num_frames={num_frames} is not supported; use 1, or 17 or more.")
    frames = 1 if num_frames == 1 else num_frames // 17 * 5
    return math.sqrt(height * width / 512**2) * math.sqrt(frames)


def flow_match_sigmas(
    steps: int,
    *,
    shift: float | int = 1.0,
    spacing: str = "trained",
    num_train_timesteps: int = 1000,
    shift_terminal: float | int | None = None,
) -> Float[np.ndarray, " S1"]:
    """Returns the noise levels at the ends of the steps, descending to 0.

    `spacing` says where they are before the shift:
    - `"uniform"`: 1 to `1 / steps`, evenly (FLUX's and Open-Sora's pipelines);
    - `"trained"`: evenly over the shifted range of training, so that they are shifted twice
      (diffusers' `FlowMatchEulerDiscreteScheduler`, SD3);
    - `"unipc"`: from 1 toward `1 / num_train_timesteps`, which is left out (diffusers'
      `UniPCMultistepScheduler`);
    - `"wan"`: from `1 - 1 / num_train_timesteps` toward 0, which is left out (Wan's authors);
    - `"dpm"`: the same, rounded as diffusers' `DPMSolverMultistepScheduler` does (Sana).

    `shift_terminal` is the last level before 0.

    Raises:
        ValueError: if `steps` is not from 1 to `num_train_timesteps`, `shift` not positive, or the
            spacing not known.
    """
    check_counts(steps=steps)
    if steps > num_train_timesteps:
        raise ValueError(f"steps={steps} is not supported; use 1 to {num_train_timesteps}.")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift={shift} is not supported; use a positive number, 1 for none.")
    smallest = 1 / num_train_timesteps
    bases = {
        "uniform": lambda: np.linspace(1.0, 0.0, steps + 1)[:-1],
        "trained": lambda: np.linspace(1.0, shifted(np.array([smallest]), shift)[0], steps),
        "unipc": lambda: np.linspace(1.0, smallest, steps + 1)[:-1],
        "wan": lambda: np.linspace(1.0 - smallest, 0.0, steps + 1)[:-1],
        "dpm": lambda: 1.0 - np.linspace(1.0, smallest, steps + 1)[:0:-1],
    }
    if spacing not in bases:
        raise ValueError(f"spacing={spacing!r} is not known; use one of {', '.join(SPACINGS)}.")
    sigmas = shifted(bases[spacing](), shift)
    if shift_terminal is not None:
        if steps == 1:
            raise ValueError("steps=1 has no last noise level to set to shift_terminal; use more.")
        sigmas = 1 - (1 - sigmas) * (1 - shift_terminal) / (1 - sigmas[-1])
    return np.append(sigmas, 0.0)


def chosen_sigmas(
    steps: int, sigmas: Numbers | None, shift: float | int | None, spacing: str | None, default: str
) -> Float[np.ndarray, " S1"]:
    """Returns a sampler's noise levels: those given, else the shifted ones of a spacing.

    Raises:
        ValueError: as `flow_match_sigmas`; if `sigmas` do not descend to 0 in `steps` steps from 1
            or less, or are given together with a shift or a spacing.
    """
    check_counts(steps=steps)
    if sigmas is None:
        shift = 1.0 if shift is None else shift
        return flow_match_sigmas(
            steps, shift=shift, spacing=default if spacing is None else spacing
        )
    levels = np.asarray(sigmas, np.float64)
    if (
        levels.shape != (steps + 1,)
        or not levels[0] <= 1
        or levels[-1] != 0
        or not (np.diff(levels) < 0).all()
    ):
        raise ValueError(
            f"sigmas={sigmas} do not descend from 1 (or less) to 0 in steps={steps} steps."
        )
    if shift is not None or spacing is not None:
        given = f"shift={shift}" if shift is not None else f"spacing={spacing!r}"
        raise ValueError(f"{given} has no effect on given sigmas; leave one of both out.")
    return levels


def flow_euler(
    steps: int = 28,
    *,
    shift: float | int | None = None,
    spacing: str | None = None,
    sigmas: Numbers | None = None,
    flow_times: FlowTimes = SIT_TIMES,
    velocity_to: str = "data",
) -> Flow:
    """Returns Euler's rule over shifted noise levels: `x += (sigma_next - sigma) (noise - data)`.

    Args:
        shift: 1 (the default) for none; `dynamic_shift` and `resolution_shift` compute published
            ones.
        spacing: of the levels before the shift, `"uniform"` by default; see `flow_match_sigmas`.
        sigmas: the levels themselves, `steps + 1` from 1 to 0, in place of a shift and a spacing.
        flow_times: the network's own time at noise, and at the data.
        velocity_to: where its velocity points, `"data"` or `"noise"`.

    Raises:
        TypeError: if `steps` is not a whole number.
        ValueError: if an option is not understood.
    """
    levels = chosen_sigmas(steps, sigmas, shift, spacing, "uniform")
    return flow_over(1 - levels, euler, flow_times, velocity_to)
