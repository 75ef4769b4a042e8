"""From a checkpoint to pictures: the denoiser of a network, and batched generation.

Dimension letters: N = number of samples, B = batch, H, W, C = one latent or image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from qdit_jax import diffusion
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.quant import select_timestep

PUBLISHED_CHANNELS = 3
NAMED_BETAS: dict[str, Callable] = {
    "linear": diffusion.linear_betas,
    "scaled_linear": diffusion.scaled_linear_betas,
    "squaredcos_cap_v2": diffusion.cosine_betas,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Denoiser:
    """A network with its parameters as `denoise_fn`: a pytree whose arrays are the parameters."""

    params: Any
    model: nn.Module = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Any, timestep: Any, label: Any) -> Any:
        """Returns the network's output, with the static scales of the nearest timestep if any."""
        params = select_timestep(self.params, timestep)
        return self.model.apply({"params": params}, x, timestep, label)


def denoiser(
    model: nn.Module,
    params: Any,
    guidance: Any = 1.5,
    guidance_channels: int | None = PUBLISHED_CHANNELS,
) -> Callable:
    """Returns the `denoise_fn` of a network, guided by its null class.

    Parameters and `guidance` are arguments of whatever is compiled with it.  `guidance=None`, or
    the number 1, calls the network once, without the null class.  `guidance_channels` counts the
    guided channels, at most all of the latents': 3 as published, None for all as diffusers does.

    Raises:
        ValueError: if guidance is asked of a network without a null class.
    """
    plain = Denoiser(params, model)
    if guidance is None or (isinstance(guidance, int | float) and guidance == 1):
        return plain
    if not model.null_class:
        raise ValueError(
            f"guidance={guidance} needs a null class, which this model was trained without; "
            "use guidance=None."
        )
    channels = None if guidance_channels is None else min(guidance_channels, model.in_channels)
    null_label = np.int32(model.num_classes)
    return diffusion.guided(plain, guidance, null_label=null_label, channels=channels)


def latent_shape(model: nn.Module) -> tuple[int, int, int]:
    """Returns rows, columns and channels of what the network denoises."""
    size = model.input_size
    height, width = (size, size) if isinstance(size, int) else size
    return height, width, model.in_channels


def trained_schedule(metadata: Mapping[str, Any]) -> diffusion.Schedule:
    """Returns the schedule that a checkpoint was trained on: its scheduler's, or DiT's.

    Raises:
        ValueError: if the scheduler's betas, or what its model predicts, are not known here.
    """
    config = metadata.get("scheduler")
    if not config:
        return diffusion.Schedule(diffusion.linear_betas())
    if config.get("trained_betas") is not None:
        return diffusion.Schedule(np.asarray(config["trained_betas"], np.float64))
    name = config.get("beta_schedule", "linear")
    if name not in NAMED_BETAS:
        raise ValueError(
            f"beta_schedule={name!r} is not supported; use one of {list(NAMED_BETAS)}."
        )
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError(
            f"prediction_type={config['prediction_type']!r} is not supported; use 'epsilon'."
        )
    num_timesteps = config.get("num_train_timesteps", 1000)
    if name == "squaredcos_cap_v2":
        return diffusion.Schedule(diffusion.cosine_betas(num_timesteps))
    ends = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    return diffusion.Schedule(NAMED_BETAS[name](num_timesteps, *ends))


@jax.jit(static_argnames=("shape",))
def initial_noise(
    key: Any, index: Int[Array, " B"], shape: tuple[int, ...]
) -> tuple[Float[Array, "B H W C"], Any]:
    """Returns the noise `[B, *shape]` of the samples numbered `index`, and one key each for later.

    Both follow from `jax.random.fold_in(key, index)` alone: a sample starts from the same noise
    whatever the batch size and the number of devices.
    """
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(index)
    noise = jax.vmap(lambda one: jax.random.normal(one, shape))(keys[:, 0])
    return noise, keys[:, 1]


