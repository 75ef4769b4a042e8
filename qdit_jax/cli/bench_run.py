"""The work of `qdit bench`, once its options are read."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from qdit_jax.allocation import choice_options, search_space
from qdit_jax.checkpoint import Checkpoint, load
from qdit_jax.cli.bench_pictures import draw_bench
from qdit_jax.cli.bench_table import bench_lines, latency_lines
from qdit_jax.cli.checkpoints import full_precision_checkpoint
from qdit_jax.cli.guidance_option import guidance_of
from qdit_jax.cli.options import refuse_inert
from qdit_jax.cli.progress import Bar
from qdit_jax.cli.prompts_option import Inputs
from qdit_jax.cli.search_run import space_settings
from qdit_jax.errors import UserError
from qdit_jax.files import AnyPath, check_free, renewed_folder, replaced_file
from qdit_jax.kernels import NUMERICS
from qdit_jax.recipes import Recipe
from qdit_jax.sampling import check_diffusion_model, sample_rows
from qdit_jax.speed import (
    BATCH,
    RECIPES,
    Bench,
    bench,
    layer_table,
    recipe_named,
)
from qdit_jax.types import Condition


def recipes_of(options: Mapping[str, Any], checkpoint: Checkpoint) -> list[Recipe]:
    """Returns the recipes that were asked for, or `RECIPES`; none of a quantized checkpoint.

    Raises:
        UserError: if `--group-size` has no effect.
    """
    given = options["recipes"]
    size = options["group_size"]
    names = given or (() if checkpoint.recipe is not None else RECIPES)
    if size is not None and not any(takes_group_size(name) for name in names):
        raise UserError(f"--group-size {size} has no effect: every recipe says its own.")
    return [recipe_named(name, size) for name in names]


def takes_group_size(name: str) -> bool:
    """Returns whether a recipe's name leaves the group size open."""
    return not name.endswith(".json") and "-g" not in name


def measured(options: Mapping[str, Any]) -> dict[str, Any]:
    """Measures, prints, writes to OUT if there is one, and returns everything."""
    out, force = options["out"], options["force"]
    inputs = [options["checkpoint"], options["against"], options["embeds"]]
    if out is not None:
        check_folder(out, force, inputs)
    with contextlib.ExitStack() as stack:
        folder = None
        if out is not None:
            folder = stack.enter_context(renewed_folder(out, force, "bench", inputs))
        result = timed(options, folder)
        print(*bench_lines(result), sep="\n")
        if folder is not None:
            with replaced_file(folder / "bench.png") as path:
                draw_bench(path, result)
    found = result.to_json()
    if out is not None:
        print(f"wrote {out}")
        found = {"out": out, **found}
    return found


def tabulated(options: Mapping[str, Any]) -> dict[str, Any]:
    """Times single layers, prints and writes the table, and returns it."""
    out, force = options["out"], options["force"]
    inputs = [options["checkpoint"], options["embeds"]]
    check_folder(out, force, inputs)
    with renewed_folder(out, force, "bench", inputs) as folder:
        told_to_resume(folder)
        checkpoint = full_precision_checkpoint(options["checkpoint"], "layers are timed in it")
        conditions = conditions_of(options, checkpoint)
        rows = sample_rows(checkpoint.model, None, conditions)
        space = search_space(checkpoint.params, rows=rows, **space_settings(options))
        [batch], [numerics] = options["batch"] or [BATCH], options["numerics"] or NUMERICS[:1]
        with Bar(0, "time", "measuring") as bar:
            found = layer_table(
                checkpoint,
                space,
                batch=batch,
                numerics=numerics,
                guidance=guidance_of(checkpoint, options["guidance"]),
                num_rounds=options["repeats"],
                seconds=options["seconds"],
                seed=options["seed"],
                conditions=conditions,
                state=folder,
                total_fn=bar.expect,
                progress_fn=bar.tell,
            )
        print(*latency_lines(found), sep="\n")
        print(remainder_text(found.step_ms, found.remainder(space)))
        with replaced_file(folder / "latency.json") as path:
            path.write_text(json.dumps(found.to_json(), indent=1) + "\n")
    asked = choice_options(spec for layer in space.layers for spec in layer.choices)
    print(
        f"wrote {out}: next, qdit search {options['checkpoint']} DIR --latency {out / 'latency.json'} "
        f"--budget latency=1.0x-g128 {asked}"
    )
    return {"out": out, "remainder_ms": found.remainder(space), **found.to_json()}


def remainder_text(step_ms: float, remainder_ms: float) -> str:
    """Returns a line on a step in full precision, and on times that cannot be."""
    text = (
        f"a step in full precision: {step_ms:.4g} ms, {remainder_ms:.4g} of it beside these layers"
    )
    if remainder_ms >= 0:
        return text
    return (
        f"{text}: the layers alone took longer, so something disturbed the machine; measure again"
    )


def told_to_resume(folder: AnyPath) -> None:
    """Says if there are measurements to go on from."""
    if (folder / "bench.json").exists():
        logging.getLogger("qdit_jax").info("resuming from %s", folder / "bench.json")


def check_folder(out: AnyPath, force: bool, inputs: Sequence[AnyPath | None]) -> None:
    """Raises `UserError` if `out` holds other things, or a finished bench and no `force`."""
    done = [name for name in ("bench.png", "latency.json") if (out / name).exists()]
    if done and not force:
        raise UserError(f"{out} holds a finished bench; pass --force to replace it.")
    check_free(out, True, "bench", inputs)


def conditions_of(options: Mapping[str, Any], checkpoint: Checkpoint) -> Condition:
    """Returns the conditions of `--embeds`; None without, which takes classes or random prompts."""
    if options["embeds"] is None:
        refuse_inert(options, {"prompts_from": None}, "it chooses prompts of --embeds")
        if isinstance(checkpoint.model.example_condition(1), Mapping):
            print("prompts: random embeddings of the network's own length, as no --embeds is given")
        return None
    return Inputs.of(options, checkpoint, options["checkpoint"]).conditions


def timed(options: Mapping[str, Any], folder: AnyPath | None) -> Bench:
    """Returns the times of steps, with a bar of the rows that are done."""
    if folder is not None:
        told_to_resume(folder)
    checkpoint = load(options["checkpoint"])
    check_diffusion_model(checkpoint.model, options["checkpoint"])
    conditions = conditions_of(options, checkpoint)
    recipes = recipes_of(options, checkpoint)
    with Bar(0, "row", "measuring") as bar:
        return bench(
            checkpoint,
            recipes if options["recipes"] else None,
            batches=options["batch"],
            against=options["against"],
            group_size=options["group_size"],
            numerics=options["numerics"] or NUMERICS,
            implementations=options["implementation"] or (),
            guidance=guidance_of(checkpoint, options["guidance"]),
            expand=options["expand"],
            num_rounds=options["repeats"],
            seconds=options["seconds"],
            seed=options["seed"],
            conditions=conditions,
            state=folder,
            total_fn=bar.expect,
            progress_fn=bar.tell,
        )
