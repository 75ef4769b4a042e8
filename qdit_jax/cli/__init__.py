"""The command line: one verb a stage, each in a file of its own."""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

VERBS = (
    "convert",
    "inspect",
    "calibrate",
    "search",
    "quantize",
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
    keep_weights_packed()
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


def keep_weights_packed() -> None:
    """Has XLA's CPU compiler leave the unpacking of weights inside the sampling loop.

    Its default scheduler moves it out, and then the whole model lies in memory in float32: 3.9 GB
    in place of 2.0 for DiT-XL/2 with 4-bit blocks, at the same speed. Read when a backend starts.
    """
    from importlib.metadata import version

    flag = "--xla_cpu_enable_concurrency_optimized_scheduler"
    flags = os.environ.get("XLA_FLAGS", "")
    # An unknown flag would end the process: only where it is known to exist.
    if flag not in flags and version("jaxlib").startswith(("0.10.", "0.11.")):
        os.environ["XLA_FLAGS"] = f"{flags} {flag}=false".strip()


def give_back_freed_memory() -> None:
    """Has this process return a large array's memory as soon as the array is freed (glibc).

    By default freed arrays stay as holes between those in use. For DiT-XL/2: 0.85 GB in place of
    1.02 to quantise, 3.1 in place of 3.9 to sample in full precision, at the same speed. Elsewhere
    than on Linux it does nothing.
    """
    mmap_threshold, large = -3, 1 << 18  # M_MMAP_THRESHOLD of glibc's malloc.h
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(mmap_threshold, large)
