"""`--numerics` and `--dtype`: how a network computes, options of every verb that runs one."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qdit_jax.cli.options import AddArgument

if TYPE_CHECKING:  # help is printed without it
    from qdit_jax.checkpoint import Checkpoint

CHOICES = ("simulated", "integer")
DTYPES = ("float32", "bfloat16")


def add_numerics(add: AddArgument, default: str | None, help_text: str) -> None:
    """Adds `--numerics` by `add`, a parser's or group's `add_argument`, and its earlier name."""
    add("--numerics", choices=CHOICES, default=default, help=help_text)
    add(
        "--execution",
        dest="numerics",
        choices=CHOICES,
        default=argparse.SUPPRESS,
        action=EarlierName,
        help=argparse.SUPPRESS,
    )


def add_dtype(add: AddArgument) -> None:
    """Adds `--dtype` by `add`, a parser's or group's `add_argument`."""
    add(
        "--dtype",
        choices=DTYPES,
        help="of products in full precision; norms, softmax, modulation, quantizers and the sampler "
        "stay in float32 (bfloat16 on accelerators, else float32)",
    )


def add_expand(add: AddArgument) -> None:
    """Adds `--expand` by `add`, a parser's or group's `add_argument`."""
    add(
        "--expand",
        choices=("per-call", "load"),
        default="per-call",
        help="where weights of 2 to 6 bits become bytes: in every product, or once when they are loaded, "
        "for more memory and, where unpacking takes time, shorter steps (%(default)s)",
    )


def add_hoist(add: AddArgument) -> None:
    """Adds `--hoist` by `add`, a parser's or group's `add_argument`."""
    add(
        "--hoist",
        action=argparse.BooleanOptionalAction,
        help="compute what sees timestep and condition only (modulation) before the loop, for all steps "
        "of a batch: no step reads their weights, but their outputs take memory (default: on accelerators, "
        "where memory allows)",
    )


SLOW = (
    "simulated numerics multiply quantized inputs in float32, which is slower than bfloat16 on this device; "
    "kernels compute --numerics integer"
)


def note_if_slow(checkpoints: Iterable[Checkpoint], numerics: str) -> None:
    """Logs, on an accelerator, that simulated numerics of quantized inputs cost time."""
    import jax

    from qdit_jax.kernels import quantized_layers

    if numerics != "simulated" or jax.default_backend() == "cpu":
        return
    acts = (act for one in checkpoints for _, _, act in quantized_layers(one.params))
    if any(act is not None for act in acts):
        logging.getLogger("qdit_jax").info(SLOW)


class EarlierName(argparse.Action):
    """Stores the value and says what the option is called now; removed in the next release."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        print(f"qdit: note: {option_string} is called --numerics now.", file=sys.stderr)
        setattr(namespace, self.dest, values)
