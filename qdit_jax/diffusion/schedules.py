"""Noise schedules of the forward process, in NumPy float64.

Dimension letters: S = number of timesteps of a schedule, B = batch.

The forward process is `x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps`
(Ho et al., arXiv:2006.11239).  Everything here is plain NumPy: coefficients are rounded to float32
once, when a sampler is built.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike


def linear_betas(
    num_timesteps: int = 1000, start: float | None = None, end: float | None = None
) -> Float[np.ndarray, " S"]:
    """Returns evenly spaced betas, by default the schedule that DiT was trained with.

    The default ends are 0.0001 and 0.02 scaled by `1000 / num_timesteps`, as published; ends that
    are given are used as they are.
    """
    scale = 1000 / num_timesteps
    start = scale * 0.0001 if start is None else start
    end = scale * 0.02 if end is None else end
    return np.linspace(start, end, num_timesteps, dtype=np.float64)


def scaled_linear_betas(
    num_timesteps: int = 1000, start: float = 0.00085, end: float = 0.012
) -> Float[np.ndarray, " S"]:
    """Returns betas whose square roots are evenly spaced (latent diffusion's schedule)."""
    return np.linspace(start**0.5, end**0.5, num_timesteps, dtype=np.float64) ** 2


def cosine_betas(num_timesteps: int = 1000, max_beta: float = 0.999) -> Float[np.ndarray, " S"]:
    """Returns betas of the squared-cosine schedule (Nichol and Dhariwal, arXiv:2102.09672)."""
    edges = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
    alpha_bar = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def sigmoid_betas(
    num_timesteps: int = 1000, start: float | int = 0.0001, end: float | int = 0.02
) -> Float[np.ndarray, " S"]:
    """Returns betas that rise from `start` to `end` as a sigmoid from -6 to 6."""
    return start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, num_timesteps)))


def zero_snr_betas(betas: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """Returns betas whose last timestep has no signal (Lin et al., arXiv:2305.08891).

    The square roots of the signal's share are shifted to end at 0 and scaled to start where they
    did.
    """
    root = np.sqrt(np.cumprod(1 - betas))
    if root.size < 2 or root[0] == root[-1]:
        raise ValueError(f"{root.size} betas cannot be rescaled to zero SNR; use 2 or more.")
    kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - kept / np.append(1.0, kept[:-1])


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A discrete diffusion process with its coefficients, each `[S]` float64.

    `betas[i]` is the variance added by step `i`; `timestep_map[i]` is the timestep that the model
    gets at index `i` (the identity unless the schedule was respaced).
    """

    betas: np.ndarray
    timestep_map: np.ndarray = None  # type: ignore[assignment]  # set below

    def __post_init__(self):
        betas = np.asarray(self.betas, np.float64)
        if betas.ndim != 1 or not betas.size or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must be a non-empty vector of numbers in (0, 1].")
        mapped = np.arange(betas.size) if self.timestep_map is None else self.timestep_map
        mapped = np.asarray(mapped, np.int64)
        if mapped.shape != betas.shape:
            raise ValueError(
                f"timestep_map has shape {mapped.shape}, betas has {betas.shape}; give one entry each."
            )
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "timestep_map", mapped)

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps S."""
        return self.betas.size

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """Share of the signal's variance that is left at each timestep."""
        return np.cumprod(1 - self.betas)

    @property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """`alphas_cumprod` one timestep nearer to the data; 1 at the end."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def alphas_cumprod_next(self) -> np.ndarray:
        """`alphas_cumprod` one timestep nearer to the noise; 0 at the end."""
        return np.append(self.alphas_cumprod[1:], 0.0)

    @property
    def sqrt_alphas_cumprod(self) -> np.ndarray:
        """Weight of `x_0` in `x_t`."""
        return np.sqrt(self.alphas_cumprod)

    @property
    def sqrt_one_minus_alphas_cumprod(self) -> np.ndarray:
        """Weight of `eps` in `x_t`."""
        return np.sqrt(1 - self.alphas_cumprod)

    @property
    def sqrt_recip_alphas_cumprod(self) -> np.ndarray:
        """Weight of `x_t` in `x_0`."""
        return np.sqrt(1 / self.alphas_cumprod)

    @property
    def sqrt_recipm1_alphas_cumprod(self) -> np.ndarray:
        """Weight of `-eps` in `x_0`."""
        return np.sqrt(1 / self.alphas_cumprod - 1)

    @property
    def posterior_variance(self) -> np.ndarray:
        """Variance of `q(x_{t-1} | x_t, x_0)`; 0 at the first timestep."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """Log of `posterior_variance`, its zero at the first timestep replaced by the second."""
        variance = self.posterior_variance
        if variance.size == 1:  # nothing to copy from, and no noise is ever drawn with it
            return np.log(self.betas)
        return np.log(np.append(variance[1], variance[1:]))

    @property
    def posterior_mean_coef1(self) -> np.ndarray:
        """Weight of `x_0` in the mean of `q(x_{t-1} | x_t, x_0)`."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_mean_coef2(self) -> np.ndarray:
        """Weight of `x_t` in the mean of `q(x_{t-1} | x_t, x_0)`."""
        alphas = 1 - self.betas
        return (1 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1 - self.alphas_cumprod)


def noised(
    schedule: Schedule,
    x: Float[Array, "B ..."],
    index: Int[Array, " B"],
    noise: Float[Array, "B ..."],
) -> Float[Array, "B ..."]:
    """Returns `x_t` for data `x` at index `index` of the schedule, by the closed form."""

    def gathered(values: ArrayLike):
        return jnp.asarray(values, x.dtype)[index].reshape(-1, *(1,) * (x.ndim - 1))

    signal = gathered(schedule.sqrt_alphas_cumprod)
    return signal * x + gathered(schedule.sqrt_one_minus_alphas_cumprod) * noise
