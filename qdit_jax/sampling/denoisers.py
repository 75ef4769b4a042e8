"""The denoiser of a network: a pytree that samplers call, with or without guidance.

Dimension letters: B = batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, Num

from qdit_jax import diffusion
from qdit_jax.models import (
    NULL,
    is_concrete,
    null_condition_of,
    null_entries,
    with_guidance,
    without_null,
)
from qdit_jax.quant import UNQUANTIZED, applied_over_time, select_timestep
from qdit_jax.sampling.checks import calls_per_step, check_guidance, num_guided_channels
from qdit_jax.sampling.own_guidance import (
    PUBLISHED,
    Guidance,
    chosen_guidance,
    own_guidance,
    takes_embedded_guidance,
)
from qdit_jax.sampling.token_sharding import split_tokens
from qdit_jax.types import Condition, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Denoiser:
    """A network with its parameters as `denoise_fn`: a pytree whose arrays are the parameters."""

    params: Params
    model: nn.Module = dataclasses.field(metadata={"static": True})
    # Whose axis `tokens` a sample's tokens are split over.
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})

    def __call__(
        self, x: Float[Array, "B ..."], timestep: Num[Array, "B *moments"], condition: Condition
    ) -> Array:
        """Returns the network's output, with the static scales and bits of the nearest timestep.

        `null_*` entries of the condition do not count here, see `null_condition`.

        Raises:
            ValueError: as `check_condition`; in a traced label, what is out of range gives NaN.
        """
        self.check_condition(condition)
        return diffusion.in_auto_axes(_applied, x, timestep, without_null(condition), self)

    def check_condition(self, condition: Condition) -> None:
        """Raises `ValueError` for conditions unknown to the network, unless they are traced."""
        check = getattr(self.model, "check_condition", None)  # a function's stand-in has none
        if check is not None and all(is_concrete(leaf) for leaf in jax.tree.leaves(condition)):
            check(without_null(condition))

    def null_condition(self, condition: Condition) -> Condition:
        """Returns the null condition, with the same entries; see `models.null_condition_of`."""
        found = null_condition_of(self.model, self.params, condition)
        if null := null_entries(condition):
            return {**cast(dict, found), **{f"{NULL}{name}": null[name] for name in null}}
        return found


def _applied(
    x: Float[Array, "B ..."],
    timestep: Num[Array, "B *moments"],
    condition: Condition,
    denoise_fn: Denoiser,
) -> Array:
    of_samples = diffusion.of_samples(timestep)
    params = select_timestep(denoise_fn.params, of_samples)

    def apply(params: Params, bits: int | None) -> Array:
        model = denoise_fn.model
        if bits == UNQUANTIZED and getattr(model, "numerics", "simulated") != "simulated":
            model = model.clone(numerics="simulated")  # integers need quantized activations
        with split_tokens(denoise_fn.mesh):
            return cast(Array, model.apply({"params": params}, x, timestep, condition))

    return applied_over_time(apply, params, of_samples)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddedGuidance:
    """A denoiser whose network takes the scale of guidance as an entry: one call per step.

    Samples whose condition has the entry `guidance` keep it.
    """

    denoise_fn: Denoiser
    scale: Any

    def __call__(
        self, x: Float[Array, "B ..."], timestep: Num[Array, " B"], condition: Condition
    ) -> Array:
        """Returns the network's output; the scale is one number, or one per sample."""
        return self.denoise_fn(x, timestep, self.filled(condition))

    def filled(self, condition: Condition) -> Condition:
        """Returns the condition with the scale."""
        return with_guidance(self.denoise_fn.model, condition, self.scale)

    def check_condition(self, condition: Condition) -> None:
        """Raises `ValueError` as the network does, or if two different scales are given.

        The network's own scale, which is the default, does not count as given.
        """
        self.denoise_fn.check_condition(self.filled(condition))
        given = condition.get("guidance") if isinstance(condition, Mapping) else None
        if given is None or not all(is_concrete(jnp.asarray(a)) for a in (given, self.scale)):
            return
        scale = np.asarray(self.scale)
        if (scale != own_guidance(self.denoise_fn.model)).any() and (
            np.asarray(given) != scale
        ).any():
            raise ValueError(
                f"guidance={self.scale}, but the condition has an entry guidance of other values; "
                "give one of both."
            )


def denoiser(
    model: nn.Module,
    params: Params,
    guidance: Guidance | None = PUBLISHED,
    guidance_channels: int | str | None = PUBLISHED,
    mesh: Mesh | None = None,
) -> Callable[..., Array]:
    """Returns the `denoise_fn` of a network, guided by its null condition.

    Parameters and `guidance` are arguments of a function that is compiled with it, not constants.
    `guidance="published"` is the network's own, see `own_guidance`: 1.5 for DiT, 4 and 3 for the experts
    of Wan A14B. `guidance=None`, or the number 1, calls the network once, without the null condition.
    Else `guidance` is a number, one per sample, or a function of the timestep such as
    `diffusion.SteppedScale`. A network that embeds guidance (FLUX.1-dev) is given the scale as an
    entry of its condition and is called once, also at 1.
    `guidance_channels` counts the guided channels, at most all of the sample's: `"published"` for as
    many as the family's published sampler guides (3 of DiT's 4), None for all as diffusers does.
    `mesh` has the axes `batch` and `tokens` (`token_mesh`), over which activations are then split.

    Raises:
        ValueError: if the network has no null condition, or a sample fewer channels.
    """
    guidance = chosen_guidance(model, guidance)
    check_guidance(guidance)
    channels = num_guided_channels(model, guidance_channels)
    plain = Denoiser(params, model, mesh)
    if guidance is not None and takes_embedded_guidance(model):
        if callable(guidance):
            raise ValueError(
                "this network embeds guidance, which cannot change over time; use a number."
            )
        return EmbeddedGuidance(plain, guidance)
    if calls_per_step(model, guidance) == 1:
        return plain
    if not model.has_null:
        raise ValueError(
            f"guidance={guidance} needs a null class, which this model was trained without; "
            "use guidance=None."
        )
    return diffusion.guided(plain, cast(Any, guidance), channels=channels)
