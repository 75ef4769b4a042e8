"""Frames that are given and stay as they are, while the others are sampled by any sampler.

That continues a picture or a clip: the network sees the given frames as clean, at timestep 0.
Dimensions: B batch, T frames, H and W rows and columns, C channels of the latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from qdit_jax.diffusion.guidance import as_pytree, check_condition
from qdit_jax.diffusion.posterior import DenoiseFn, Latents
from qdit_jax.diffusion.samplers import Sampler, Step, initial_state, take_step
from qdit_jax.types import Condition

# (x, timestep [B], condition, mask [B, T]) -> the timestep and condition that say so to a network.
SeenFn: TypeAlias = Callable[[Array, Array, Condition, Array], tuple[Array, Condition]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SeesFrames:
    """A `denoise_fn` that tells its network which frames are clean."""

    denoise_fn: Any
    seen_fn: Any
    mask: Any

    def __call__(self, x: Latents, timestep: Num[Array, " B"], condition: Condition) -> Array:
        """Returns the network's output."""
        timestep, condition = self.seen_fn(x, timestep, condition, self.mask)
        return self.denoise_fn(x, timestep, condition)

    def check_condition(self, condition: Condition) -> None:
        """Raises what the function raises for unknown conditions."""
        check_condition(self.denoise_fn, condition)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KeepsFrames:
    """A sampler that keeps given frames; see `keeping_frames`."""

    sampler: Any
    clean: Any
    mask: Any
    seen_fn: Any

    @property
    def table(self) -> Any:
        """Coefficients, one row per step."""
        return self.sampler.table

    @property
    def stochastic(self) -> bool:
        """Whether steps need noise."""
        return self.sampler.stochastic

    def kept(self, x: Float[Array, "B T *shape"]) -> Float[Array, "B T *shape"]:
        """Returns latents with the given frames as they were given."""
        mask = self.mask.reshape(*self.mask.shape, *(1,) * (x.ndim - 2))
        return jnp.where(mask, x, self.clean.astype(x.dtype))

    def initial_state(self, x: Latents) -> Any:
        """Returns the state before the first step, of the sampler that does the work."""
        return initial_state(self.sampler, self.kept(x))

    def step(
        self,
        denoise_fn: DenoiseFn,
        x: Latents,
        condition: Condition,
        row: Any,
        noise: Latents | None,
        state: Any,
    ) -> Step:
        """Returns one iteration, the given frames clean before and after."""
        sees = SeesFrames(denoise_fn, self.seen_fn, self.mask)
        found = take_step(self.sampler, sees, self.kept(x), state, condition, row, noise)
        return found._replace(x0=self.kept(found.x0), x_next=self.kept(found.x_next))


def keeping_frames(
    sampler: Sampler,
    clean: Float[Array, "B T H W C"],
    mask: Bool[Array, "B T"],
    seen_fn: SeenFn,
) -> KeepsFrames:
    """Returns a sampler that denoises the frames where `mask` is True and keeps the others.

    Those are `clean` before and after every step, bit for bit, whatever the sampler; it may remember
    earlier steps. A mask that is True everywhere changes nothing but what the network is told.

    Args:
        clean: latents; what stands in frames that are denoised does not count.
        seen_fn: tells a network which frames are clean: by a timestep per token, or an entry of the
            condition; a pytree, or a function, which is then static.
    """
    return KeepsFrames(sampler, clean, mask, as_pytree(seen_fn))  # type: ignore[arg-type]
