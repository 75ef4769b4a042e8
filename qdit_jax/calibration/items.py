"""Single inputs of a network, drawn from sampling trajectories: what rounding is fitted to.

Dimensions: I items, B batch, S steps, M items of one trajectory, H, W, C one latent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from qdit_jax import diffusion
from qdit_jax.calibration.recording import default_sampler, model_inputs
from qdit_jax.calibration.statistics import write_arrays
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.errors import UserError
from qdit_jax.files import PathLike, as_path
from qdit_jax.sampling import denoiser, initial_noise, latent_shape

# `(sample numbers [B], S) -> steps [B, M]`: which iterations a trajectory's items come from.
ChooseFn = Callable[[Int[np.ndarray, " B"], int], Int[np.ndarray, "B M"]]


class Items(NamedTuple):
    """Arguments of single calls of the network; `sample` is the trajectory each comes from."""

    x: Float[np.ndarray, "I H W C"]
    timestep: Float[np.ndarray, " I"]
    label: Int[np.ndarray, " I"]
    sample: Int[np.ndarray, " I"]

    def save(self, path: PathLike) -> None:
        """Writes an `.npz` with one array a field."""
        write_arrays(path, self._asdict(), "inputs")

    @classmethod
    def load(cls, path: PathLike) -> Items:
        """Returns the items in a file; raises `UserError` if it holds none."""
        try:
            with as_path(path).open("rb") as file, np.load(file) as data:
                return cls(*(data[name] for name in cls._fields))
        except (OSError, KeyError, ValueError) as error:
            raise UserError(
                f"{path} holds no calibration inputs ({error}); write them with "
                "`qdit calibrate CKPT FILE --collect spread`."
            ) from error


def spread_steps(num_items: int = 4) -> ChooseFn:
    """Returns the choice of `num_items` steps evenly spread over a trajectory, shifted by sample.

    Whatever the number of samples, all parts of the trajectory are seen equally often.
    """
    if num_items < 1:
        raise ValueError(f"num_items={num_items} must be 1 or more.")

    def choose(index: np.ndarray, num_steps: int) -> np.ndarray:
        count = min(num_items, num_steps)
        # The fractions of multiples of the golden ratio fill [0, 1) evenly.
        offset = (index * 0.6180339887498949) % 1
        place = (np.arange(count) + offset[:, None]) / count
        return np.floor(place * num_steps).astype(np.int64)

    return choose


def authors_steps(seed: int) -> ChooseFn:
    """Returns the choice of the Q-DiT release: one step a sample, no step twice in a batch.

    NumPy's legacy `RandomState(seed)` goes on from batch to batch.

    Raises:
        ValueError: when called, if a batch has more samples than the sampler has steps.
    """
    random = np.random.RandomState(seed)

    def choose(index: np.ndarray, num_steps: int) -> np.ndarray:
        if len(index) > num_steps:
            raise ValueError(
                f"a batch of {len(index)} samples needs as many steps, but the sampler has "
                f"{num_steps}; use batch_size={num_steps} or less."
            )
        return random.choice(num_steps, len(index), replace=False)[:, None]

    return choose


def collect_items(
    checkpoint: Checkpoint,
    key: Any,
    num_samples: int = 32,
    *,
    sampler: diffusion.Sampler | None = None,
    guidance: Any = 1.5,
    batch_size: int = 16,
    choose_fn: ChooseFn | None = None,
    null: bool = True,
    progress_fn: Callable[[int], Any] | None = None,
) -> Items:
    """Returns items of the full-precision sampler's trajectories, `num_samples` of them.

    Each chosen step makes an item with the sample's label and, with `null` and where the network has
    a null class, one with that. The release's collection is `choose_fn=authors_steps(seed)` with
    `null=False`: it never sees the null class.

    Args:
        key: used once; sample i starts from `fold_in(key, i)` with label i modulo the classes.
        sampler: of the trajectories, see `calibrate`.
        choose_fn: 4 steps of each trajectory, evenly spread, by default.
        progress_fn: called with the number of samples finished, batch by batch.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be 1 or more.")
    model = checkpoint.model
    sampler = default_sampler(checkpoint) if sampler is None else sampler
    choose_fn = spread_steps() if choose_fn is None else choose_fn
    denoise_fn = denoiser(model, checkpoint.params, guidance if model.null_class else None)
    parts = []
    for start in range(0, num_samples, batch_size):
        index = np.arange(start, min(start + batch_size, num_samples))
        label = (index % model.num_classes).astype(np.int32)
        noise, keys = initial_noise(key, jnp.asarray(index), latent_shape(model))
        parts.append(trajectory_items(denoise_fn, sampler, noise, label, keys, index, choose_fn))
        if progress_fn is not None:
            progress_fn(len(index))
    items = Items(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return with_null(items, model.num_classes) if null and model.null_class else items


def trajectory_items(
    denoise_fn: Callable,
    sampler: diffusion.Sampler,
    noise: Any,
    label: Any,
    keys: Any,
    index: Int[np.ndarray, " B"],
    choose_fn: ChooseFn,
) -> Items:
    """Returns the chosen steps of the trajectories from `noise`, sample by sample."""
    _, (x, timestep) = diffusion.sample_trajectory(
        denoise_fn, sampler, noise, label, keys, collect_fn=model_inputs
    )
    x, timestep = np.asarray(x), np.asarray(timestep, np.float32)
    steps = choose_fn(index, len(timestep))
    column = np.repeat(np.arange(len(index)), steps.shape[1])
    flat = steps.reshape(-1)
    return Items(x[flat, column], timestep[flat], np.asarray(label)[column], index[column])


def with_null(items: Items, null_label: int) -> Items:
    """Returns every item twice: as it is, then with the null class."""
    null = items._replace(label=np.full_like(items.label, null_label))
    return Items(*(np.concatenate(pair) for pair in zip(items, null, strict=True)))
