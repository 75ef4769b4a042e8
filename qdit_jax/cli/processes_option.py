"""The options of several processes, which the verbs that share their work among hosts take."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qdit_jax.cli.options import positive_int, whole_number
from qdit_jax.files import AnyPath

if TYPE_CHECKING:  # help is printed without it
    from qdit_jax.processes import Processes

HELP = """\
Start the same command on every host, each with its own --process-id (on a TPU slice or under Slurm,
--distributed alone): each does its share, and process 0 writes the result, that of one process. OUT
lies on a disk that all hosts see. See docs/on-several-hosts.md.
"""
NAMES = ("coordinator", "num_processes", "process_id", "distributed")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a verb's parser; `processes` of what is parsed is set when it runs."""
    add = parser.add_argument_group("several processes", HELP).add_argument
    add(
        "--coordinator",
        type=address,
        metavar="HOST:PORT",
        help="address of process 0, with a port that is free there",
    )
    add("--num-processes", type=positive_int, help="how many processes there are")
    add("--process-id", type=whole_number(0), help="the number of this process, from 0")
    add(
        "--distributed", action="store_true", help="take these three from the cluster's environment"
    )
    parser.set_defaults(processes=None)


def address(text: str) -> str:
    """Returns `HOST:PORT` as it was given; raises argparse's error for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no address; use HOST:PORT, 10.0.0.1:9876")
    return text


@contextmanager
def joined(
    options: Mapping[str, Any],
    end_fn: Callable[[str], None],
    sentence_fn: Callable[[BaseException], str],
) -> Iterator[Processes]:
    """Yields this process among the others, where the options name them; leaves them in the end.

    Args:
        options: what was parsed.
        end_fn: ends this process with a sentence, when another one is lost.
        sentence_fn: what the others are told of an error that ends this one.
    """
    from qdit_jax.processes import Watch, join, leave

    processes = join(*(options[name] for name in NAMES), end_fn=end_fn)
    try:
        yield processes
    except BaseException as error:
        if isinstance(processes.notes, Watch):
            processes.notes.end(sentence_fn(error))
        raise
    leave(processes)


def share_text(processes: Processes, out: AnyPath) -> str | None:
    """Returns what a process says in the end that has done its share, and not written `out`; else None."""
    if processes.is_first:
        return None
    return (
        f"process {processes.index} of {processes.count} has done its share; process 0 wrote {out}"
    )
