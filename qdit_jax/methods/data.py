"""What a method learns from: calibration data, and how they are collected where they are absent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdit_jax.calibration import (
    PUBLISHED,
    Items,
    Stats,
    TimestepWeights,
    collect_items,
    default_sampler,
    guidance_record,
    own_guidance,
    qdit_release_steps,
)
from qdit_jax.checkpoint import Checkpoint, digest
from qdit_jax.diffusion import Sampler
from qdit_jax.files import PathLike
from qdit_jax.types import UNSAID, ProgressFn, untold

# Called with the number of samples finished, batch by batch.
HOLDOUT = 0.25  # the share of trajectories that are held out by default
STAGE_NAMES = ("block", "layer")
# Plain settings of how a method is fitted, and of how its data are sampled.
FIT = ("batch_size", "holdout", "stages")
SAMPLE = ("num_samples", "num_steps", "seed")


@dataclasses.dataclass(frozen=True)
class CalibrationData:
    """Inputs of a network, or how to sample them from its own trajectories.

    Attributes:
        items: single inputs, from `collect_items`; sampled if the method needs them and they are None.
        stats: ranges of the layers' inputs, from `calibrate`; static activations need them.
        key: of the trajectories; None makes it from `seed`.
        seed: also of the steps that the Q-DiT release draws.
        conditions: labels or prompts that the samples take in turn; None is every class.
        shape: of one sample, channels last; None is the network's own.
        num_samples: trajectories to sample.
        num_steps: of a trajectory, where `sampler` is None: DDIM, or the flow of a velocity model.
        sampler: of the trajectories.
        guidance: of the trajectories; `"published"` is the network's own; ignored without a null class.
        batch_size: samples and items in one call of the network.
        holdout: the share of trajectories on which each layer is compared with rounding to nearest;
            None is the method's own (0.25; 0 in the release).
        stages: how much is rounded between two runs of the network, `"block"` or `"layer"`; None is
            the method's own.
        dtype: that the network computes in while inputs are sampled and fitted; None leaves it.
        timestep_weights: how much items count by their timestep, for methods that round by Hessians
            (gptq and those like it); all the same if None. `allocation.measured_timestep_weights`
            measures them.
        unfinished: a folder where a method that learns block by block keeps finished blocks, to
            resume from, those of experts in folders by their names; the caller deletes it.
    """

    items: Items | None = None
    stats: Stats | None = None
    key: Any = None
    seed: int = 0
    conditions: Any = None
    num_samples: int = 32
    num_steps: int = 50
    sampler: Sampler | None = None
    guidance: Any = PUBLISHED
    batch_size: int = 8
    holdout: float | int | None = None
    stages: str | None = None
    dtype: str | None = None
    timestep_weights: TimestepWeights | None = None
    unfinished: PathLike | None = None
    shape: Sequence[int] | None = dataclasses.field(default=None, metadata=UNSAID)

    def __post_init__(self) -> None:
        """Raises `ValueError` for a setting that cannot be."""
        for name in ("num_samples", "num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")
        if self.stages not in (None, *STAGE_NAMES):
            raise ValueError(
                f"stages={self.stages!r} is not known; use one of {', '.join(STAGE_NAMES)}."
            )
        if self.holdout is not None and not 0 <= self.holdout < 1:
            raise ValueError(f"holdout={self.holdout} is not a share; use a number from 0 up to 1.")

    def to_json(self, *, fitted: bool, sampled: bool) -> dict[str, Any]:
        """Returns what a method learned from as JSON-able values.

        Args:
            fitted: whether it learned from anything.
            sampled: whether that was sampled by these settings.
        """
        names = FIT * fitted + SAMPLE * sampled
        settings = {name: getattr(self, name) for name in names}
        settings |= {"dtype": self.dtype} if fitted else {}
        if sampled:
            settings |= {"guidance": str(guidance_record(self.guidance))}
            settings |= {} if self.shape is None else {"shape": list(self.shape)}
            settings |= {} if self.conditions is None else {"conditions": digest(self.conditions)}
            settings |= {} if self.key is None else {"key": key_words(self.key)}
            if self.sampler is not None:
                settings |= {"sampler": type(self.sampler).__name__, "num_steps": None}
        if self.items is not None and fitted:
            settings |= {"num_items": len(self.items.x)}
        if self.timestep_weights is not None:
            settings |= {"timestep_weights": self.timestep_weights.to_json()}
        settings |= {"sampled": sampled, "stats": self.stats is not None}
        return {name: value for name, value in settings.items() if value is not None}


def with_own_guidance(checkpoint: Checkpoint, data: CalibrationData) -> CalibrationData:
    """Returns data with the network's own guidance, where it is left to that."""
    if data.guidance != PUBLISHED:
        return data
    return dataclasses.replace(data, guidance=own_guidance(checkpoint.model))


def key_words(key: Any) -> list[int]:
    """Returns the words of a random key."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(key) if typed else key).reshape(-1).tolist()


def spread_items(
    checkpoint: Checkpoint,
    data: CalibrationData,
    progress_fn: ProgressFn = untold,
    **shared: Any,
) -> Items:
    """Returns items of evenly spread steps of each trajectory, conditional and null.

    `shared` are `unfinished` and `processes` of `collect_items`.
    """
    return sampled_items(checkpoint, data, shared, progress_fn)


def qdit_release_items(
    checkpoint: Checkpoint,
    data: CalibrationData,
    progress_fn: ProgressFn = untold,
    **shared: Any,
) -> Items:
    """Returns the items of the Q-DiT release: one step per sample, never the null class.

    `shared` are `unfinished` and `processes` of `collect_items`.
    """
    options = {"choose_fn": qdit_release_steps(data.seed), "null": False, **shared}
    return sampled_items(checkpoint, data, options, progress_fn)


def sampled_items(
    checkpoint: Checkpoint,
    data: CalibrationData,
    options: dict[str, Any],
    progress_fn: ProgressFn,
) -> Items:
    """Returns items of the checkpoint's trajectories; `options` are of `collect_items`."""
    sampler, batch_size = data.sampler, data.batch_size
    if sampler is None:
        sampler = default_sampler(checkpoint, data.num_steps, data.shape)
        batch_size = min(batch_size, data.num_steps)
    return collect_items(
        checkpoint,
        jax.random.fold_in(jax.random.key(data.seed), 2) if data.key is None else data.key,
        data.num_samples,
        conditions=data.conditions,
        sampler=sampler,
        guidance=data.guidance,
        batch_size=batch_size,
        shape=data.shape,
        progress_fn=progress_fn,
        **options,
    )
