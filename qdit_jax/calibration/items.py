"""Inputs of single network calls from sampling trajectories, as calibration data for rounding.

Dimensions: I items, B batch, S steps, M items of one trajectory, H, W, C one latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int

from qdit_jax import diffusion
from qdit_jax.calibration.parts import Parts
from qdit_jax.calibration.recording import default_sampler, model_inputs
from qdit_jax.checkpoint import Checkpoint, fingerprint
from qdit_jax.errors import UserError, check_counts
from qdit_jax.files import PathLike, as_path, write_arrays
from qdit_jax.models import null_condition_of, with_guidance, without_null
from qdit_jax.processes import ALONE, Processes
from qdit_jax.quant import check_finite
from qdit_jax.sampling import (
    PUBLISHED,
    Guidance,
    check_diffusion_model,
    check_seed,
    check_takes,
    cyclic_conditions,
    denoiser,
    fitting_guidance,
    initial_noise,
    params_in_place,
    sampler_timesteps,
    shape_of_sample,
)
from qdit_jax.types import Condition, Key, ProgressFn, untold

# `(sample numbers [B], S) -> steps [B, M]`: which iterations a trajectory's items come from.
ChooseFn = Callable[[Int[np.ndarray, " B"], int], Int[np.ndarray, "B M"]]


# Names in files of earlier versions.
EARLIER_NAMES = {"label": "condition"}
UNCONDITIONAL = "unconditional"  # in a file in place of conditions


class Items(NamedTuple):
    """Arguments of single calls of the network; `sample` is the trajectory each comes from.

    `condition` is a pytree of arrays with I as first axis: labels, or a dict by name; None if the
    network takes none.
    """

    x: Float[np.ndarray, "I *shape"]
    timestep: Float[np.ndarray, " I"]
    condition: Condition
    sample: Int[np.ndarray, " I"]

    def save(self, path: PathLike) -> None:
        """Writes an `.npz` with one array per field, a dict's as `condition/<name>`."""
        write_arrays(path, arrays_of(self), "inputs")

    @classmethod
    def load(cls, path: PathLike) -> Items:
        """Returns the items in a file; raises `UserError` if it holds none."""
        try:
            with as_path(path).open("rb") as file, np.load(file) as data:
                items = items_of({EARLIER_NAMES.get(name, name): data[name] for name in data.files})
            check_items(items)
            return items
        except (OSError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} holds no calibration inputs ({error}); write them with "
                "`qdit calibrate CKPT FILE --collect spread`."
            ) from error

    def only(self, chosen: Bool[np.ndarray, " I"]) -> Items:
        """Returns the items that are chosen."""
        return jax.tree.map(lambda leaf: leaf[chosen], self)

    def taken(self, index: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray, Condition]:
        """Returns x, timestep and condition of the items `index`, a slice or numbers."""
        condition = jax.tree.map(lambda leaf: leaf[index], self.condition)
        return self.x[index], self.timestep[index], condition


def arrays_of(items: Items) -> dict[str, np.ndarray]:
    """Returns the arrays of items by the names that they have in a file."""
    named = items._asdict()
    if items.condition is None:
        del named["condition"]
        named[UNCONDITIONAL] = np.array(True)
    return flatten_dict(named, sep="/")


def items_of(arrays: dict[str, np.ndarray]) -> Items:
    """Returns the items of such arrays."""
    flat: dict[str, Any] = dict(arrays)
    if flat.pop(UNCONDITIONAL, False):
        flat["condition"] = None
    return Items(**unflatten_dict(flat, sep="/"))


def check_items(items: Items) -> None:
    """Raises `ValueError` unless `items` are finite, of one length, and at least one."""
    named = flatten_dict({k: v for k, v in items._asdict().items() if v is not None}, sep="/")
    counts = {name: np.shape(array)[:1] for name, array in named.items()}
    if len(set(counts.values())) != 1 or counts["x"] in ((), (0,)):
        lengths = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(
            f"calibration inputs need one or more of equal number; these are {lengths}"
        )
    for name in ("x", "timestep"):
        check_finite(f"calibration inputs: {name}", getattr(items, name))


def spread_steps(num_items: int = 4) -> ChooseFn:
    """Returns the choice of `num_items` steps evenly spread over a trajectory, shifted by sample.

    Whatever the number of samples, all parts of the trajectory are seen equally often.
    """
    check_counts(num_items=num_items)

    def choose(index: np.ndarray, num_steps: int) -> np.ndarray:
        count = min(num_items, num_steps)
        # The fractions of multiples of the golden ratio fill [0, 1) evenly.
        offset = (index * 0.6180339887498949) % 1
        place = (np.arange(count) + offset[:, None]) / count
        return np.floor(place * num_steps).astype(np.int64)

    return choose


