"""From a checkpoint to pictures: the denoiser of a network, and batched generation.

Dimension letters: N = number of samples, B = batch, H, W, C = one latent or image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from qdit_jax import diffusion
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.errors import check_counts, check_finite
from qdit_jax.models import as_condition
from qdit_jax.quant import select_timestep
from qdit_jax.sampling.checks import check_diffusion_model, check_execution

PUBLISHED = "published"
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

    def __call__(self, x: Any, timestep: Any, condition: Any) -> Any:
        """Returns the network's output, with the static scales of the nearest timestep if any."""
        params = select_timestep(self.params, timestep)
        return self.model.apply({"params": params}, x, timestep, condition)

    def null_condition(self, condition: Any) -> Any:
        """Returns the condition of no condition, see `models.Network`."""
        return self.model.null_condition(condition, self.params)


def denoiser(
    model: Any,
    params: Any,
    guidance: Any = 1.5,
    guidance_channels: int | str | None = PUBLISHED,
) -> Callable:
    """Returns the `denoise_fn` of a network, guided by its null condition.

    Parameters and `guidance` are arguments of whatever is compiled with it.  `guidance=None`, or
    the number 1, calls the network once, without the null condition.  `guidance_channels` counts
    the guided channels, at most all of the sample's: `"published"` for as many as the family's
    published sampler guides (3 of DiT's 4), None for all as diffusers does.

    Raises:
        ValueError: if guidance is asked of a network without a null condition, or of more channels
            than a sample has.
    """
    check_finite(guidance=guidance)
    channels = num_guided_channels(model, guidance_channels)
    plain = Denoiser(params, model)
    if guidance is None or (isinstance(guidance, int | float) and guidance == 1):
        return plain
    if not model.has_null:
        raise ValueError(
            f"guidance={guidance} needs a null class, which this model was trained without; "
            "use guidance=None."
        )
    return diffusion.guided(plain, guidance, channels=channels)


def num_guided_channels(model: Any, guidance_channels: int | str | None) -> int | None:
    """Returns how many channels guidance changes, None for all; see `denoiser`.

    Raises:
        ValueError: if that is no positive number, or more than a sample has.
    """
    most = model.sample_shape()[-1]
    if guidance_channels == PUBLISHED:
        return None if model.guided_channels is None else min(model.guided_channels, most)
    if guidance_channels is None:
        return None
    check_counts(guidance_channels=guidance_channels)
    if int(guidance_channels) > most:
        raise ValueError(
            f"guidance_channels={guidance_channels} is more than the {most} channels of this "
            "model's samples; use guidance_channels=None for all."
        )
    return int(guidance_channels)


def conditions_in_turn(model: Any, conditions: Any, index: Int[Any, " B"]) -> Any:
    """Returns the conditions of the samples numbered `index`: entry `i modulo their number`.

    `conditions` is a pytree with one entry per class or prompt, as numbers or NumPy arrays; None is
    every condition that the network knows.

    Raises:
        ValueError: if it is None and the network's conditions cannot be listed, or a value of it
            is out of range.
    """
    if conditions is None:
        conditions = model.all_conditions()
        if conditions is None:
            example = model.example_condition(1)
            if not jax.tree.leaves(example):
                return example
            raise ValueError(
                "conditions=None: this model takes prompts, which cannot be listed; give the "
                "embeddings of some."
            )
    else:
        conditions = as_condition(conditions)
        model.check_condition(conditions)
    index = np.asarray(index)
    return jax.tree.map(lambda leaf: leaf[index % leaf.shape[0]], conditions)


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
) -> tuple[Float[Array, "B *shape"], Any]:
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
def _generated(denoise_fn, sampler, key, index, condition, shape):
    noise, keys = initial_noise(key, index, shape)
    return diffusion.sample(denoise_fn, sampler, noise, condition, keys)


def generate(
    checkpoint: Checkpoint,
    sampler: diffusion.Sampler,
    condition: Any,
    *,
    seed: int = 0,
    guidance: Any = 1.5,
    guidance_channels: int | str | None = PUBLISHED,
    batch_size: int | None = None,
    execution: str = "simulated",
    decode_fn: Callable | None = decode,
    progress_fn: Callable[[int], Any] | None = None,
) -> Float[np.ndarray, "N *shape"]:
    """Returns one sample per condition, full precision or quantised alike; about [-1, 1].

    Sample i depends on `seed`, i and its condition only.  Batches are split over all local devices;
    `batch_size` is in all, by default 16 a device, 4 on CPU.  Where the checkpoint has an autoencoder,
    `decode_fn` makes images of latents; None returns the latents.  `progress_fn` is called after
    every batch with the number of samples in it.

    Args:
        condition: class labels `[N]`, or the family's dict of arrays with N first.

    Raises:
        ValueError: if a label is out of range, there is none, the batch size is not positive, or
            nothing in the checkpoint executes as asked.
    """
    check_diffusion_model(checkpoint.model)
    check_execution(checkpoint.params, execution)
    condition = as_condition(condition)
    checkpoint.model.check_condition(condition)
    num_samples = jax.tree.leaves(condition)[0].shape[0]
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
    done = []
    for index in _batches(num_samples, batch_size, mesh.size):
        chosen = jax.tree.map(lambda leaf, index=index: leaf[index], condition)
        numbers, chosen = jax.device_put((index.astype(np.int32), chosen), split)
        out = _generated(
            denoise_fn, sampler, jax.random.key(seed), numbers, chosen, model.sample_shape()
        )
        if vae is not None and decode_fn is not None:
            out = decode_fn(vae, out)
        num_new = len(np.unique(index))
        done.append(np.asarray(out)[:num_new])
        if progress_fn is not None:
            progress_fn(num_new)
    return np.concatenate(done)


def _batches(num_samples: int, batch_size: int | None, num_devices: int) -> Iterator[np.ndarray]:
    """Yields sample numbers in batches of one size, the last one padded by its last sample."""
    if batch_size is not None:
        check_counts(batch_size=batch_size)
    default = (4 if jax.default_backend() == "cpu" else 16) * num_devices
    wanted = min(batch_size or default, num_samples)
    size = -(-wanted // num_devices) * num_devices
    for start in range(0, num_samples, size):
        yield np.minimum(np.arange(start, start + size), num_samples - 1)
