"""Times how long samplers take to compile, their blocks scanned and unrolled, from shapes alone.

    python experiments/benchmarks/time_compiles.py --out runs/compile_times.json
    python experiments/benchmarks/time_compiles.py --only XL/2 --out runs/compile_times.json

Rows: a whole guided sampler of DiT-XL/2 in float32, in `w4a8`, with a group size of its own for each quarter of
the blocks, and with one drawn for every layer, as a search may leave it; the samplers of the packaged models that
`qdit demo` compiles, added up (its full precision and its five recipes of dynamic ranges: those of static ranges and of
the method `best` need calibration); a guided step of Latte-XL/2 and one of STDiT3, in `w4a8`. Scanned is the form in
which `generate` runs a network, see `sampling.running_params`: long runs of equal blocks are stacked, and one block of
each is compiled. Unrolled is the same without runs.

Every time is cold: a process of its own, no cache of compiled programs. Nothing runs. `seconds` is from the first trace
to the compiled program as the clock says, `cpu_seconds` what the process computed meanwhile on all of its cores, which
other work on the machine changes less. The two forms of a row are timed one after the other; `--rounds` more
than once, and the median counts. The file --out is saved after every process, and the same command goes on from there.

Took 12 minutes on 2 cores with other work; the uniform scanned samplers of XL/2 at most 8 s each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax
import jax.numpy as jnp

import qdit_jax as qdit
from qdit_jax.demo import PACKAGED, recipes
from qdit_jax.models import published_named
from qdit_jax.recipes import Recipe, Rule
from qdit_jax.report import provenance
from qdit_jax.sampling import (
    denoiser,
    initial_noise,
    running_params,
    with_narrow_kernels,
    with_ready_kernels,
)
from qdit_jax.speed import abstract_checkpoint, recipe_named

FORMS = ("scanned", "unrolled")
XL, DEPTH = "DiT-XL/2", 28
FULL = "float32"
QUARTERS, BY_LAYER = "w4a8, 4 group sizes by block", "w4a8, group sizes by layer"
SIZES = (32, 64, 128, 192)
LAYERS = ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
STEPS = ("Latte-XL/2", "STDiT3-16x256x256")
ROWS = (
    *(f"{XL} sampler, {name}" for name in (FULL, "w4a8", QUARTERS, BY_LAYER)),
    *(f"demo {name}, 6 samplers" for name in PACKAGED),
    *(f"{name} step, w4a8" for name in STEPS),
)
GUIDANCE = 4.0  # of any number
DEMO_BATCH = 10

Program = tuple[Callable[..., Any], tuple[Any, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="part of the rows' names, such as XL/2 or demo")
    parser.add_argument("--rounds", type=int, default=1, help="processes per row and form")
    parser.add_argument("--again", action="store_true", help="time rows that the file has anew")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write or go on with")
    parser.add_argument("--one", nargs=2, metavar=("ROW", "FORM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.out.write_text(json.dumps(timed(*args.one)))
        return
    chosen = [row for row in ROWS if args.only in row]
    if not chosen:
        parser.error(f"--only {args.only} is in no row; the rows are {'; '.join(ROWS)}")
    kept = json.loads(args.out.read_text())["rows"] if args.out.exists() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.again:
        kept = {row: found for row, found in kept.items() if row not in chosen}
    for row in chosen:
        for number in range(args.rounds):
            for form in FORMS:
                found = kept.setdefault(row, {}).setdefault(form, [])
                if len(found) <= number:
                    found.append(apart(row, form))
                    print(row, form, found[-1], flush=True)
                    save(args.out, kept)
    print(table(kept))


def apart(row: str, form: str) -> dict[str, Any]:
    """Returns what a process of its own measures."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "one.json"
        command = [sys.executable, __file__, "--out", str(out), "--one", row, form]
        subprocess.run(command, check=True)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def timed(row: str, form: str) -> dict[str, Any]:
    """Returns how long the programs of a row take, traced and compiled."""
    found = dict.fromkeys(("seconds", "cpu_seconds", "trace_seconds"), 0.0)
    count = 0
    for fn, arguments in programs(row, form):
        began, computed = time.perf_counter(), time.process_time()
        lowered = jax.jit(fn).lower(*arguments)
        found["trace_seconds"] += time.perf_counter() - began
        lowered.compile()
        found["seconds"] += time.perf_counter() - began
        found["cpu_seconds"] += time.process_time() - computed
        count += 1
    rounded = {name: round(seconds, 2) for name, seconds in found.items()}
    load = round(os.getloadavg()[0], 1)
    return {**rounded, "programs": count, "load": load, "made": provenance()}


