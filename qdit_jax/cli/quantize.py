"""`qdit quantize`: a checkpoint in, a smaller one out."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from qdit_jax.cli.options import verb_parser
from qdit_jax.cli.paths import path_option
from qdit_jax.cli.quantize_options import (
    PresetOptions,
    add_method_options,
    add_preset_options,
    recipe_of,
)
from qdit_jax.files import PathLike

HELP = """\
Quantize a checkpoint's linear layers in groups of input channels.

The weights are stored as packed codes with one scale (and zero point) per group; the activations are
quantized while the network runs, per token and group. The new checkpoint needs no other file.

examples:
  qdit quantize xl2 xl2-w4a8 --recipe w4a8 --group-size 128
  qdit quantize xl2 xl2-w8a8 --recipe w8a8 --group-size 0       # one scale a channel
  qdit quantize xl2 xl2-all --recipe w4a8-all                   # every layer and label table
  qdit quantize xl2 out --recipe recipe.json                    # per-layer settings
  qdit quantize xl2 out --recipe w4a8 --dry-run                 # the plan only, writes nothing
  qdit quantize xl2 out --recipe w4a8 --method gptq --range mse --num-samples 64
  qdit quantize xl2 out --recipe w4a8 --method qdit_release --adaln w4a16
  qdit quantize xl2 out --recipe w4a8 --adaln w8a8 --embedders w8a8 --final w8a8 --attention w16a8
  qdit quantize xl2 out --recipe w4a8 --act-mode static-per-timestep --stats stats.npz

Rounding to nearest (rtn) takes one layer after another from CKPT to OUT, and memory holds the
largest layer, not the network. The other methods hold the network: they sample trajectories with
the checkpoint and run the network once for every block, earlier blocks quantized; each layer is
checked on held-out trajectories and keeps rounding to nearest where that is better.
"""


def add_parser(subparsers: Any) -> None:
    """Adds the verb with its options."""
    parser = verb_parser(subparsers, "quantize", HELP)
    parser.add_argument("checkpoint", metavar="CKPT", type=path_option, help="a checkpoint folder")
    parser.add_argument("out", metavar="OUT", type=path_option, help="the folder to write")
    parser.add_argument(
        "--recipe",
        required=True,
        help="w4a8, w6a8, w8a8, ... (w<bits>a<bits>), w4a8-all for every layer, or a recipe.json",
    )
    add_preset_options(parser)
    parser.add_argument(
        "--stats", type=path_option, help="from `qdit calibrate`; static activations need it"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    add_method_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the plan and carries it out; returns the bytes before and after."""
    import qdit_jax as qdit
    from qdit_jax.checkpoint import open_checkpoint
    from qdit_jax.cli import quantize_table as table
    from qdit_jax.cli.progress import Bar
    from qdit_jax.cli.quantize_checks import check_options
    from qdit_jax.files import as_path, check_free
    from qdit_jax.methods import method_named
    from qdit_jax.sampling import check_diffusion_model

    if not args.dry_run:
        inputs = [args.checkpoint, args.stats, args.items]
        if as_path(args.recipe).exists():
            inputs.append(as_path(args.recipe))
        check_free(args.out, args.force, "checkpoint", inputs)
    checkpoint = open_checkpoint(args.checkpoint)  # which reads no array
    check_diffusion_model(checkpoint.model, args.checkpoint)
    recipe = recipe_of(args.recipe, PresetOptions.of(vars(args)), args.method, checkpoint.params)
    check_options(vars(args), recipe)
    if args.stats is None and not args.dry_run:
        check_dynamic(recipe)
    plans = {plan.path: plan for plan in qdit.plan(checkpoint.params, recipe)}
    rows = list(plans.values())
    learns = bool(method_named(args.method).needs) and not args.dry_run
    print(table.header(rows, table.OUTPUT_RATIO if learns else table.WEIGHT_RATIO))

    def show(path: str, ratio: str) -> None:
        print(table.row(plans[path], rows, ratio), flush=True)

    if args.dry_run:
        for path in plans:
            show(path, "-")
        return told(table.totals(rows, checkpoint.params), recipe, checkpoint.params)
    data = data_of(args.items if learns else None, args.stats, vars(args))
    with Bar(0, "batch", "rounding") as bar:
        written = qdit.quantize(
            args.checkpoint,
            args.method,
            recipe,
            data=data,
            out=args.out,
            overwrite=args.force,
            on_layer=lambda layer: show(layer.path, errors(layer)),
            on_note=print,
            on_total=bar.expect,
            progress_fn=bar.update,
        )
    folders = {"before": args.checkpoint, "after": args.out}
    totals = table.totals(rows, checkpoint.params, written.params, folders)
    found = told(totals, recipe, checkpoint.params)
    print(f"wrote {args.out}")
    return {"out": args.out, "method": args.method, **found}


def told(found: dict[str, Any], recipe: Any, params: Any) -> dict[str, Any]:
    """Prints the totals and what was left; returns both."""
    from qdit_jax.cli import quantize_table as table

    print(table.totals_text(found))
    if (line := table.left_text(recipe, params)) is not None:
        print(line)
    left = recipe.operands_left(params)
    return {"recipe": recipe.name, **found, "attention_operands_left": left}


def errors(layer: Any) -> str:
    """Returns a layer's errors in dB as its line of the table shows them."""
    warning = "" if layer.warning is None else f"  ! {layer.warning}"
    if layer.nearest_db is None:
        return f"{layer.error_db:.1f}".rjust(9) + warning
    kept = "  kept nearest" if layer.fell_back else ""
    return f"{layer.nearest_db:.1f} -> {layer.error_db:.1f}{kept}{warning}"


def data_of(items: PathLike | None, stats: PathLike | None, settings: Mapping[str, Any]) -> Any:
    """Returns what a method learns from: files, or how to sample it."""
    import qdit_jax as qdit
    from qdit_jax.calibration import Items

    names = ("seed", "num_samples", "guidance", "batch_size", "holdout", "stages")
    return qdit.CalibrationData(
        items=None if items is None else Items.load(items),
        stats=None if stats is None else qdit.Stats.load(stats),
        num_steps=settings["steps"],
        **{name: settings[name] for name in names},
    )


def check_dynamic(recipe: Any) -> None:
    """Raises `UserError` if the recipe has static activations, which need statistics."""
    import qdit_jax as qdit

    if any(rule.spec.act and rule.spec.act.mode == "static" for rule in recipe.rules):
        raise qdit.UserError("static activations need --stats FILE from `qdit calibrate`.")
