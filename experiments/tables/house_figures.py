"""Figures of how the code is built, counted from its text and from one traced run.

    python experiments/tables/house_figures.py --out runs/house.json
    git worktree add --detach /tmp/earlier COMMIT   # another state, counted in the same way
    python experiments/tables/house_figures.py /tmp/earlier --out runs/earlier.json

Under a minute on 2 cores. Prints the figures and writes them as JSON. Expected: no cycles of
imports, no layer name of a family outside `models/` and `convert/`, no function over 60 lines
outside the kernels, at most 6 loose files.

The walk of `qdit quantize` is what somebody sees who reads the program in the order in which it
runs, from the verb's `run` on, with the packaged model. Every function of the packages is read once,
where it is called first; lambdas and comprehensions belong to the function around them, and what
an import runs is not read. From the sequence of these functions:

    functions   how many there are
    stays       stretches of the sequence in one file: a new one begins wherever the next function
                stands in another file than the one before
    climbs      stays whose first function was not called from the file just left: the reader goes
                back up to a caller before going on
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import chain, pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import source_figures as source

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 60
NEAREST = "nearest"
METHOD_OPTIONS = {
    "--method": "rtn",
    "--rounding": "nearest",
}  # today's and an earlier name; to nearest
NUM_HEADS = "4"  # of the packaged model


def figures(root: Path) -> dict[str, Any]:
    """Returns the figures of the source text in a working tree."""
    modules = source.modules_under(root)
    texts = {name: file.read_text() for name, file in modules.items()}
    lengths = {
        name: [source.body_lines(f) for f in source.functions(text)] for name, text in texts.items()
    }
    long = [n for name, found in lengths.items() if not is_kernel(name) for n in found]
    named = [n for n in texts if source.room_of(n) not in source.KNOWS_LAYER_NAMES]
    types = [a for text in texts.values() for a in source.annotations(text)]
    return {
        "loose files": len(list((root / "qdit_jax").glob("*.py"))),
        "cycles of imports between files": source.cycles_of_files(modules),
        "cycles of imports between rooms": source.cycles_of_rooms(modules),
        "layer names outside models and convert": sum(
            len(source.layer_names(texts[name])) for name in named
        ),
        "functions": sum(map(len, lengths.values())),
        f"functions over {MAX_LINES} lines outside kernels": sum(n > MAX_LINES for n in long),
        "median lines of a function": statistics.median(chain.from_iterable(lengths.values())),
        "share of annotations that are a bare Any": round(source.num_bare(types) / len(types), 4),
    }


def is_kernel(name: str) -> bool:
    return source.room_of(name) == "kernels"


class Trace:
    """The functions of a working tree in the order in which they are first called."""

    def __init__(self, root: Path, begins: Path) -> None:
        self.folders = tuple(f"{root / folder}{os.sep}" for folder in source.TOPS.values())
        self.begins = str(begins)
        self.seen: set[CodeType] = set()
        self.steps: list[tuple[str, str, str]] = []  # file, function, the caller's file

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        """Notes a function that is called for the first time; a `sys.setprofile` function."""
        code = frame.f_code
        if event != "call" or code in self.seen or not code.co_filename.startswith(self.folders):
            return
        is_function = code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")
        begins = bool(self.steps) or (code.co_filename == self.begins and code.co_name == "run")
        if not is_function or not begins:
            return
        callers = self.callers(frame)
        if callers is None:
            return
        self.seen.add(code)
        self.steps.append((code.co_filename, code.co_qualname, callers))

    def callers(self, frame: FrameType) -> str | None:
        """Returns the file of the nearest caller in the tree, or None while a module is imported."""
        nearest, above = "", frame.f_back
        while above is not None:
            code = above.f_code
            if code.co_filename.startswith(self.folders):
                if code.co_name == "<module>" and not code.co_filename.endswith("__main__.py"):
                    return None
                nearest = nearest or code.co_filename
            above = above.f_back
        return nearest


def walk_figures(steps: list[tuple[str, str, str]]) -> dict[str, int]:
    """Returns functions, stays and climbs of a walk: `(file, function, the caller's file)`."""
    moves = [(a[0], b) for a, b in pairwise(steps) if a[0] != b[0]]
    return {
        "functions": len(steps),
        "files": len({file for file, _, _ in steps}),
        "stays": len(moves) + 1,
        "climbs": sum(caller != left for left, (_, _, caller) in moves),
    }


def traced(root: Path, method: str) -> dict[str, Any]:
    """Returns the walk of `qdit quantize` in this process, whose packages are those of `root`."""
    from qdit_jax.cli import main

    verb = root / "qdit_jax" / "cli" / "quantize.py"
    with tempfile.TemporaryDirectory() as folder:
        model, out = f"{folder}/model", f"{folder}/out"
        weights = str(root / "qdit_jax" / "assets" / "demo_dit.safetensors")
        if main(["convert", weights, model, "--num-heads", NUM_HEADS]):
            raise SystemExit("the packaged model was not converted")
        trace = Trace(root, verb)
        text = "".join(file.read_text() for file in verb.parent.glob("quantize*.py"))
        named = next(name for name in METHOD_OPTIONS if f'"{name}"' in text)
        options = ["--recipe", "w4a8", "--group-size", "32", named]
        if method == NEAREST:
            options += [METHOD_OPTIONS[named]]
        else:
            options += [method, "--num-samples", "4", "--steps", "2"]
        sys.setprofile(trace)
        try:
            status = main(["quantize", model, out, *options])
        finally:
            sys.setprofile(None)
        if status:
            raise SystemExit("the traced run failed")
    walk = [f"{Path(file).relative_to(root)}: {name}" for file, name, _ in trace.steps]
    return {**walk_figures(trace.steps), "walk": walk}


def walked(root: Path, method: str) -> dict[str, Any]:
    """Returns the walk of `qdit quantize` in a working tree, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        paths = (str(root), f"{folder}", os.environ.get("PYTHONPATH", ""))
        Path(folder, "qdit_convert").symlink_to(root / "convert")
        out = Path(folder) / "walk.json"
        command = [sys.executable, __file__, str(root), "--trace", method, "--out", str(out)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "JAX_PLATFORMS": "cpu",
            "XDG_CACHE_HOME": folder,
        }
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


def main() -> None:
    """Prints the figures and writes them to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="a working tree")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--trace", help=argparse.SUPPRESS)
    args = parser.parse_args()
    root = args.root.resolve()
    if args.trace is not None:
        args.out.write_text(json.dumps(traced(root, args.trace)))
        return
    found: dict[str, Any] = figures(root)
    for name, method in (("rounding to nearest", NEAREST), ("GPTQ", "gptq")):
        found[f"qdit quantize, {name}"] = walked(root, method)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1))
    for name, value in found.items():
        shown = (
            {k: v for k, v in value.items() if k != "walk"} if isinstance(value, dict) else value
        )
        print(f"{name}: {shown}")


if __name__ == "__main__":
    main()
