"""`qdit quantize`: a checkpoint in, a smaller one out."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from qdit_jax.cli.paths import path_option
from qdit_jax.cli.quantize_rounding import (
    RANGES,
    add_rounding_options,
    range_named,
    round_on_inputs,
    with_authors_ranges,
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
  qdit quantize xl2 out --recipe w4a8 --rounding gptq --range mse --num-samples 64
  qdit quantize xl2 out --recipe w4a8 --rounding gptq-authors --adaln w4a16
  qdit quantize xl2 out --recipe w4a8 --adaln w8a8 --embedders w8a8 --final w8a8 --attention w16a8
  qdit quantize xl2 out --recipe w4a8 --act-mode static-per-timestep --stats stats.npz

Rounding to nearest takes one layer after another from CKPT to OUT, and memory holds the largest
layer, not the network. --rounding other than nearest holds the network: it samples trajectories with
the checkpoint and runs the network once for every block, earlier blocks quantised; each layer is
checked on held-out trajectories and keeps rounding to nearest where that is better.
"""

ACT_MODES = ("dynamic", "static", "static-per-timestep")
PRESET_OPTIONS = (
    "group_size", "act_group_size", "layers", "range", "adaln", "embedders", "final", "attention",
)  # fmt: skip


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="quantise a checkpoint",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=path_option, help="a checkpoint folder")
    parser.add_argument("out", metavar="OUT", type=path_option, help="the folder to write")
    parser.add_argument(
        "--recipe", required=True, help="w4a8, w6a8, w8a8, ... (w<bits>a<bits>), or a recipe.json"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        help="input channels a scale; 0 is the whole channel (default 128)",
    )
    parser.add_argument(
        "--act-group-size", type=int, help="of the activations; the weights' if absent"
    )
    parser.add_argument("--symmetric", action="store_true", help="no zero points")
    parser.add_argument(
        "--range", metavar="RULE", help=f"of the weights: {', '.join(RANGES)} (default minmax)"
    )
    parser.add_argument("--act-mode", choices=ACT_MODES, default="dynamic")
    parser.add_argument("--layers", help="regular expression of the layers a preset quantises")
    for part in ("adaln", "embedders", "final"):
        parser.add_argument(f"--{part}", metavar="WxAy", help=f"quantise {part} too, as w8a8")
    parser.add_argument(
        "--attention", metavar="W16Ay", help="quantise q, k, v and softmax too, as w16a8"
    )
    parser.add_argument(
        "--shifted-gelu", action="store_true", help="unsigned codes for the inputs of fc2"
    )
    parser.add_argument(
        "--stats", type=path_option, help="from `qdit calibrate`; static activations need it"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    add_rounding_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import qdit_jax as qdit
    from qdit_jax.checkpoint import num_bytes, open_checkpoint
    from qdit_jax.files import as_path, check_free, check_space
    from qdit_jax.ptq import deferred_quantization, quantize_checkpoint, sqnr_db

    if not args.dry_run:
        inputs = [args.checkpoint, args.stats, args.items]
        if as_path(args.recipe).exists():
            inputs.append(as_path(args.recipe))
        check_free(args.out, args.force, "checkpoint", inputs)
    checkpoint = open_checkpoint(args.checkpoint)  # which reads no array
    recipe = recipe_of(args, checkpoint.params)
    plans = {p.path: p for p in qdit.plan(checkpoint.params, recipe)}
    needs_stats = any(rule.spec.act and rule.spec.act.mode == "static" for rule in recipe.rules)
    if needs_stats and not args.dry_run and args.stats is None:
        raise qdit.UserError("static activations need --stats FILE from `qdit calibrate`.")
    width = max(map(len, plans), default=10)
    title = "error, dB" if args.rounding == "nearest" or args.dry_run else "output error, dB"
    print(f"{'layer':{width}}  {'K x N':>11}  weights   inputs    bytes before     after  {title}")

    def show(path: str, error: str) -> None:
        plan = plans[path]
        shape = f"{plan.shape[0]} x {plan.shape[1]}"
        print(
            f"{path:{width}}  {shape:>11}  {describe(plan.spec.weight):8}  {describe(plan.spec.act):8}"
            f"  {plan.bytes_before:12,}  {plan.bytes_after:8,}  {error:>9}",
            flush=True,
        )

    if args.dry_run:
        for path in plans:
            show(path, "-")
        print_totals(plans.values(), checkpoint.params)
        return
    stats = None if args.stats is None else qdit.Stats.load(args.stats)
    if args.rounding == "nearest":
        written = quantize_checkpoint(
            args.checkpoint,
            args.out,
            recipe=recipe,
            stats=stats,
            on_layer=lambda path, w, q: show(path, f"{sqnr_db(w, q):.1f}"),
            overwrite=args.force,
        )
    else:
        planned = deferred_quantization(checkpoint.params, recipe=recipe, stats=stats)
        check_space(args.out, num_bytes(dataclasses.replace(checkpoint, params=planned)))
        written = rounded_checkpoint(args, checkpoint, recipe, stats, show)
        qdit.save(args.out, written, overwrite=args.force)
    print_totals(plans.values(), written.params)
    print(f"wrote {args.out}")


def rounded_checkpoint(
    args: argparse.Namespace,
    checkpoint: Any,
    recipe: Any,
    stats: Any,
    show: Callable[[str, str], None],
) -> Any:
    """Returns the checkpoint rounded on calibration inputs, in memory, showing every layer."""
    from qdit_jax.checkpoint import materialized

    whole = materialized(checkpoint)
    params = round_on_inputs(args, whole, recipe, stats, show)
    metadata = {
        **checkpoint.metadata,
        "quantized_from": str(args.checkpoint),
        "rounding": args.rounding,
    }
    return dataclasses.replace(whole, params=params, recipe=recipe, metadata=metadata)


def recipe_of(args: argparse.Namespace, params: Any) -> Any:
    """Returns the recipe that `--recipe` names, a preset or a file.

    Raises:
        UserError: if options of a preset accompany a file.
    """
    import qdit_jax as qdit
    from qdit_jax.files import as_path
    from qdit_jax.recipes import BLOCK_LINEARS, PARTS

    if args.recipe.endswith(".json") or as_path(args.recipe).exists():
        given = [name for name in PRESET_OPTIONS if getattr(args, name) is not None]
        if given or args.symmetric or args.shifted_gelu or args.act_mode != "dynamic":
            raise qdit.UserError(
                f"--recipe {args.recipe} is a file: options such as --group-size belong "
                "to presets like w4a8; write them into the file."
            )
        return qdit.Recipe.from_json(args.recipe)
    options = {
        "group_size": 128 if args.group_size is None else args.group_size,
        "symmetric": args.symmetric,
        "act_group_size": args.act_group_size,
        "act_mode": args.act_mode.split("-")[0],
        "per_timestep": args.act_mode == "static-per-timestep",
        "range_fn": range_named(args.range or "minmax"),
    }
    recipe = qdit.Recipe.preset(args.recipe, layers=args.layers or BLOCK_LINEARS, **options)
    for part in PARTS:
        if (name := getattr(args, part)) is not None:
            recipe = recipe.with_part(part, name, **options)
    if args.rounding == "gptq-authors" and args.range is None:
        recipe = with_authors_ranges(recipe)
    if args.shifted_gelu:
        recipe = recipe.with_shifted_gelu(params)
    recipe.resolve(params)
    return recipe


def describe(spec: Any) -> str:
    """Returns a spec in few letters, such as `4b g128`."""
    if spec is None:
        return "-"
    return f"{spec.bits}b g{spec.group_size}" + ("s" if spec.symmetric else "")


def print_totals(plans: Any, params: Any) -> None:
    import jax

    before = sum(plan.bytes_before for plan in plans)
    after = sum(plan.bytes_after for plan in plans)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(
        f"{len(plans)} layers: {before:,} -> {after:,} bytes by the formula "
        f"({before / max(after, 1):.2f}x smaller); all parameters now {held:,} bytes"
    )
