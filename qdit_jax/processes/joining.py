"""Joining the other processes of a computation by JAX's coordination service, and leaving them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from qdit_jax.errors import UserError
from qdit_jax.processes.aborting import call_when_aborted
from qdit_jax.processes.sharing import ALONE, Processes
from qdit_jax.processes.watch import LOST_AFTER, Watch, first_line

LINGERS = 1.0  # seconds that the first process stays after all have left


def end(text: str) -> None:
    """Ends this process at once with a sentence: a normal exit would wait for the lost one."""
    print(f"qdit: {text}", file=sys.stderr, flush=True)
    os._exit(2)


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: bool = False,
    *,
    end_fn: Callable[[str], None] = end,
) -> Processes:
    """Returns this process among those that share a computation; `ALONE` if nothing is given.

    Waits until all have joined. To be called before JAX finds its devices.

    Args:
        coordinator: `HOST:PORT` of process 0; with `num_processes` and `process_id`.
        distributed: take these three from the environment of the cluster.
        end_fn: ends this process with a sentence, when another one is lost while it computes.

    Raises:
        UserError: if one of the three is missing, or the others are not found.
    """
    given = (coordinator, num_processes, process_id)
    if not distributed and all(value is None for value in given):
        return ALONE
    if not distributed and any(value is None for value in given):
        raise UserError("--coordinator, --num-processes and --process-id must be given together.")
    check_id(num_processes, process_id)
    compile_alone()
    jax.config.update("jax_enable_recoverability", True)  # else JAX aborts where one is lost
    where = "on this cluster" if coordinator is None else f"by --coordinator {coordinator}"
    absent = (
        f"the other processes were not found {where}; check that all are started, and its address."
    )
    call_when_aborted(lambda: end_fn(absent))  # as JAX does that waits for them in vain
    try:
        jax.distributed.initialize(*given, heartbeat_timeout_seconds=LOST_AFTER)
    except (RuntimeError, ValueError) as error:
        call_when_aborted(lambda: None)
        raise UserError(f"{absent} JAX says: {first_line(error)}") from error
    if jax.process_count() == 1:
        return ALONE
    found = current(end_fn)
    with told_to_stderr():
        multihost_utils.sync_global_devices("joined")
    return found


def compile_alone() -> None:
    """Has XLA choose the algorithms of a GPU in each process by itself, unless its flags say otherwise.

    By default processes divide that work of every program among them, and wait for each other: for
    ever, where one of them has no share left to compute, or is the only one to score.
    """
    flags, name = os.environ.get("XLA_FLAGS", ""), "--xla_gpu_shard_autotuning"
    if name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {name}=false".strip()


@contextmanager
def told_to_stderr() -> Iterator[None]:
    """Sends to stderr what libraries below Python print to stdout, where a result may be read."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def check_id(num_processes: int | None, process_id: int | None) -> None:
    """Raises `UserError` if a process has no place among the others."""
    if num_processes is not None and process_id is not None and process_id >= num_processes:
        raise UserError(
            f"--process-id {process_id} is not one of --num-processes {num_processes}; they are numbered "
            "from 0."
        )


def current(end_fn: Callable[[str], None]) -> Processes:
    """Returns this process among those that `jax.distributed.initialize` has joined.

    To be called once: a thread then watches the others, and ends this process by `end_fn` where one
    is lost.
    """
    if jax.process_count() == 1:
        return ALONE
    index, count = jax.process_index(), jax.process_count()
    watch = Watch(multihost.get_jax_distributed_client(), index, count, end_fn)
    call_when_aborted(watch.aborted)
    return Processes(index, count, watch)


def leave(processes: Processes) -> None:
    """Waits until all processes are done; the first one, which the others need, goes last."""
    if not isinstance(processes.notes, Watch):
        return
    processes.meet("the end")
    processes.notes.leave()
    if processes.is_first:
        time.sleep(LINGERS)
    jax.distributed.shutdown()
