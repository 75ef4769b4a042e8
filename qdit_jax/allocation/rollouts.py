"""A checkpoint's sampler as a function of the parameters, and objectives made of it.

Dimensions: J batches, B samples per batch, H, W, C one latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt8

from qdit_jax import diffusion, metrics
from qdit_jax.allocation.coordinates import Coordinates
from qdit_jax.allocation.objectives import FeatureDistance, SampleFn, feature_distance, taken
from qdit_jax.allocation.sensitivity import (
    Carried,
    Prediction,
    StepExperts,
    effects,
    prediction,
)
from qdit_jax.allocation.space import Space
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.models import FeaturesFn, expert_numbers, experts_of
from qdit_jax.sampling import (
    Guidance,
    calls_per_step,
    cyclic_conditions,
    decode,
    denoiser,
    fitting_guidance,
    initial_noise,
    sampler_timesteps,
    shape_of_sample,
    takes_embedded_guidance,
)
from qdit_jax.types import AnyArray, Condition, Key, Params

# Noise [J, B, H, W, C], conditions [J, B, ...] and keys [J, B].
Seeds: TypeAlias = tuple[Array, Condition, Key]


@partial(
    jax.tree_util.register_dataclass, data_fields=["sampler", "guidance"], meta_fields=["model"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Rollout:
    """A network's sampler as a function `(params, noise, condition, key) -> final latents`."""

    sampler: Any
    guidance: Any
    model: nn.Module

    @classmethod
    def of(cls, model: nn.Module, sampler: diffusion.Sampler, guidance: Guidance | None) -> Rollout:
        """Returns the rollout; guidance 1 or None calls the network once per step.

        Raises:
            ValueError: if guidance other than the default is asked of a network without null class.
        """
        guidance = fitting_guidance(model, guidance)
        if guidance is None or (guidance == 1 and not takes_embedded_guidance(model)):
            return cls(sampler, None, model)
        return cls(sampler, guidance if callable(guidance) else float(guidance), model)

    def __call__(
        self, params: Params, noise: Float[Array, "B *shape"], condition: Condition, key: Key
    ) -> Float[Array, "B *shape"]:
        """Returns the latents after the last sampling step."""
        denoise_fn = denoiser(self.model, params, self.guidance)
        return diffusion.sample(denoise_fn, self.sampler, noise, condition, key)

    def start(self, noise: Float[Array, "B *shape"]) -> Carried:
        """Returns what the first step is given: the noise and what the sampler remembers."""
        return Carried(noise, diffusion.initial_state(self.sampler, noise))

    def step(
        self,
        params: Params,
        carried: Carried,
        condition: Condition,
        key: Key,
        step: Int[AnyArray, ""] | int,
    ) -> Carried:
        """Returns latents and state after one step; all in order, from `start`, equal one call."""
        x, state = carried
        denoise_fn = denoiser(self.model, params, self.guidance)
        row = jax.tree.map(lambda a: jnp.asarray(a)[step], self.sampler.table)
        noise = None
        if self.sampler.stochastic:
            keys = jax.vmap(jax.random.fold_in, (0, None))(key, step)
            noise = jax.vmap(lambda one: jax.random.normal(one, x.shape[1:], x.dtype))(keys)
        found = diffusion.take_step(self.sampler, denoise_fn, x, state, condition, row, noise)
        return Carried(found.x_next.astype(x.dtype), found.state)

    @property
    def num_steps(self) -> int:
        """Returns the number of sampling steps."""
        return jax.tree.leaves(self.sampler.table)[0].shape[0]

    @property
    def evaluations(self) -> int:
        """Returns the network evaluations of one sample."""
        return self.num_steps * calls_per_step(self.model, self.guidance)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class OneStep:
    """A rollout's `step` as a pytree that is a function."""

    rollout: Rollout

    def __call__(
        self, params: Params, carried: Carried, condition: Condition, key: Key, step: Array
    ) -> Carried:
        """Returns latents and state after one step."""
        return self.rollout.step(params, carried, condition, key, step)


def step_experts(rollout: Rollout) -> StepExperts | None:
    """Returns a step by each expert of the network alone, and which takes each.

    None for one network, and for a rule of more evaluations than one per step (Heun's): both experts
    may run in one step, so that all of them do.
    """
    names = experts_of(rollout.model)
    if not names or getattr(rollout.sampler, "solve_fn", diffusion.euler) is not diffusion.euler:
        return None
    alone = (rollout.model.clone(expert=name) for name in names)
    step_fns = tuple(OneStep(dataclasses.replace(rollout, model=model)) for model in alone)
    return StepExperts(step_fns, expert_numbers(rollout.model, sampler_timesteps(rollout.sampler)))


