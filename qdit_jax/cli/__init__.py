"""The command line: one verb per stage, each in its own file.

A verb's module offers `add_parser(subparsers)`; it is imported only when the verb is named, and
imports JAX only when the verb runs, so that help is immediate. `run(args)` returns what `--json`
prints, in JSON's types (or None).

Exit status: 0; 1 after a failure that looks like a bug, or what `verify` does not let pass; 2 after a
refusal in one sentence on stderr; 130 when interrupted. `qdit` alone prints the help and exits with 0.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from qdit_jax.cli.failures import exit_status, sentence
from qdit_jax.cli.options import Parser, VersionAction, one_process_text
from qdit_jax.cli.output import json_on_stdout, set_up_logging

__all__ = ["VERBS", "main", "module_of"]

# Verb -> its line in `qdit --help`.
VERBS = {
    "convert": "convert PyTorch weights to a checkpoint",
    "inspect": "summarize a checkpoint or a PyTorch file",
    "calibrate": "record statistics of activations",
    "search": "find the group size of every layer",
    "quantize": "quantize a checkpoint",
    "schedule": "find the sampling steps that bear fewer bits",
    "methods": "list the methods of qdit quantize",
    "recipes": "list the presets of qdit quantize, what they cost and give",
    "export": "convert a checkpoint folder to one safetensors file, or back",
    "push": "upload a checkpoint with a model card to the Hugging Face hub",
    "embed-text": "embed prompts by a pipeline's text encoders",
    "sample": "generate pictures",
    "export-vbench": "lay out clips for VBench, and read its results",
    "evaluate": "compare a quantized model with full precision, or score samples",
    "bench": "measure the time of a step and of layers",
    "verify": "check what a quantized checkpoint does, against limits",
    "demo": "run every stage on the packaged model",
    "completion": "print a completion script for the shell",
}
# Verbs that compute on devices at once and write what one process has made.
ONE_PROCESS = ("quantize", "schedule", "verify", "bench")
DESCRIPTION = """\
Diffusion transformers in 4 to 8 bits in JAX.

From a PyTorch checkpoint to a quantized model and pictures:

  qdit convert DiT-XL-2-256x256.pt xl2        # PyTorch weights to a checkpoint folder
  qdit inspect xl2                            # its configuration and size
  qdit quantize xl2 xl2-w4a8 --recipe w4a8    # a smaller checkpoint
  qdit verify xl2-w4a8 --against xl2          # that every layer is what the recipe says
  qdit evaluate xl2-w4a8 --against xl2        # how much quality that cost
  qdit bench xl2 --recipes w4a8 w8a8          # how fast it is on this machine
  qdit sample xl2-w4a8 --labels 207,360 --out grid.png
  qdit demo                                   # every stage, on the packaged model
"""
EPILOG = """\
`qdit VERB --help` has examples; its parentheses hold the defaults of options. Every verb takes
--json (one JSON object on stdout, everything else on stderr), --quiet, --verbose and --debug (the
traceback of a failure). After an interruption, the same command resumes: calibrate, search,
quantize (with a method that learns blocks), schedule, sample, evaluate, bench.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = argparse.Namespace(debug="--debug" in arguments, json="--json" in arguments)
    try:
        parser = parser_of(arguments)
        if not arguments:
            parser.print_help()
            return 0
        args = parser.parse_args(arguments)
        set_up_logging(args)
        return run_verb(args)
    except BrokenPipeError:  # the reader, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        status = exit_status(error, args)
        if is_one_of_several(args):
            end_process(status)
        return status


def parser_of(arguments: Sequence[str]) -> Parser:
    """Returns the parser of the command line, with the options of the verb named in `arguments`."""
    parser = Parser(
        prog="qdit",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=VersionAction)
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    named = next((word for word in arguments if not word.startswith("-")), None)
    for verb, text in VERBS.items():
        if verb == named:
            import_module(module_of(verb)).add_parser(subparsers)
        else:
            subparsers.add_parser(verb, help=text)
    return parser


def module_of(verb: str) -> str:
    """Returns the name of a verb's module."""
    return f"qdit_jax.cli.{verb.replace('-', '_')}"


def run_verb(args: argparse.Namespace) -> int:
    """Runs the verb of `args`; prints what it returns if JSON was asked for.

    Returns the exit status: 0, unless the verb has a `status_of` of what it returned.
    """
    if getattr(args, "uses_jax", True):
        from qdit_jax.memory import give_back_freed_memory

        use_compilation_cache()
        give_back_freed_memory()
        if hasattr(args, "processes"):
            return run_with_others(args)
        if args.verb in ONE_PROCESS:
            refuse_several_processes()
    return run_and_show(args)


def run_and_show(args: argparse.Namespace) -> int:
    """Runs a verb and prints its JSON; returns the exit status."""
    with json_on_stdout(args.json) as show:
        result = args.run(args)
        show(result)
    status: int = args.status_of(result) if hasattr(args, "status_of") else 0
    return status


def run_with_others(args: argparse.Namespace) -> int:
    """Runs a verb that shares its work among processes, where options name others."""
    from qdit_jax.cli.processes_option import joined
    from qdit_jax.processes import LostWorkerError

    def end(text: str) -> None:
        end_process(exit_status(LostWorkerError(text), args))

    if hasattr(args, "check"):  # what can be refused before others are waited for
        args.check(vars(args))
    with joined(vars(args), end, lambda error: sentence(error, args)[0]) as args.processes:
        if not args.processes.are_several:
            refuse_several_processes("; with --distributed they share the work")
        return run_and_show(args)


def is_one_of_several(args: argparse.Namespace) -> bool:
    """Returns whether this process has joined others."""
    processes = getattr(args, "processes", None)
    return processes is not None and processes.are_several


def end_process(status: int) -> None:
    """Ends this process at once: a normal exit would wait for other processes, and abort with a dump."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def refuse_several_processes(remedy: str = "") -> None:
    """Raises `UserError` where JAX is one of several processes, as on the hosts of a TPU slice."""
    import jax

    from qdit_jax.errors import UserError

    if jax.process_count() > 1:
        raise UserError(one_process_text(f"processes={jax.process_count()}", remedy))


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in `$JAX_COMPILATION_CACHE_DIR` or the user's cache."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(base / "qdit_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
