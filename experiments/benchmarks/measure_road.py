"""Takes a random DiT-XL/2 the whole road and measures each stage's time and peak memory.

    python experiments/benchmarks/measure_road.py --out runs/road --steps 3

About 4 minutes on 2 cores, 8 GB of disk and 4 GB of memory. Prints a table and writes
`measure_road.json`. Expected: converting peaks at 1.2 times the file; quantizing streams, and peaks
at 0.41 GB whatever it writes, 0.28 GB of which are Python, JAX and Orbax; sampling with every layer
in 4 bits needs 0.3 times the memory of full precision, in either numerics.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
EVERYTHING = {
    "name": "w4a8-everything",
    "rules": [
        {
            "layers": ".*",
            "weight": {"bits": 4, "group_size": 128, "scale_dtype": "float16"},
            "act": {"bits": 8, "group_size": 128},
        },
        {"layers": r"blocks_\d+/attn/(q|k|v|softmax)"},
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/road"))
    parser.add_argument("--model", default="DiT-XL/2")
    parser.add_argument("--steps", type=int, default=3, help="DDIM steps a sample (%(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    source, full = args.out / "random.pt", args.out / "full"
    blocks, everything = args.out / "w4a8", args.out / "w4a8-everything"
    recipe = args.out / "everything.json"
    recipe.write_text(json.dumps(EVERYTHING))
    if not source.exists():
        run(
            [
                sys.executable,
                str(HERE / "make_random_checkpoint.py"),
                str(source),
                "--model",
                args.model,
            ]
        )
    sampling = ["--labels", "207", "--steps", str(args.steps), "--guidance", "1.5"]
    stages = {
        "convert": ["convert", source, full, "--force", "--quiet"],
        "quantize W4A8, block linears": ["quantize", full, blocks, "--recipe", "w4a8", "--force"],
        "quantize W4A8, every layer": ["quantize", full, everything, "--recipe", recipe, "--force"],
        "sample, full precision": ["sample", full, *sampling, "--out", args.out / "full.npz"],
        "sample, W4A8 blocks": ["sample", blocks, *sampling, "--out", args.out / "blocks.npz"],
        "sample, W4A8 every layer": [
            "sample",
            everything,
            *sampling,
            "--out",
            args.out / "all.npz",
        ],
        "sample, the same, integer": [
            *("sample", everything, *sampling, "--numerics", "integer"),
            *("--out", args.out / "integer.npz"),
        ],
    }
    found = []
    print(f"{'stage':32} {'seconds':>8} {'peak GB':>8} {'on disk, GB':>12}")
    for stage, command in stages.items():
        seconds, peak = run(["qdit", *map(str, command)])
        written = Path(command[2]) if command[0] in ("convert", "quantize") else None
        size = folder_bytes(written) if written else None
        found.append({"stage": stage, "seconds": seconds, "peak_bytes": peak, "disk_bytes": size})
        disk = "" if size is None else f"{size / 1e9:12.2f}"
        print(f"{stage:32} {seconds:8.1f} {peak / 1e9:8.2f} {disk}", flush=True)
    summary = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "model": args.model,
        "source_bytes": source.stat().st_size,
        "stages": found,
    }
    (args.out / "measure_road.json").write_text(json.dumps(summary, indent=1))


def run(command: list[str]) -> tuple[float, int]:
    """Runs a command to its end; returns its seconds and its peak resident memory in bytes.

    It compiles for itself: kept programs of earlier runs would flatter both figures.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {status}.")
    return time.perf_counter() - began, usage.ru_maxrss * 1024


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