def seeds(
    model: nn.Module,
    key: Key,
    num_batches: int,
    batch_size: int,
    first: int = 0,
    conditions: Condition = None,
    shape: Sequence[int] | None = None,
) -> Seeds:
    """Returns noise `[J, B, H, W, C]`, conditions `[J, B, ...]` and keys `[J, B]`.

    Sample `first + i` depends on the key and its number alone; it gets condition number `first + i`
    modulo how many `conditions` there are (by default every class of the network). `shape` is that of
    one sample, the network's own by default.
    """
    index = first + np.arange(num_batches * batch_size)
    noise, keys = initial_noise(key, jnp.asarray(index, jnp.int32), shape_of_sample(model, shape))
    condition = cyclic_conditions(model, conditions, index)
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf).reshape(num_batches, batch_size, *leaf.shape[1:]),
        (noise, condition, keys),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Sensitivities:
    """`base -> Prediction`: sensitivities of every choice on fixed trajectories."""

    rollout: Rollout
    space: Space
    params: Params
    data: Seeds
    key: Key
    num_probes: int
    coordinates: Mapping[str, Coordinates] = dataclasses.field(default_factory=dict)

    def __call__(self, base: np.ndarray | None) -> Prediction:
        """Returns the quadratic prediction at the assignment `base`, or at full precision."""
        noise, condition, keys = self.data
        found = []
        for i in range(len(noise)):
            one = effects(
                OneStep(self.rollout),
                self.params,
                base,
                self.rollout.start(noise[i]),
                taken(condition, i),
                keys[i],
                jax.random.fold_in(self.key, i),
                dict(self.coordinates),
                step_experts(self.rollout),
                space=self.space,
                num_steps=self.rollout.num_steps,
                num_probes=self.num_probes,
            )
            found.append(jax.tree.map(np.asarray, one))
        return prediction(found)

    @property
    def evaluations(self) -> int:
        """Returns what one prediction costs, in network evaluations.

        Each step of a sample runs twice (full precision, base), forward once more and backward once
        per probe (a reverse pass counts as one evaluation), and every choice multiplies each layer
        once. Of several experts, those count that run, see `step_experts`.
        """
        noise = self.data[0]
        ran = 1 if step_experts(self.rollout) else len(experts_of(self.rollout.model)) or 1
        passes = 2 + ran * (1 + self.num_probes + 1 + int(self.space.num_choices.max()))
        return len(noise) * noise.shape[1] * self.rollout.evaluations * passes


def frechet_objective(
    checkpoint: Checkpoint,
    rollout: SampleFn,
    data: Seeds,
    features_fn: FeaturesFn,
    reference: metrics.Statistics,
    batch_size: int = 64,
) -> FeatureDistance:
    """Returns the objective of the paper: the Fréchet distance of samples from a reference.

    With InceptionV3's features it is FID. Videos `[B, T, H, W, C]` with features of videos (I3D's
    for FVD) work alike; a checkpoint's autoencoder then decodes frame by frame.

    Args:
        checkpoint: only its autoencoder is used.
        rollout: `Rollout`, or any `search.SampleFn`.
        data: noise, conditions and keys, see `seeds`.
        features_fn: of uint8 images `[B, H, W, C]`, with an entry `pool`; see `models.features`.
        reference: `metrics.Statistics` of the same features.
        batch_size: images in one call of `features_fn`.
    """

    def distance_fn(images: np.ndarray) -> float:
        batches = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
        own = metrics.statistics(metrics.moments(metrics.extract(features_fn, batches).pool))
        return metrics.frechet_distance(
            reference.mean, reference.covariance, own.mean, own.covariance
        )

    images_fn: Callable[[Array], Array] = as_images
    if checkpoint.vae is not None:
        vae = checkpoint.vae
        images_fn = jax.tree_util.Partial(partial(decoded_images, vae.model), vae.params)
    return feature_distance(rollout, images_fn, distance_fn, *data)


def as_images(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Returns images in [-1, 1] as uint8."""
    return jnp.clip(jnp.round(127.5 * x + 127.5), 0, 255).astype(jnp.uint8)


def decoded_images(
    model: nn.Module, params: Params, latents: Float[Array, "B *lead Z"]
) -> UInt8[Array, "B *pixels C"]:
    """Returns the uint8 images or videos of latents, see `sampling.decode`."""
    return as_images(decode(Checkpoint(model, params), latents))
