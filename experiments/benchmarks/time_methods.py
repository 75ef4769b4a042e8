"""Times `qdit quantize` of a checkpoint by several methods, on random inputs of the network.

    python experiments/benchmarks/make_random_checkpoint.py xl2.safetensors --model DiT-XL/2
    qdit convert xl2.safetensors xl2
    python experiments/benchmarks/time_methods.py xl2 --methods rtn smoothquant

About two minutes for these on 2 free cores. Expected for DiT-XL/2 at W4A8 in groups of 128 there: half a
minute with rtn, three quarters of a minute more with smoothquant on 16 inputs (the goal is a minute).
Each method is a process of its own, from reading the checkpoint to the last byte written; wall time,
and the most memory that the process held (peak RSS). The inputs are noise that is drawn beforehand:
sampling trajectories, which a method does where it is given no --items, is in neither.
Prints a line each, and JSON with date and machine with --json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import qdit_jax as qdit
from qdit_jax.calibration import Items
from qdit_jax.report import provenance

NEEDS_NOTHING = ("rtn",)


def write_items(path: Path, checkpoint: qdit.Checkpoint, count: int, seed: int) -> None:
    """Writes random inputs of a network of labels: noise, timesteps from end to end, any class."""
    rng = np.random.default_rng(seed)
    model = checkpoint.model
    x = rng.standard_normal((count, *model.sample_shape())).astype(np.float32)
    timestep = np.linspace(0, 1 if model.prediction == "velocity" else 999, count)
    condition = rng.integers(0, model.num_classes, count).astype(np.int32)
    Items(x, timestep.astype(np.float32), condition, np.arange(count)).save(path)


def timed(command: Sequence[str]) -> tuple[float, float]:
    """Returns the wall seconds of a command and the most memory that its process held, in GB.

    Raises:
        SystemExit: if it fails.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}.")
    unit = 1 if sys.platform == "darwin" else 1024  # of `ru_maxrss`, in bytes
    return round(seconds, 1), round(usage.ru_maxrss * unit / 1e9, 2)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--methods", nargs="+", default=["rtn", "smoothquant"])
    parser.add_argument("--recipe", default="w4a8")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--num-items", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    seconds, peak = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        items = Path(folder) / "items.npz"
        write_items(items, qdit.load(args.checkpoint), args.num_items, args.seed)
        for method in args.methods:
            command = [sys.executable, "-m", "qdit_jax", "quantize", args.checkpoint]
            command += [Path(folder) / method, "--recipe", args.recipe, "--method", method]
            command += ["--group-size", args.group_size, "--quiet"]
            if method not in NEEDS_NOTHING:
                command += ["--items", items, "--batch-size", args.batch_size]
            seconds[method], peak[method] = timed(list(map(str, command)))
            told = f"{method}: {seconds[method]} s, at most {peak[method]} GB"
            print(told, file=sys.stderr, flush=True)
    if args.json:
        found = {"made": provenance(), "seconds": seconds, "peak_rss_gb": peak}
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
