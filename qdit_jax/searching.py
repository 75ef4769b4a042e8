"""The search of a checkpoint's allocation: what joins the search with networks and samplers.

Dimensions: J batches, B samples a batch, H, W, C one latent.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
from flax import linen as nn

from qdit_jax import diffusion
from qdit_jax.sampling import denoiser


@partial(
    jax.tree_util.register_dataclass, data_fields=["sampler", "guidance"], meta_fields=["model"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Rollout:
    """`(params, noise, label, key) -> final latents`: a network's sampler, parameters left open."""

    sampler: Any
    guidance: Any
    model: nn.Module

    @classmethod
    def of(cls, model: nn.Module, sampler: Any, guidance: float | None) -> Rollout:
        """Returns the rollout; guidance 1 or None calls the network once a step."""
        plain = guidance is None or guidance == 1 or not model.null_class
        return cls(sampler, None if plain else guidance, model)

    def __call__(self, params: Any, noise: Any, label: Any, key: Any) -> Any:
        """Returns the latents at the end of the walk."""
        denoise_fn = denoiser(self.model, params, self.guidance)
        return diffusion.sample(denoise_fn, self.sampler, noise, label, key)

    def step(self, params: Any, x: Any, label: Any, key: Any, step: Any) -> Any:
        """Returns the latents after one step; the same walk as the whole call, step by step."""
        denoise_fn = denoiser(self.model, params, self.guidance)
        row = jax.tree.map(lambda a: a[step], self.sampler.table)
        noise = None
        if self.sampler.stochastic:
            keys = jax.vmap(jax.random.fold_in, (0, None))(key, step)
            noise = jax.vmap(lambda one: jax.random.normal(one, x.shape[1:], x.dtype))(keys)
        return self.sampler.step(denoise_fn, x, label, row, noise).x_next

    @property
    def num_steps(self) -> int:
        """Returns the number of steps of the walk."""
        return jax.tree.leaves(self.sampler.table)[0].shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class OneStep:
    """A rollout's `step` as a pytree that is a function."""

    rollout: Rollout

    def __call__(self, *args: Any) -> Any:
        """Returns the latents after one step."""
        return self.rollout.step(*args)
