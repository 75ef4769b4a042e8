"""What a search minimizes. An objective measures inside jit and scores on the host.

The network, its sampler and its features arrive as functions; arrays that an objective holds are
arguments of whatever is compiled with it.

Dimensions: J batches, B samples per batch, H, W, C one latent, D features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped

from qdit_jax.types import AnyArray, Condition, Key, Numbers, Params

# (params, noise [B, H, W, C], condition, key [B]) -> latents [B, H, W, C]; a registered pytree
# (`jax.tree_util.Partial` for example) if it holds arrays.
SampleFn: TypeAlias = Callable[[Params, Array, Condition, Key], Array]
# The number of a batch: a traced int32, or a number of the host.
Batch: TypeAlias = Int[AnyArray, ""] | np.integer | int
Tree = TypeVar("Tree")


@runtime_checkable
class Objective(Protocol):
    """What the evaluator asks of an objective; a registered pytree."""

    @property
    def num_batches(self) -> int:
        """Returns J, the number of batches that it can be measured on."""

    def measure(self, params: Params, batch: Batch) -> PyTree[Array]:
        """Returns a tree of arrays for the batch of that number; runs inside jit."""

    def score(self, measured: PyTree[np.ndarray]) -> float:
        """Returns the fitness; lower is better.

        Args:
            measured: what `measure` returned for some batches, stacked along a first axis.
        """


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sample_fn", "noise", "condition", "keys", "reference"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, eq=False)
class PairedError:
    """Squared error of final latents against full precision, on the same noise and conditions.

    A sample's error is its mean squared difference over the mean square of the reference latents.

    Attributes:
        noise, reference: `[J, B, H, W, C]`.
        condition: a pytree of arrays `[J, B, ...]`.
        keys: `[J, B]`.
    """

    sample_fn: Any
    noise: Any
    condition: Any
    keys: Any
    reference: Any

    @property
    def num_batches(self) -> int:
        """Returns J."""
        return self.noise.shape[0]

    def measure(self, params: Params, batch: Batch) -> Float[Array, " B"]:
        """Returns every sample's error."""
        final = self.sample_fn(params, *taken((self.noise, self.condition, self.keys), batch))
        gap = jnp.square(final - self.reference[batch]).mean(axis=tuple(range(1, final.ndim)))
        return gap / jnp.square(self.reference).mean()

    def score(self, measured: Float[AnyArray, "J B"]) -> float:
        """Returns the mean error."""
        return float(np.mean(measured, dtype=np.float64))


def taken(data: Tree, batch: Batch) -> Tree:
    """Returns one batch of a tree of arrays `[J, ...]`."""
    return jax.tree.map(lambda leaf: leaf[batch], data)


def paired_error(
    sample_fn: SampleFn,
    params: Params,
    noise: Float[AnyArray, "J B *shape"],
    condition: Condition,
    keys: Shaped[Key, "J B *raw"],
) -> PairedError:
    """Returns the paired objective with its reference sampled from full-precision `params`.

    Args:
        noise: `[J, B, H, W, C]`; condition: a pytree `[J, B, ...]`; keys: `[J, B]`.
    """
    noise, condition = jax.tree.map(jnp.asarray, (noise, condition))
    run = jax.jit(lambda sample_fn, *data: sample_fn(*data))
    sample_fn = as_pytree(sample_fn)
    data = (noise, condition, keys)
    final = [run(sample_fn, params, *taken(data, batch)) for batch in range(len(noise))]
    return PairedError(sample_fn, noise, condition, keys, jnp.stack(final))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sample_fn", "features_fn", "noise", "condition", "keys"],
    meta_fields=["distance_fn"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class FeatureDistance:
    """A distance between features of generated samples and of a reference, such as FID's or FVD's.

    Attributes:
        features_fn: `(latents [B, H, W, C]) -> [B, ...]`, features or the images from which
            `distance_fn` makes them; decoding included; traced.
        distance_fn: `(features [N, ...]) -> float`, on the host; it knows the reference.
        noise, condition, keys: as in `PairedError`.
    """

    sample_fn: Any
    features_fn: Any
    noise: Any
    condition: Any
    keys: Any
    distance_fn: Callable[[np.ndarray], float]

    @property
    def num_batches(self) -> int:
        """Returns J."""
        return self.noise.shape[0]

    def measure(self, params: Params, batch: Batch) -> Shaped[Array, "B ..."]:
        """Returns the features of one batch of samples."""
        final = self.sample_fn(params, *taken((self.noise, self.condition, self.keys), batch))
        return self.features_fn(final)

    def score(self, measured: Shaped[AnyArray, "J B ..."]) -> float:
        """Returns the distance of all samples' features from the reference."""
        features = np.asarray(measured)
        return float(self.distance_fn(features.reshape(-1, *features.shape[2:])))


def feature_distance(
    sample_fn: SampleFn,
    features_fn: Callable[[Array], Array],
    distance_fn: Callable[[np.ndarray], float],
    noise: Float[AnyArray, "J B *shape"],
    condition: Condition,
    keys: Shaped[Key, "J B *raw"],
) -> FeatureDistance:
    """Returns a distance of features, the paper's objective; arguments as in `FeatureDistance`."""
    noise, condition = jax.tree.map(jnp.asarray, (noise, condition))
    return FeatureDistance(
        as_pytree(sample_fn), as_pytree(features_fn), noise, condition, keys, distance_fn
    )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["fn", "key"],
    meta_fields=["count"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class FunctionObjective:
    """A user's `fn(params, key) -> scalar`, averaged over `count` keys."""

    fn: Any
    key: Any
    count: int = 1

    @property
    def num_batches(self) -> int:
        """Returns the number of keys."""
        return self.count

    def measure(self, params: Params, batch: Batch) -> Float[Array, ""]:
        """Returns the function's value under the batch's own key."""
        return jnp.asarray(self.fn(params, jax.random.fold_in(self.key, batch)), jnp.float32)

    def score(self, measured: Float[AnyArray, " J"]) -> float:
        """Returns the mean over the keys."""
        return float(np.mean(measured, dtype=np.float64))


def function_objective(
    fn: Callable[[Params, Key], Numbers], key: Key, num_batches: int = 1
) -> FunctionObjective:
    """Returns the objective of a user's traced function; see `FunctionObjective`."""
    return FunctionObjective(as_pytree(fn), key, num_batches)


def as_pytree(fn: Callable[..., Tree]) -> Callable[..., Tree]:
    """Returns `fn` as an argument of jit; a plain function becomes static, by identity."""
    leaves = jax.tree.leaves(fn)
    is_plain = len(leaves) == 1 and leaves[0] is fn
    return jax.tree_util.Partial(fn) if is_plain else fn
