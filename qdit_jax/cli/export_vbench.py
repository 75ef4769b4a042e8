"""`qdit export-vbench`: clips as VBench reads them, and its results read back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from qdit_jax.cli.options import SubParsers, positive_float, refuse_inert, verb_parser
from qdit_jax.cli.paths import path_option
from qdit_jax.errors import UserError

HELP = """\
Lay out sampled clips as `vbench evaluate` reads them, check such a folder, or read VBench's results back
with the worst clip of every dimension. VBench and its weights are a package of their own, which is not
needed here: pip install vbench.

OUT gets videos/, with {prompt}-{index}.mp4 of VBench's own prompts (--info), 5 each, 25 of those of
temporal flickering; or, of prompts of your own, numbered clips (--custom). prompts.json has the prompt of
every file, vbench.json what the folder is. The commands that measure it are printed. SAMPLES has a clip per
prompt and index, as `qdit sample` makes them when --num-samples is 5 times the prompts of --embeds.

examples:
  qdit embed-text WAN/ --prompts all_dimension.txt --out prompts.npz
  qdit sample wan-w4a8 --embeds prompts.npz --num-samples 4730 --out clips.npz
  qdit export-vbench clips.npz vbench-w4a8 --info VBench_full_info.json --dimensions human_action scene
  qdit export-vbench clips.npz vbench-own --custom
  qdit export-vbench --check vbench-w4a8
  qdit export-vbench --results w4a8_eval_results.json --against full_eval_results.json --page vbench.html
"""
OF_WRITING = {"info": None, "dimensions": None, "custom": False, "fps": None}
OF_READING = {"against": None, "page": None}


def add_parser(subparsers: SubParsers) -> None:
    """Adds the verb with its options."""
    parser = verb_parser(subparsers, "export-vbench", HELP)
    add = parser.add_argument
    add(
        "samples", metavar="SAMPLES", nargs="?", type=path_option, help="an .npz from `qdit sample`"
    )
    add("out", metavar="OUT", nargs="?", type=path_option, help="the folder to write")
    add(
        "--info",
        type=path_option,
        metavar="FILE",
        help="VBench_full_info.json with VBench's prompts (that of the installed package vbench)",
    )
    add("--custom", action="store_true", help="custom input: prompts of your own")
    add(
        "--dimensions",
        nargs="+",
        metavar="NAME",
        help="what is to be measured (all that can be; but temporal_flickering, which takes 25 clips of its "
        "prompts: a folder of their own)",
    )
    add("--fps", type=positive_float, help="frames per second of the clips (8)")
    add("--force", action="store_true", help="replace OUT, or the page, if it exists")
    add(
        "--check",
        type=path_option,
        metavar="OUT",
        help="check a folder: missing and extra clips, frames",
    )
    add(
        "--results",
        nargs="+",
        type=path_option,
        metavar="FILE",
        help="read VBench's *_eval_results.json, of one or more dimensions each",
    )
    add(
        "--against",
        nargs="+",
        type=path_option,
        metavar="FILE",
        help="with --results: the reference's",
    )
    add("--page", type=path_option, metavar="HTML", help="with --results: write a page")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes, checks or reads; prints and returns what was found."""
    options = vars(args)
    ways = [args.samples is not None, args.check is not None, args.results is not None]
    if sum(ways) != 1:
        raise UserError("give SAMPLES OUT, or --check OUT, or --results FILE.")
    if args.results is None:
        refuse_inert(options, OF_READING, "it goes with --results")
    if args.samples is None:
        inert = {**OF_WRITING, **({"force": False} if args.page is None else {})}
        refuse_inert(options, inert, "it goes with SAMPLES OUT")
    if args.check is not None:
        return checked(args.check)
    return read_back(options) if args.results is not None else written(options)


def written(options: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the folder, prints the commands, and returns what it holds."""
    from qdit_jax.cli.progress import Bar
    from qdit_jax.evaluation import VBENCH, commands, export_vbench, read_prompts
    from qdit_jax.files import replaced_folder
    from qdit_jax.metrics import image_shape

    samples, out = options["samples"], options["out"]
    if out is None:
        raise UserError("give OUT, the folder to write.")
    if options["custom"]:
        refuse_inert(options, {"info": None}, "--custom has prompts of your own")
    prompts = None if options["custom"] else read_prompts(options["info"])
    inputs = [samples, options["info"]]
    with (
        replaced_folder(out, options["force"], "vbench", inputs) as folder,
        Bar(image_shape(samples)[0], "clip", "writing") as bar,
    ):
        manifest = export_vbench(
            samples,
            folder,
            prompts=prompts,
            dimensions=options["dimensions"] or default_dimensions(VBENCH, options["custom"]),
            fps=options["fps"] or 8,
            progress_fn=bar.update,
        )
    print(f"wrote {len(manifest['clips']):,} clips to {out}; measure them with VBench:")
    print(*(f"  {command}" for command in commands(out, manifest)), sep="\n")
    return {"out": out, "num_clips": len(manifest["clips"]), "commands": commands(out, manifest)}


def default_dimensions(known: Mapping[str, bool], is_custom: bool) -> list[str]:
    """Returns what is measured if nothing is named: what can be, of five clips per prompt."""
    if is_custom:
        return [name for name, is_free in known.items() if is_free]
    return [name for name in known if name != "temporal_flickering"]


def checked(out: Any) -> dict[str, Any]:
    """Prints what is wrong with a folder, and returns it.

    Raises:
        UserError: if anything is.
    """
    from qdit_jax.evaluation import check_vbench

    wrong = check_vbench(out)
    if not wrong:
        print(f"{out}: VBench finds every clip")
        return {"out": out, "wrong": []}
    shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
    raise UserError(f"{out}: {shown}.")


def read_back(options: Mapping[str, Any]) -> dict[str, Any]:
    """Prints the scores with each dimension's worst clip, writes the page, and returns them."""
    from qdit_jax.evaluation import (
        read_vbench_results,
        vbench_rows,
        vbench_summary,
        vbench_text,
        write_vbench_page,
    )
    from qdit_jax.files import check_free

    results, reference, page = (options[name] for name in ("results", "against", "page"))
    if page is not None:
        check_free(page, options["force"], "report", [*results, *(reference or ())])
    against = None if reference is None else read_vbench_results(reference)
    summary = vbench_summary(read_vbench_results(results), against)
    rows = vbench_rows(summary)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    print(vbench_text(summary))
    if page is not None:
        write_vbench_page(page, "VBench", summary)
        print(f"wrote {page}")
    return json.loads(json.dumps(summary))
