"""How a search samples its candidates, and where it keeps what it has measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qdit_jax import diffusion
from qdit_jax.allocation.rollouts import Rollout
from qdit_jax.calibration import default_sampler
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.errors import check_counts
from qdit_jax.files import PathLike
from qdit_jax.methods import CalibrationData
from qdit_jax.sampling import PUBLISHED, Guidance
from qdit_jax.types import UNSAID, Condition


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """How candidates are sampled, and where what that gave is kept.

    Attributes:
        sampler: of the rollouts; `num_steps` of the checkpoint's default one if None.
        conditions: labels or prompts, cycled over the samples; every class by default.
        guidance: of the rollouts; the network's own by default, see `sampling.own_guidance`.
        num_batches, batch_size: samples on which an assignment can be measured. The default
            strategy uses few for most and all of them for finalists; the others use all.
        num_calibration: batches for the sensitivities; their samples are different ones.
        num_probes: random directions per sample in which sensitivities are measured.
        per_device: items a device measures in one call.
        shape: of one sample, channels last; the network's own by default. Costs are of that size.
        data: what the transforms and branches of a search's space are fitted to, once at the start,
            as `qdit.quantize(..., method="best", data=data)` fits them afterwards; sampled by default.
        state: a folder that keeps what was measured and fitted; the same call resumes from it.
    """

    sampler: diffusion.Sampler | None = None
    num_steps: int = 20
    guidance: Guidance | None = PUBLISHED
    conditions: Condition = None
    num_batches: int = 16
    batch_size: int = 16
    num_calibration: int = 2
    num_probes: int = 8
    per_device: int = 1
    shape: Sequence[int] | None = dataclasses.field(default=None, metadata=UNSAID)
    data: CalibrationData | None = dataclasses.field(default=None, metadata=UNSAID)
    state: PathLike | None = dataclasses.field(default=None, metadata=UNSAID)

    def __post_init__(self) -> None:
        check_counts(
            num_steps=self.num_steps,
            num_batches=self.num_batches,
            batch_size=self.batch_size,
            num_calibration=self.num_calibration,
            num_probes=self.num_probes,
            per_device=self.per_device,
        )

    def rollout(self, checkpoint: Checkpoint, guided: bool) -> Rollout:
        """Returns the checkpoint's sampler as a function of the parameters."""
        sampler = self.sampler
        if sampler is None:
            sampler = default_sampler(checkpoint, self.num_steps, self.shape)
        return Rollout.of(checkpoint.model, sampler, self.guidance if guided else None)
