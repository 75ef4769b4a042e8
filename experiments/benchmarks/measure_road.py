"""Takes a random network of a published size the whole road and measures each stage's time and peak memory.

    python experiments/benchmarks/measure_road.py --out runs/road --steps 3
    python experiments/benchmarks/measure_road.py --out runs/flux --model flux-dev --dtype bfloat16 --steps 0
    python experiments/benchmarks/measure_road.py --out runs/wan --model wan-1.3b --dtype bfloat16 \
        --steps 1 --size 16x16 --frames 3

Prints a table and writes `measure_road.json` after every stage; stages that it has are not run again.
`--tidy` removes each stage's input once nothing needs it.

Expected of DiT-XL/2: about 4 minutes on 2 cores, 8 GB of disk. Converting and quantizing stream, and peak
at what Python, JAX and Orbax take plus a few copies of the largest layer; sampling with every layer in 4 bits
needs 0.3 times the memory of full precision, in either numerics.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdit_jax.report import provenance

HERE = Path(__file__).resolve().parent
RECIPES = {"block linears": "w4a8", "every layer": "w4a8-all"}


def main() -> None:
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    source, full = args.out / "random", args.out / "full"
    file = args.out / "measure_road.json"
    kept = json.loads(file.read_text()) if file.exists() else {"stages": {}}
    found = {**about(args), **kept}
    if "convert" not in found["stages"] and not source.exists():
        make_source(source, args)
    print(f"{'stage':36} {'seconds':>8} {'CPU s':>8} {'peak GB':>8} {'on disk, GB':>12}")
    for stage, command in stages(args, source, full).items():
        if stage not in found["stages"]:
            found["stages"][stage] = measured(command)
            file.write_text(json.dumps(found, indent=1) + "\n")
        row = found["stages"][stage]
        disk = f"{row['disk_bytes'] / 1e9:12.2f}" if row["disk_bytes"] else ""
        times = f"{row['seconds']:8.1f} {row.get('cpu_seconds', 0):8.1f}"
        print(f"{stage:36} {times} {row['peak_bytes'] / 1e9:8.2f} {disk}", flush=True)
        if args.tidy and stage == "convert":
            shutil.rmtree(source, ignore_errors=True)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/road"))
    add("--model", default="DiT-XL/2", help="a published network (%(default)s)")
    add("--dtype", default="float32", help="of the file and of the checkpoint (%(default)s)")
    add("--recipes", nargs="*", default=list(RECIPES), choices=RECIPES, help="what is quantized")
    add("--steps", type=int, default=3, help="sampling steps; 0 samples nothing (%(default)s)")
    add("--size", help="HxW of a sample")
    add("--frames", help="of a sample")
    add("--tidy", action="store_true", help="remove the random file once it is converted")
    return parser.parse_args()


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what the figures are of."""
    return {
        "made": provenance(),
        "model": args.model,
        "dtype": args.dtype,
        "sample": {"steps": args.steps, "size": args.size, "frames": args.frames},
    }


def make_source(source: Path, args: argparse.Namespace) -> None:
    script = [sys.executable, str(HERE / "make_random_checkpoint.py"), str(source)]
    run([*script, "--model", args.model, "--dtype", args.dtype])


def stages(args: argparse.Namespace, source: Path, full: Path) -> dict[str, list[str]]:
    """Returns the commands by the stage's name."""
    convert = ["convert", source, full, "--dtype", args.dtype, "--force", "--quiet"]
    size = [] if "pixart" not in args.model.lower() else ["--input-size", "128"]
    found: dict[str, Sequence[object]] = {"convert": [*convert, *size]}
    for title in args.recipes:
        out, recipe = folder_of(args, title), ["--recipe", RECIPES[title], "--force"]
        found[f"quantize W4A8, {title}"] = ["quantize", full, out, *recipe, "--method", "rtn"]
    if args.steps:
        sampling = ["--steps", args.steps, "--numerics", "simulated"]
        sampling += ["--size", args.size] if args.size else []
        sampling += ["--frames", args.frames] if args.frames else []
        for title, folder in {
            "full precision": full,
            **{f"W4A8 {title}": folder_of(args, title) for title in args.recipes},
        }.items():
            found[f"sample, {title}"] = sample(folder, args, [*sampling])
        last = folder_of(args, args.recipes[-1])
        integer = ["integer" if option == "simulated" else option for option in sampling]
        found["sample, the last, integer"] = sample(last, args, integer)
    return {stage: ["qdit", *map(str, command)] for stage, command in found.items()}


def folder_of(args: argparse.Namespace, title: str) -> Path:
    return args.out / f"w4a8-{title.replace(' ', '-')}"


def sample(folder: Path, args: argparse.Namespace, sampling: list[object]) -> list[object]:
    """Returns the command that samples, of a class or of a random prompt."""
    if args.model.startswith(("DiT", "SiT", "Latte-XL")):
        what: list[object] = ["--labels", 100, "--guidance", 1.5]
    else:
        what = ["--embeds", args.out / "random.npz"]
    out = args.out / f"{folder.name}-{sampling[3]}.npz"
    return ["sample", folder, *what, *sampling, "--out", out]


def measured(command: list[str]) -> dict[str, Any]:
    """Runs a stage; returns its seconds, peak memory, and the bytes of the checkpoint that it wrote."""
    if "--embeds" in command:
        embeds = command[command.index("--embeds") + 1]
        if not Path(embeds).exists():
            run([sys.executable, str(HERE / "random_conditions.py"), command[2], embeds])
    seconds, cpu, peak = run(command)
    written = Path(command[3]) if command[1] in ("convert", "quantize") else None
    size = folder_bytes(written) if written else None
    found = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}
    return {**found, "peak_bytes": peak, "disk_bytes": size}


def run(command: list[str]) -> tuple[float, float, int]:
    """Runs a command to its end; returns its seconds, those of all cores, and its peak memory in bytes.

    It compiles for itself: kept programs of earlier runs would flatter both figures.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", "qdit_jax", *command[1:]] if command[0] == "qdit" else command
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {status}.")
    cpu = usage.ru_utime + usage.ru_stime
    return time.perf_counter() - began, cpu, usage.ru_maxrss * 1024


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
