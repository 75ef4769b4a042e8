"""From a checkpoint to images: the denoiser of a network, and batched generation.

Dimension letters: N = number of samples, B = batch, H, W, C = one latent or image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from qdit_jax import diffusion
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.sampling.batch_denoisers import batch_denoisers, partitioned_denoisers
from qdit_jax.sampling.batches import checked_batch_size, device_mesh, filled_batch, token_mesh
from qdit_jax.sampling.checks import (
    check_diffusion_model,
    check_numerics,
    check_seed,
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
)
from qdit_jax.sampling.partitioned import (
    batch_parts,
    batch_spec,
    check_partitioned,
    kept_in_place,
    partition_mesh,
)
from qdit_jax.sampling.per_device import BATCH, Layout, layout_of, run_per_device
from qdit_jax.types import AnyArray, Condition, Key, Progress, ProgressFn, untold


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


@jax.jit(static_argnames=("shape", "layout"))
def _generated(
    denoise_fn: Callable[..., Array],
    sampler: diffusion.Sampler,
    key: Key,
    index: Int[Array, " B"],
    condition: Condition,
    shape: tuple[int, ...],
    layout: Layout | None = None,
) -> Float[Array, "B *shape"]:
    def sampled(
        denoise_fn: Callable[..., Array],
        sampler: diffusion.Sampler,
        key: Key,
        index: Int[Array, " B"],
        condition: Condition,
    ) -> Float[Array, "B *shape"]:
        noise, keys = initial_noise(key, index, shape)
        return diffusion.sample(denoise_fn, sampler, noise, condition, keys)

    given = (denoise_fn, sampler, key, index, condition)
    found: Array = run_per_device(layout, sampled, given, PartitionSpec(BATCH))
    return found


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
    hoist: bool | None = None,
    decode_fn: Callable[[Checkpoint, Array], Array] | None = decode,
    progress_fn: ProgressFn = untold,
) -> Float[np.ndarray, "N *shape"]:
    """Returns one sample per condition, from full-precision or quantized parameters; about [-1, 1].

    Sample i depends on `seed`, i and its condition only.  Batches are split over all local devices;
    `batch_size` is the total over devices, by default 16 per device, 4 on CPU. Parameters that are split over the
    devices of a mesh stay so: batches lie over its axis `batch` or `data`, and XLA divides the products.  Where the checkpoint has an autoencoder,
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
        hoist: compute the layers that see the timestep and the condition only (adaLN) before the loop, for all
            timesteps of a batch, see `hoisted`: for memory, a step reads none of their weights. None does so on
            accelerators, where it can be done and memory allows.

    Raises:
        ValueError: if a label or the seed is out of range, there is no label, the batch size is not
            positive, `numerics` have no effect on the checkpoint, the network cannot take `shape`, or
            `hoist` has nothing to compute before the loop.
    """
    check_diffusion_model(checkpoint.model)
    condition = checked_conditions(checkpoint.model, condition)
    num_samples = sample_count(condition, num_samples)
    home = partition_mesh(checkpoint.params)
    parts = None if home is None else batch_parts(home)
    size = checked_batch_size(num_samples, batch_size, shard_tokens, parts)
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
        hoist=hoist,
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
    hoist: bool | None = None,
    decode_fn: Callable[[Checkpoint, Array], Array] | None = decode,
) -> Iterator[tuple[int, Float[np.ndarray, "B *shape"]]]:
    """Yields what `generate` returns batch by batch: the first sample's number, and the samples.

    `starts` are the numbers of the batches' first samples. Conditions are assigned cyclically to
    `num_samples` samples, one per condition by default. A batch has `batch_size` samples, the last one the
    rest. A batch is computed when the iterator is asked for it.
    """
    check_diffusion_model(checkpoint.model)
    check_numerics(checkpoint.params, numerics)
    seed = check_seed(seed)
    condition = checked_conditions(checkpoint.model, condition)
    num_samples = num_samples or sample_count(condition, None)
    size = shape_of_sample(checkpoint.model, shape)
    home = partition_mesh(checkpoint.params)
    check_partitioned(home, shard_tokens, hoist)
    mesh = home or (device_mesh() if shard_tokens == 1 else token_mesh(shard_tokens))
    split = NamedSharding(mesh, batch_spec(mesh))
    model = checkpoint.model.clone(numerics=numerics)
    guided = (guidance, guidance_channels)
    if home is None:
        denoise_fn, denoiser_of = batch_denoisers(
            model, checkpoint.params, sampler, guided, mesh, size, first_frames, shard_tokens, hoist
        )
    else:
        denoise_fn, denoiser_of = partitioned_denoisers(model, checkpoint.params, guided, home)
    check_takes(denoise_fn, model, shape, condition)
    if first_frames is not None:
        first_frames = checked_first_frames(model, first_frames, size)
    vae = checkpoint.vae if decode_fn else None
    if vae is not None:
        vae = dataclasses.replace(vae, params=kept_in_place(vae.params, mesh))
    parts = batch_parts(mesh)
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
        fn = denoiser_of(chosen, padded)
        given = (fn, sampler_of_batch, jax.random.key(seed), numbers, chosen)
        # Layers whose tokens are split are `shard_map`s themselves; split parameters are XLA's to divide.
        is_per_device = shard_tokens == 1 and home is None
        layout = layout_of(given, mesh) if is_per_device else None
        out = _generated(*given, size, layout)
        if vae is not None and decode_fn is not None:
            out = decode_fn(vae, out)
        yield start, np.asarray(out)[: stop - start]
