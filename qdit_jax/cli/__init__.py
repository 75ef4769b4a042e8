"""The command line: one verb a stage, each in a file of its own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from qdit_jax.memory import give_back_freed_memory

VERBS = (
    "convert",
    "inspect",
    "calibrate",
    "search",
    "quantize",
    "methods",
    "export",
    "sample",
    "evaluate",
    "demo",
)
DESCRIPTION = """\
Diffusion transformers in 4 to 8 bits in JAX.

The road: a PyTorch checkpoint goes in, a quantised model and pictures come out.

  qdit convert DiT-XL-2-256x256.pt xl2        # PyTorch weights to a checkpoint folder
  qdit inspect xl2                            # what is in it
  qdit quantize xl2 xl2-w4a8 --recipe w4a8    # a smaller checkpoint
  qdit sample xl2-w4a8 --labels 207,360 --out grid.png
  qdit demo                                   # all of it, on the model that the package carries
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status: 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="qdit", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        import_module(f"qdit_jax.cli.{verb}").add_parser(subparsers)
    args = parser.parse_args(argv)
    use_compilation_cache()
    give_back_freed_memory()
    try:
        args.run(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"qdit: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qdit: interrupted", file=sys.stderr)
        return 130
    return 0


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in `$JAX_COMPILATION_CACHE_DIR` or the user's cache."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(base / "qdit_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