def decode(vae: Checkpoint, latents: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
    """Returns the images of a diffusion model's latents, after undoing their scaling."""
    return _decoded(vae.model, vae.params, latents)


@jax.jit(static_argnames=("model",))
def _decoded(model, params, latents):
    latents = latents / model.scaling_factor + model.shift_factor
    return model.apply({"params": params}, latents, method="decode")


@jax.jit(static_argnames=("shape",))
def _generated(denoise_fn, sampler, key, index, label, shape):
    noise, keys = initial_noise(key, index, shape)
    return diffusion.sample(denoise_fn, sampler, noise, label, keys)


def generate(
    checkpoint: Checkpoint,
    sampler: diffusion.Sampler,
    labels: Sequence[int] | Int[Any, " N"],
    *,
    seed: int = 0,
    guidance: Any = 1.5,
    guidance_channels: int | None = PUBLISHED_CHANNELS,
    batch_size: int | None = None,
    execution: str = "simulated",
    decode_fn: Callable | None = decode,
    progress_fn: Callable[[int], Any] | None = None,
) -> Float[np.ndarray, "N H W C"]:
    """Returns one sample a label, full precision or quantised alike; images of about [-1, 1].

    Sample i depends on `seed`, i and its label only.  Batches are split over all local devices;
    `batch_size` is in all, by default 16 a device, 4 on CPU.  Where the checkpoint has an autoencoder,
    `decode_fn` makes images of latents; None returns the latents.  `progress_fn` is called after
    every batch with the number of samples in it.

    Raises:
        ValueError: if a label is out of range, there is none, or the batch size is not positive.
    """
    labels = checked_labels(checkpoint.model, labels)
    size = checked_batch_size(labels.size, batch_size)
    done = []
    for _, images in generated_batches(
        checkpoint,
        sampler,
        labels,
        range(0, labels.size, size),
        batch_size=size,
        seed=seed,
        guidance=guidance,
        guidance_channels=guidance_channels,
        execution=execution,
        decode_fn=decode_fn,
    ):
        done.append(images)
        if progress_fn is not None:
            progress_fn(len(images))
    return np.concatenate(done)


def generated_batches(
    checkpoint: Checkpoint,
    sampler: diffusion.Sampler,
    labels: Sequence[int] | Int[Any, " N"],
    starts: Iterable[int],
    *,
    batch_size: int,
    seed: int = 0,
    guidance: Any = 1.5,
    guidance_channels: int | None = PUBLISHED_CHANNELS,
    execution: str = "simulated",
    decode_fn: Callable | None = decode,
) -> Iterator[tuple[int, Float[np.ndarray, "B H W C"]]]:
    """Yields what `generate` returns batch by batch: the first sample's number, and the samples.

    `starts` are the numbers of the first samples of the batches to make; a batch has `batch_size`
    samples, the last one what is left. The device takes the next batch when it is asked for.
    """
    labels = checked_labels(checkpoint.model, labels)
    mesh = jax.make_mesh(
        (jax.local_device_count(),), ("batch",), (AxisType.Auto,), devices=jax.local_devices()
    )
    split, whole = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    model = checkpoint.model.clone(execution=execution)
    denoise_fn = jax.device_put(
        denoiser(model, checkpoint.params, guidance, guidance_channels), whole
    )
    vae = checkpoint.vae if decode_fn else None
    if vae is not None:
        vae = dataclasses.replace(vae, params=jax.device_put(vae.params, whole))
    padded = -(-batch_size // mesh.size) * mesh.size
    for start in starts:
        stop = min(start + batch_size, labels.size)
        index = np.minimum(np.arange(start, start + padded), labels.size - 1)
        numbers, label = jax.device_put((index.astype(np.int32), labels[index]), split)
        out = _generated(
            denoise_fn, sampler, jax.random.key(seed), numbers, label, latent_shape(model)
        )
        if vae is not None and decode_fn is not None:
            out = decode_fn(vae, out)
        yield start, np.asarray(out)[: stop - start]


def checked_labels(model: nn.Module, labels: Any) -> np.ndarray:
    """Returns labels as int32; raises `ValueError` if there is none or one is out of range."""
    labels = np.asarray(labels)
    last = model.num_classes - 1 + model.null_class
    if labels.ndim != 1 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels={labels!r} is no list of class numbers; give one a sample.")
    if bad := sorted({int(i) for i in labels if not 0 <= i <= last}):
        null = f" ({last} is the null class)" if model.null_class else ""
        raise ValueError(f"label {bad[0]} is out of range; this model knows 0 to {last}{null}.")
    return labels.astype(np.int32)


def checked_batch_size(num_samples: int, batch_size: int | None) -> int:
    """Returns how many samples are made at once: as many as asked for, or the devices' default.

    Raises:
        ValueError: if `batch_size` is not positive.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not supported; use a positive whole number.")
    num_devices = jax.local_device_count()
    default = (4 if jax.default_backend() == "cpu" else 16) * num_devices
    wanted = min(batch_size or default, num_samples)
    return -(-wanted // num_devices) * num_devices