def qdit_release_steps(seed: int) -> ChooseFn:
    """Returns the choice of the Q-DiT release: one step per sample, no step twice in a batch.

    One NumPy `RandomState(seed)` is used for all batches, one after another.

    Raises:
        ValueError: when called, if a batch has more samples than the sampler has steps.
    """
    random = np.random.RandomState(check_seed(seed))

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
    key: Key,
    num_samples: int = 32,
    *,
    conditions: Condition = None,
    sampler: diffusion.Sampler | None = None,
    guidance: Guidance | None = PUBLISHED,
    batch_size: int = 16,
    shape: Sequence[int] | None = None,
    choose_fn: ChooseFn | None = None,
    null: bool = True,
    unfinished: PathLike | None = None,
    progress_fn: ProgressFn = untold,
    processes: Processes = ALONE,
) -> Items:
    """Returns items of the full-precision sampler's trajectories, `num_samples` of them.

    Each chosen step makes an item with the sample's condition and, with `null` and where the network
    has a null condition, one with that. The release's collection is `choose_fn=qdit_release_steps(seed)` with
    `null=False`: it never sees the null class.

    Args:
        key: used once; sample i starts from `fold_in(key, i)`.
        conditions: labels or prompts, assigned to the samples cyclically; every class by default.
        sampler: of the trajectories, see `calibrate`.
        shape: of one sample, channels last; the network's own by default.
        choose_fn: 4 steps of each trajectory, evenly spread, by default.
        unfinished: a folder of finished batches, from which a stopped call resumes. The caller deletes it.
        progress_fn: called with the number of samples finished, batch by batch.
        processes: that share the batches, each on its own devices; all need the same `unfinished` on a
            disk that they see, and all return the same.

    Raises:
        ValueError: if `num_samples` is not positive, or an input is not finite.
        UserError: if `unfinished` holds the batches of other settings.
    """
    check_diffusion_model(checkpoint.model)
    checkpoint = dataclasses.replace(checkpoint, params=params_in_place(checkpoint.params))
    check_counts(num_samples=num_samples, batch_size=batch_size)
    model = checkpoint.model
    guidance = fitting_guidance(model, guidance)
    sampler = default_sampler(checkpoint, shape=shape) if sampler is None else sampler
    choose_fn = spread_steps() if choose_fn is None else choose_fn
    denoise_fn = denoiser(model, checkpoint.params, guidance)
    check_takes(denoise_fn, model, shape, conditions)
    size = shape_of_sample(model, shape)
    batches = {
        start: np.arange(start, min(start + batch_size, num_samples))
        for start in range(0, num_samples, batch_size)
    }
    # In the order of the batches, whichever of them are computed here.
    num_steps = len(sampler_timesteps(sampler))
    steps = {start: choose_fn(index, num_steps) for start, index in batches.items()}

    def compute(start: int) -> dict[str, np.ndarray]:
        index = batches[start]
        condition = with_guidance(model, cyclic_conditions(model, conditions, index), guidance)
        noise, keys = initial_noise(key, jnp.asarray(index, jnp.int32), size)
        found = trajectory_items(denoise_fn, sampler, noise, condition, keys, index, steps[start])
        return arrays_of(found)

    folder, settings = None, {}
    if unfinished is not None:
        folder = as_path(unfinished)
        settings = fingerprint(
            params=checkpoint.params,
            model=model,
            sampler=sampler,
            key=key,
            num_samples=num_samples,
            guidance=guidance,
            batch_size=batch_size,
            conditions=conditions,
            shape=size,
            steps=list(steps.values()),
        )
    parts = Parts(folder, settings, compute, processes, progress_fn)
    finished = []
    for start, arrays in parts.joined(list(batches), num_samples):
        parts.keep(start, arrays)
        finished.append(items_of(arrays))
    items = joined(finished)
    given = items.condition
    items = items._replace(condition=without_null(given))
    check_items(items)
    if not (null and model.has_null):
        return items
    found = null_condition_of(model, checkpoint.params, given)
    return joined([items, items._replace(condition=jax.tree.map(np.asarray, found))])


def joined(parts: Sequence[Items]) -> Items:
    """Returns the items of all parts, one after another."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def trajectory_items(
    denoise_fn: Callable[..., Array],
    sampler: diffusion.Sampler,
    noise: Float[Array, "B ..."],
    condition: Condition,
    keys: Key | None,
    index: Int[np.ndarray, " B"],
    steps: Int[np.ndarray, "B M"],
) -> Items:
    """Returns the chosen steps of the trajectories from `noise`, sample by sample."""
    final, seen_by_model = diffusion.sample_trajectory(
        denoise_fn, sampler, noise, condition, keys, collect_fn=model_inputs
    )
    check_finite("the samples of the network that items are drawn from", final)
    x, timestep = (np.asarray(a) for a in seen_by_model)
    timestep = timestep.astype(np.float32)
    column = np.repeat(np.arange(len(index)), steps.shape[1])
    flat = steps.reshape(-1)
    seen = jax.tree.map(lambda leaf: np.asarray(leaf)[column], condition)
    return Items(x[flat, column], timestep[flat], seen, index[column])
