"""`--weight-timesteps`: how much inputs count by their timestep, measured before `quantize` rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qdit_jax.files import PathLike

if TYPE_CHECKING:
    from qdit_jax.calibration import TimestepWeights
    from qdit_jax.recipes import Recipe
    from qdit_jax.types import Condition


def timestep_weights(
    path: PathLike,
    recipe: Recipe,
    *,
    num_steps: int,
    guidance: Any,
    seed: int,
    batch_size: int,
    stats: PathLike | None,
    conditions: Condition = None,
    shape: Sequence[int] | None = None,
) -> TimestepWeights:
    """Returns the measured weights of the timesteps, and prints their range.

    Args:
        path: of the full-precision checkpoint.
        guidance: ignored without a null class.
        stats: a file of statistics, which static activations need.
        conditions, shape: of the samples, see `Rollouts`.
    """
    import jax

    from qdit_jax.allocation import Rollouts, measured_timestep_weights
    from qdit_jax.calibration import Stats
    from qdit_jax.cli.checkpoints import diffusion_checkpoint
    from qdit_jax.cli.progress import Bar

    checkpoint = diffusion_checkpoint(path)
    rollouts = Rollouts(
        num_steps=num_steps,
        guidance=guidance,
        num_batches=1,
        batch_size=batch_size,
        conditions=conditions,
        shape=shape,
    )
    with Bar(num_steps, "rollout", "measuring timesteps") as bar:
        weights = measured_timestep_weights(
            checkpoint,
            jax.random.key(seed),
            recipe=recipe,
            rollouts=rollouts,
            stats=None if stats is None else Stats.load(stats),
            progress_fn=bar.tell,
        )
    least, most = min(weights.weights), max(weights.weights)
    print(
        f"inputs count {least:.3g} to {most:.3g} by their timestep, the most at timestep "
        f"{weights.timesteps[weights.weights.index(most)]:g}"
    )
    return weights
