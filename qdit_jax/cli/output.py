"""A verb's output: results to stdout, notes and progress to stderr, or JSON alone on stdout."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping


def set_up_logging(args: argparse.Namespace) -> None:
    """Sends notes to stderr: by default ours; warnings only if quiet; other libraries' if verbose."""
    ours = logging.WARNING if args.quiet else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    if args.verbose:
        ours = logging.DEBUG
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logging.getLogger().setLevel(logging.INFO)
    logging.getLogger("qdit_jax").setLevel(ours)


@contextlib.contextmanager
def json_on_stdout(asked: bool) -> Iterator[Callable[[object], None]]:
    """Yields a function to call with a verb's result; if asked, only that is printed to stdout."""
    if not asked:
        yield lambda result: None
        return
    with contextlib.redirect_stdout(sys.stderr):
        found: list[object] = []
        yield found.append
    print(json.dumps(plain(found[0] or {}), indent=1, ensure_ascii=False))


def plain(value: object) -> object:
    """Returns a value in JSON's types; a number that is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return str(value)
    if hasattr(value, "tolist"):  # of NumPy
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
