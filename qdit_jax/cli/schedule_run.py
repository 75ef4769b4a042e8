"""The work of `qdit schedule`, once its options are read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from qdit_jax.allocation import ChosenSteps, Rollouts, choose_steps, level_text
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.cli.checkpoints import diffusion_checkpoint
from qdit_jax.cli.guidance_option import Given, guidance_of
from qdit_jax.cli.progress import Bar
from qdit_jax.cli.prompts_option import Inputs
from qdit_jax.cli.schedule_picture import draw_schedule, mean_text
from qdit_jax.errors import UserError
from qdit_jax.files import AnyPath, replaced_file
from qdit_jax.ptq import schedule_act_bits
from qdit_jax.quant import Level, QTensor, kernel_of_other
from qdit_jax.report import provenance
from qdit_jax.types import Params

SHOWN = 8  # candidates in the summary


def found_schedule(
    source: AnyPath,
    folder: AnyPath,
    *,
    mean_bits: float | None,
    act_bits: Sequence[int] | None,
    levels: Sequence[Level] | None,
    mean_bitops: float | None,
    num_steps: int,
    guidance: Given | None,
    dtype: str | None,
    num_batches: int,
    batch_size: int,
    seed: int,
    options: Mapping[str, Any],
) -> tuple[ChosenSteps, Checkpoint]:
    """Returns the chosen steps and the checkpoint that has them; `folder` keeps the state.

    Args:
        source: the quantized checkpoint's folder.
        guidance: None for the model's default.
        dtype: that the network computes in; None for the platform's own.
        options: those of conditions and sizes, see `Inputs`.

    Raises:
        UserError: if the checkpoint is in full precision.
        ValueError: as `choose_steps`.
    """
    checkpoint = diffusion_checkpoint(source, dtype)
    if checkpoint.recipe is None:
        raise UserError(
            f"{source} is in full precision; first `qdit quantize {source} DIR --recipe w4a4`."
        )
    if checkpoint.recipe.over_time is not None and levels is None:
        if checkpoint.recipe.over_time.weight_bits is not None:
            raise UserError(
                f"the weights of {source} change over time, which a schedule of activations "
                "alone would undo; choose both by --levels, or give a checkpoint whose weights do not."
            )
        checkpoint = schedule_act_bits(checkpoint, None)  # another one is to be found
    if any((folder / "steps").glob("[0-9]*")):
        logging.getLogger("qdit_jax").info("resuming from %s", folder / "steps")
    rollouts = Rollouts(
        num_steps=num_steps,
        guidance=guidance_of(checkpoint, guidance),
        num_batches=num_batches,
        batch_size=batch_size,
        state=folder / "steps",
        **Inputs.of(options, checkpoint, source).settings,
    )
    with Bar(0, "rollout", "measuring") as bar:
        chosen = choose_steps(
            checkpoint,
            jax.random.key(seed),
            mean_bits=mean_bits,
            act_bits=act_bits,
            levels=levels,
            mean_bitops=mean_bitops,
            rollouts=rollouts,
            progress_fn=bar.tell,
        )
    return chosen, schedule_act_bits(checkpoint, chosen.over_time)


def write_result(out: AnyPath, chosen: ChosenSteps, checkpoint: Checkpoint) -> None:
    """Writes history, picture and, last of all, recipe.json: where it exists, all is written."""
    recipe = checkpoint.recipe
    assert recipe is not None
    with replaced_file(out / "history.json") as path:
        history = {"schedule": chosen.to_json(), "made": provenance()}
        path.write_text(json.dumps(history, indent=1))
    with replaced_file(out / "schedule.png") as path:
        draw_schedule(path, chosen)
    with replaced_file(out / "recipe.json") as path:
        path.write_text(json.dumps(recipe.to_json(), indent=1))


def summary(chosen: ChosenSteps, checkpoint: Checkpoint) -> str:
    """Returns the schedule, the weights it holds and the candidates beside it in a few lines."""
    lines = [
        f"bits by step: {' '.join(map(level_text, chosen.by_step))} ({mean_text(chosen, chosen)})",
        f"error: measured {chosen.measured:.4g}, predicted by the sum {chosen.predicted:.4g}",
    ]
    if chosen.has_pairs:
        lines.append(held_text(checkpoint.params))
    lines.append(f"best of {len(chosen.candidates)} candidates:")
    lines += [
        f"  {row.measured:.4g}  {row.name} ({mean_text(chosen, row)}, predicted {row.predicted:.4g})"
        for row in chosen.candidates[:SHOWN]
    ]
    if np.isclose(chosen.measured, 0):
        lines.append("the most bits throughout fit the budget")
    return "\n".join(lines)


def held_text(params: Params) -> str:
    """Returns the bytes of the kernels, and of those of other bits that are held beside them."""
    own, others = 0, dict[int, int]()
    for path, leaf in flatten_dict(params, sep="/").items():
        if (other := kernel_of_other(path)) is not None:
            others[other[1]] = others.get(other[1], 0) + leaf.nbytes
        elif isinstance(leaf, QTensor) and path.split("/")[-1] == "kernel":
            own += leaf.nbytes
    beside = [f"those of w{bits} beside them {others[bits]:,}" for bits in sorted(others)]
    return ", ".join([f"bytes held: kernels {own:,}", *(beside or ["of no other bits"])])
