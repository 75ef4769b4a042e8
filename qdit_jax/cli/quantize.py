"""`qdit quantize`: a checkpoint in, a smaller one out."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qdit_jax.cli.quantize_options import (
    PresetOptions,
    add_method_options,
    add_preset_options,
    recipe_of,
)

HELP = """\
Quantise a checkpoint's linear layers in groups of input channels.

The weights are stored as packed codes with one scale (and zero point) a group; the activations are
quantised while the network runs, per token and group. The new checkpoint needs no other file.

examples:
  qdit quantize xl2 xl2-w4a8 --recipe w4a8 --group-size 128
  qdit quantize xl2 xl2-w8a8 --recipe w8a8 --group-size 0       # one scale a channel
  qdit quantize xl2 out --recipe recipe.json                    # per-layer settings
  qdit quantize xl2 out --recipe w4a8 --dry-run                 # the plan only, writes nothing
  qdit quantize xl2 out --recipe w4a8 --method gptq --range mse --num-samples 64
  qdit quantize xl2 out --recipe w4a8 --method qdit_release --adaln w4a16
  qdit quantize xl2 out --recipe w4a8 --adaln w8a8 --embedders w8a8 --final w8a8 --attention w16a8
  qdit quantize xl2 out --recipe w4a8 --act-mode static-per-timestep --stats stats.npz

Rounding to nearest (rtn) takes one layer after another from CKPT to OUT, and memory holds the
largest layer, not the network. The other methods hold the network: they sample trajectories with
the checkpoint and run the network once for every block, earlier blocks quantised; each layer is
checked on held-out trajectories and keeps rounding to nearest where that is better.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="quantise a checkpoint",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a checkpoint folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument(
        "--recipe", required=True, help="w4a8, w6a8, w8a8, ... (w<bits>a<bits>), or a recipe.json"
    )
    add_preset_options(parser)
    parser.add_argument(
        "--stats", type=Path, help="from `qdit calibrate`; static activations need it"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    add_method_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import qdit_jax as qdit
    from qdit_jax.checkpoint import open_checkpoint
    from qdit_jax.files import check_free
    from qdit_jax.methods import method_named

    if not args.dry_run:
        check_free(args.out, args.force)
    checkpoint = open_checkpoint(args.checkpoint)  # which reads no array
    options = PresetOptions.of(vars(args))
    recipe = recipe_of(args.recipe, options, args.method, checkpoint.params)
    plans = {plan.path: plan for plan in qdit.plan(checkpoint.params, recipe)}
    if args.stats is None and not args.dry_run:
        check_dynamic(recipe)
    learns = bool(method_named(args.method).needs) and not args.dry_run
    show = table_printer(plans, "output error, dB" if learns else "error, dB")
    if args.dry_run:
        for path in plans:
            show(path, "-")
        print_totals(plans.values(), checkpoint.params)
        return
    data = data_of(args.items if learns else None, args.stats, vars(args))
    with progress_bar(learns) as bar:
        written = qdit.quantize(
            args.checkpoint,
            args.method,
            recipe,
            data=data,
            out=args.out,
            overwrite=args.force,
            on_layer=lambda layer: show(layer.path, errors(layer)),
            on_note=print,
            on_total=bar.reset,
            progress_fn=bar.update,
        )
    print_totals(plans.values(), written.params)
    print(f"wrote {args.out}")


def progress_bar(shown: bool) -> Any:
    """Returns a bar of the network's batches, on a terminal and where there are any."""
    from tqdm import tqdm

    return tqdm(unit="batch", disable=None if shown else True)


def errors(layer: Any) -> str:
    """Returns a layer's errors in dB as its line of the table shows them."""
    if layer.nearest_db is None:
        return f"{layer.error_db:.1f}"
    kept = "  kept nearest" if layer.fell_back else ""
    return f"{layer.nearest_db:.1f} -> {layer.error_db:.1f}{kept}"


def data_of(items: Path | None, stats: Path | None, settings: Mapping[str, Any]) -> Any:
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


def table_printer(plans: dict[str, Any], title: str) -> Callable[[str, str], None]:
    """Prints the table's head; returns `(path, error)`, which prints one layer's line."""
    width = max(map(len, plans), default=10)
    print(f"{'layer':{width}}  {'K x N':>11}  weights   inputs    bytes before     after  {title}")

    def show(path: str, error: str) -> None:
        plan = plans[path]
        shape = f"{plan.shape[0]} x {plan.shape[1]}"
        print(
            f"{path:{width}}  {shape:>11}  {describe(plan.spec.weight):8}  {describe(plan.spec.act):8}"
            f"  {plan.bytes_before:12,}  {plan.bytes_after:8,}  {error:>9}",
            flush=True,
        )

    return show


def describe(spec: Any) -> str:
    """Returns a spec in few letters, such as `4b g128`."""
    if spec is None:
        return "-"
    return f"{spec.bits}b g{spec.group_size}" + ("s" if spec.symmetric else "")


def print_totals(plans: Iterable[Any], params: Any) -> None:
    import jax

    plans = list(plans)
    before = sum(plan.bytes_before for plan in plans)
    after = sum(plan.bytes_after for plan in plans)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(
        f"{len(plans)} layers: {before:,} -> {after:,} bytes by the formula "
        f"({before / max(after, 1):.2f}x smaller); all parameters now {held:,} bytes"
    )
