"""From a checkpoint to images: the denoiser of a network, and batched generation.

Dimension letters: N = number of samples, B = batch, H, W, C = one latent or image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Num

from qdit_jax import diffusion
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.models import (
    NULL,
    is_concrete,
    null_condition_of,
    null_entries,
    with_guidance,
    without_null,
)
from qdit_jax.quant import UNQUANTIZED, applied_over_time, select_timestep
from qdit_jax.sampling.batches import checked_batch_size, device_mesh, filled_batch, token_mesh
from qdit_jax.sampling.checks import (
    calls_per_step,
    check_diffusion_model,
    check_guidance,
    check_numerics,
    check_seed,
    num_guided_channels,
    sample_count,
)
from qdit_jax.sampling.conditions import (
    check_takes,
    checked_conditions,
    rows_of,
    shape_of_sample,
)
from qdit_jax.sampling.decoding import decode
from qdit_jax.sampling.first_frames import checked_first_frames, keeping, kept_rows
from qdit_jax.sampling.own_guidance import (
    PUBLISHED,
    Guidance,
    chosen_guidance,
    own_guidance,
    takes_embedded_guidance,
)
from qdit_jax.sampling.running import running_params
from qdit_jax.sampling.token_sharding import split_tokens
from qdit_jax.types import AnyArray, Condition, Key, Params, Progress, ProgressFn, untold


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


@jax.jit(static_argnames=("shape",))
def initial_noise(
    key: Key, index: Int[Array, " B"], shape: tuple[int, ...]
) -> tuple[Float[Array, "B *shape"], Key]:
    """Returns the noise `[B, *shape]` of the samples `index`, and a key per sample for the steps.

    Both depend on `jax.random.fold_in(key, index)` only: a sample starts from the same noise with
    any batch size and number of devices.
    """
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(index)
    noise = jax.vmap(lambda one: jax.random.normal(one, shape, jnp.float32))(keys[:, 0])
    return noise, keys[:, 1]


@jax.jit(static_argnames=("shape",))
def _generated(
    denoise_fn: Callable[..., Array],
    sampler: diffusion.Sampler,
    key: Key,
    index: Int[Array, " B"],
    condition: Condition,
    shape: tuple[int, ...],
) -> Float[Array, "B *shape"]:
    noise, keys = initial_noise(key, index, shape)
    return diffusion.sample(denoise_fn, sampler, noise, condition, keys)


def generate(
    checkpoint: Checkpoint,
    sampler: diffusion.Sampler,
    condition: Condition,
    *,
    num_samples: int | None = None,
    seed: int = 0,
    guidance: Guidance | None = PUBLISHED,
    guidance_channels: int | str | None = PUBLISHED,
    batch_size: int | None = None,
    numerics: str = "simulated",
    shape: Sequence[int] | None = None,
    first_frames: AnyArray | None = None,
    shard_tokens: int = 1,
    decode_fn: Callable[[Checkpoint, Array], Array] | None = decode,
    progress_fn: ProgressFn = untold,
) -> Float[np.ndarray, "N *shape"]:
    """Returns one sample per condition, from full-precision or quantized parameters; about [-1, 1].

    Sample i depends on `seed`, i and its condition only.  Batches are split over all local devices;
    `batch_size` is the total over devices, by default 16 per device, 4 on CPU.  Where the checkpoint has an autoencoder,
    `decode_fn` turns latents into images; None returns the latents.  `progress_fn` is called after
    every batch with the number of samples in it.

    Args:
        condition: class labels `[N]`, the family's dict of arrays with N first, or None for a
            network that takes none. A dict's `null_*` entries (N rows, or one) are the null condition of guidance in
            place of the network's own.
        num_samples: how many; by default one per condition.
        shape: of one sample of the network, channels last; `model.sample_shape()` by default.
        first_frames: latents `[N, F, h, w, Z]` that a video begins with and that stay as they are, one
            clip per sample or cycled; the network sees them as clean. See `diffusion.keeping_frames`.
        shard_tokens: how many devices share each sample, a number that divides that of the devices; each
            then holds its share of the activations and all parameters. Autoencoders decode whole samples.

    Raises:
        ValueError: if a label or the seed is out of range, there is no label, the batch size is not
            positive, `numerics` have no effect on the checkpoint, or the network cannot take `shape`.
    """
    check_diffusion_model(checkpoint.model)
    condition = checked_conditions(checkpoint.model, condition)
    num_samples = sample_count(condition, num_samples)
    size = checked_batch_size(num_samples, batch_size, shard_tokens)
    done = []
    for _, images in generated_batches(
        checkpoint,
        sampler,
        condition,
        range(0, num_samples, size),
        batch_size=size,
        num_samples=num_samples,
        seed=seed,
        guidance=guidance,
        guidance_channels=guidance_channels,
        numerics=numerics,
        shape=shape,
        first_frames=first_frames,
        shard_tokens=shard_tokens,
        decode_fn=decode_fn,
    ):
        done.append(images)
        progress_fn(Progress(len(images)))
    return np.concatenate(done)


def generated_batches(
    checkpoint: Checkpoint,
    sampler: diffusion.Sampler,
    condition: Condition,
    starts: Iterable[int],
    *,
    batch_size: int,
    num_samples: int | None = None,
    seed: int = 0,
    guidance: Guidance | None = PUBLISHED,
    guidance_channels: int | str | None = PUBLISHED,
    numerics: str = "simulated",
    shape: Sequence[int] | None = None,
    first_frames: AnyArray | None = None,
    shard_tokens: int = 1,
    decode_fn: Callable[[Checkpoint, Array], Array] | None = decode,
) -> Iterator[tuple[int, Float[np.ndarray, "B *shape"]]]:
    """Yields what `generate` returns batch by batch: the first sample's number, and the samples.

    `starts` are the numbers of the batches' first samples. Conditions are assigned cyclically to
    `num_samples` samples, one per condition by default. A batch has `batch_size` samples, the last one the rest. A batch is computed when the iterator is asked for it.
    """
    check_diffusion_model(checkpoint.model)
    check_numerics(checkpoint.params, numerics)
    seed = check_seed(seed)
    condition = checked_conditions(checkpoint.model, condition)
    num_samples = num_samples or sample_count(condition, None)
    size = shape_of_sample(checkpoint.model, shape)
    mesh = device_mesh() if shard_tokens == 1 else token_mesh(shard_tokens)
    split, whole = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    model = checkpoint.model.clone(numerics=numerics)
    params, shared = running_params(model, checkpoint.params), None if shard_tokens == 1 else mesh
    denoise_fn = denoiser(model, params, guidance, guidance_channels, shared)
    denoise_fn = jax.device_put(denoise_fn, whole)
    check_takes(denoise_fn, model, shape, condition)
    if first_frames is not None:
        first_frames = checked_first_frames(model, first_frames, size)
    vae = checkpoint.vae if decode_fn else None
    if vae is not None:
        vae = dataclasses.replace(vae, params=jax.device_put(vae.params, whole))
    parts = mesh.shape["batch"]
    padded = -(-batch_size // parts) * parts
    for start in starts:
        stop = min(start + batch_size, num_samples)
        index = filled_batch(start, padded, num_samples)
        chosen = rows_of(condition, index)
        numbers, chosen = jax.device_put((index.astype(np.int32), chosen), split)
        sampler_of_batch = sampler
        if first_frames is not None:
            kept = jax.device_put(kept_rows(first_frames, index, size[0]), split)
            sampler_of_batch = keeping(sampler, model, *kept)
        out = _generated(denoise_fn, sampler_of_batch, jax.random.key(seed), numbers, chosen, size)
        if vae is not None and decode_fn is not None:
            out = decode_fn(vae, out)
        yield start, np.asarray(out)[: stop - start]
