"""`qdit quantize`: a checkpoint in, a smaller one out."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from typing import Any

from qdit_jax.cli.options import verb_parser
from qdit_jax.cli.paths import path_option
from qdit_jax.cli.quantize_options import (
    add_method_options,
    add_preset_options,
    check_options,
    data_of,
    inputs_of,
    recipe_and_method,
    recipe_file,
)
from qdit_jax.cli.steps_option import add_steps_at, with_steps
from qdit_jax.cli.timestep_weights import timestep_weights
from qdit_jax.methods import method_named

HELP = """\
Quantize a checkpoint's linear layers in groups of input channels.

The weights are stored as packed codes with one scale (and zero point) per group; the activations are
quantized while the network runs, per token and group. The new checkpoint needs no other file.

examples:
  qdit quantize xl2 xl2-w4a8 --recipe w4a8                      # method best: samples inputs first
  qdit quantize xl2 xl2-w4a8 --recipe w4a8 --method rtn         # to nearest: looks at no inputs
  qdit quantize xl2 xl2-fast --recipe w4a8-fast                 # one int8 dot a layer
  qdit quantize xl2 xl2-w8a8 --recipe w8a8 --group-size 0       # one scale a channel
  qdit quantize xl2 xl2-all --recipe w4a8-all                   # every layer and label table
  qdit quantize xl2 out --recipe recipe.json                    # per-layer settings
  qdit quantize xl2 out --recipe w4a8 --dry-run                 # the plan only, writes nothing
  qdit quantize xl2 out --recipe w4a8 --method smoothquant --group-size 0
  qdit quantize xl2 out --recipe w4a4 --method svdquant
  qdit quantize xl2 out --recipe w4a8 --method gptq --range mse --num-samples 64
  qdit quantize xl2 out --recipe w4a8 --method qdit_release --adaln w4a16
  qdit quantize pixart out --recipe w4a8 --embeds prompts.npz
  qdit quantize xl2 out --recipe w4a8 --adaln w8a8 --embedders w8a8 --final w8a8 --attention w16a8
  qdit quantize xl2 out --recipe w4a8 --act-mode static-per-timestep  # ranges calibrated, not of the input
  qdit quantize xl2 out --recipe w4a4 --steps-at 0-3,last=a16 --steps 50   # those steps W4A16

Without --method it is the one that the preset is meant for (`qdit recipes`): best for most, and for
recipe files. `qdit methods` describes the methods. Rounding to nearest (rtn) takes one layer after
another from CKPT to OUT, and memory holds the largest layer, not the network. The other methods hold the network: they sample trajectories with
the checkpoint and run the network once for every block, earlier blocks quantized; each layer is
checked on held-out trajectories and keeps rounding to nearest where that is better. Where a method
learns whole blocks (brecq, ptq4dit), a run that was stopped resumes after the last finished one: they
are kept beside OUT, in the folder .OUT.unfinished. Trajectories are sampled anew, unless --items
gives them.
"""

# Said of a method that nobody asked for.
SAMPLED = "method %s: samples %d trajectories of %d steps first; --method rtn looks at no inputs"


def add_parser(subparsers: Any) -> None:
    """Adds the verb with its options."""
    parser = verb_parser(subparsers, "quantize", HELP)
    parser.add_argument("checkpoint", metavar="CKPT", type=path_option, help="a checkpoint folder")
    parser.add_argument("out", metavar="OUT", type=path_option, help="the folder to write")
    parser.add_argument(
        "--recipe",
        "--bits",
        required=True,
        help="w4a8, w6a8, w8a8, ... (w<bits>a<bits>), w4a8-fast or w8a8-fast for one int8 dot a layer, "
        "w4a8-all for every layer, or a recipe.json",
    )
    add_preset_options(parser)
    add_steps_at(parser.add_argument)
    parser.add_argument(
        "--stats", type=path_option, help="from `qdit calibrate`; static activations need it"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    add_method_options(parser)
    parser.set_defaults(
        run=run,
        resumes=lambda args: bool(
            args.method and not args.dry_run and method_named(args.method).learns_blocks
        ),
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the plan and carries it out; returns the bytes before and after."""
    import qdit_jax as qdit
    from qdit_jax.checkpoint import open_checkpoint
    from qdit_jax.cli.guidance_option import guidance_of
    from qdit_jax.cli.progress import Bar
    from qdit_jax.cli.quantize_table import Table, totals_text
    from qdit_jax.cli.quantize_unfinished import kept_blocks
    from qdit_jax.files import check_free
    from qdit_jax.sampling import check_diffusion_model

    if not args.dry_run:
        inputs = [
            *(args.checkpoint, args.stats, args.items, args.embeds),
            recipe_file(args.recipe),
        ]
        check_free(args.out, args.force, "checkpoint", inputs)
    checkpoint = open_checkpoint(args.checkpoint)  # which reads no array
    check_diffusion_model(checkpoint.model, args.checkpoint)
    is_default = args.method is None
    given = vars(args)
    recipe, method = recipe_and_method(given, checkpoint.params)
    args.method = method.name
    learns = bool(method.needs) and not args.dry_run
    check_options(given, recipe)
    recipe = with_steps(recipe, args.steps_at, checkpoint, args.steps)
    table = Table(checkpoint.params, recipe)
    if is_default and learns and args.items is None:
        logging.getLogger("qdit_jax").info(SAMPLED, args.method, args.num_samples, args.steps)
    print(table.header("outputs" if learns else "weights"))
    if args.dry_run:
        found = table.totals()
        print(*map(table.row, table.plans), totals_text(found), sep="\n")
        return found
    weights, chosen = None, inputs_of(given, checkpoint)
    guidance = guidance_of(checkpoint, args.guidance)
    if args.weight_timesteps:
        weights = timestep_weights(
            args.checkpoint,
            recipe,
            num_steps=args.steps,
            guidance=guidance,
            seed=args.seed,
            batch_size=args.batch_size,
            stats=args.stats,
            **chosen.settings,
        )
    data = data_of(given, guidance, weights, chosen)
    kept = kept_blocks(args.out, args.method, checkpoint, recipe, data, args.force)
    with kept as unfinished, Bar(0, "batch", "rounding") as bar:
        written = qdit.quantize(
            args.checkpoint,
            args.method,
            recipe,
            data=dataclasses.replace(data, unfinished=unfinished),
            out=args.out,
            overwrite=args.force,
            progress_fn=lambda event: bar.tell(table.told(event)),
        )
    found = table.totals(written.params, {"before": args.checkpoint, "after": args.out})
    print(f"{totals_text(found)}\nwrote {args.out}")
    return {"out": args.out, "method": args.method, **found}