def programs(row: str, form: str) -> Iterator[Program]:
    """Yields the functions of a row, and the shapes of their arguments."""
    if row.startswith("demo"):
        yield from demo_programs(row.split()[1].rstrip(","), form)
        return
    name, kind = row.split(", ", 1)
    network, what = name.rsplit(" ", 1)
    model: Any = published_named(network).build()
    params, recipe = abstract_checkpoint(model).params, recipe_of(kind)
    if recipe is not None:
        params = rounded(params, recipe)
    make = sampler_of if what == "sampler" else step_of
    yield make(model, params, form)


def demo_programs(name: str, form: str) -> Iterator[Program]:
    """Yields the samplers of a packaged model: full precision, and every recipe of dynamic ranges."""
    packaged = PACKAGED[name]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = packaged.convert(Path(folder) / "model")
    settings = {"steps": packaged.num_steps, "batch": DEMO_BATCH, "guidance": packaged.guidance}
    params = jax.eval_shape(lambda params: params, checkpoint.params)
    yield sampler_of(checkpoint.model, params, form, **settings)
    for recipe in recipes(checkpoint.params, packaged.group_sizes, False).values():
        act = recipe.rules[0].spec.act
        if act is None or act.mode == "dynamic":
            yield sampler_of(checkpoint.model, rounded(params, recipe), form, **settings)


def rounded(params: Any, recipe: Recipe) -> Any:
    """Returns the shapes of parameters that a recipe quantized."""
    return jax.eval_shape(partial(qdit.quantize_params, recipe=recipe), params)


def recipe_of(kind: str) -> Recipe | None:
    """Returns a row's recipe; None of full precision."""
    if kind == FULL:
        return None
    if kind not in (QUARTERS, BY_LAYER):
        return recipe_named(kind)
    drawn = random.Random(0)
    rules = []
    for block in range(DEPTH):
        for layer in LAYERS:
            size = SIZES[block * len(SIZES) // DEPTH] if kind == QUARTERS else drawn.choice(SIZES)
            spec = recipe_named(f"w4a8-g{size}").rules[0].spec
            rules.append(Rule(f"blocks_{block}/{layer}", spec))
    return Recipe(tuple(rules), kind)


def sampler_of(
    model: Any, params: Any, form: str, *, steps: int = 50, batch: int = 1, guidance: float = 1.5
) -> Program:
    """Returns a sampler as `generate` compiles it, and the shapes of its arguments."""
    shape = model.sample_shape()

    def run(denoise_fn: Any, sampler: Any, key: Any, index: Any, condition: Any) -> Any:
        noise, keys = initial_noise(key, index, shape)
        return qdit.sample(denoise_fn, sampler, noise, condition, keys)

    _, _, condition = model.example_inputs(batch)
    index = jax.ShapeDtypeStruct((batch,), jnp.int32)
    fn = denoiser(model, in_form(model, params, form), guidance)
    return run, (fn, qdit.ddim(steps=steps), jax.random.key(0), index, condition)


def step_of(model: Any, params: Any, form: str) -> Program:
    """Returns a guided step of one sample, and the shapes of its arguments."""
    x, timestep, condition = model.example_inputs(1)
    fn = denoiser(model, in_form(model, params, form), GUIDANCE)
    return (lambda fn, *inputs: fn(*inputs)), (fn, x, timestep, condition)


def in_form(model: Any, params: Any, form: str) -> Any:
    """Returns the shapes of parameters as a loop takes them, or so but without runs of blocks."""

    def unrolled(params: Any) -> Any:
        return with_ready_kernels(model, with_narrow_kernels(model, params))

    fn = partial(running_params, model) if form == "scanned" else unrolled
    return jax.eval_shape(fn, params)


def save(file: Path, rows: dict[str, Any]) -> None:
    """Writes the file."""
    content = {"note": "cold compile times; nothing ran", "made": provenance(), "rows": rows}
    file.write_text(json.dumps(content, indent=1) + "\n")


def table(rows: dict[str, Any]) -> str:
    """Returns the Markdown table: seconds by the clock, in brackets those computed on all cores."""
    lines = [
        "| programs | scanned, s | unrolled, s | ratio (of the computed seconds) |",
        "|---|---|---|---|",
    ]
    for row in ROWS:
        forms = rows.get(row, {})
        if len(forms) < len(FORMS):
            continue
        clock, computed = (
            [statistics.median(one[name] for one in forms[form]) for form in FORMS]
            for name in ("seconds", "cpu_seconds")
        )
        cells = [f"{a:.1f} ({b:.1f})" for a, b in zip(clock, computed, strict=True)]
        ratio = f"{clock[0] / clock[1]:.2f} ({computed[0] / computed[1]:.2f})"
        lines.append(f"| {row} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
