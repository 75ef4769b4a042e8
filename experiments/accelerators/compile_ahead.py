"""Compiles DiT-XL/2's layers and steps for a TPU or a GPU that is not here, and reads what the compiler says.

    python experiments/accelerators/compile_ahead.py --targets v5e v6e --out runs/compile_ahead
    python experiments/accelerators/compile_ahead.py --target-config h100.txtpb --out runs/compile_ahead

Nothing runs, so nothing here is a time: seconds are those of the compiler, bytes and FLOPs what it
counts, cycles what it estimates of each operation (TPUs; not of a Pallas kernel, nor where the compiler
gives none). The layers are qkv, proj, fc1 and fc2 on 16 x 256 tokens, on a GPU on 2 x 256 as well; a step is
one guided call of the network in bfloat16, compiled as the sampler compiles it; of a TPU's its operations too, and
the bytes that they move by the compiler's count (by its own of a kernel).

Of a kernel for GPUs, `ptxas` says registers, spills, shared memory and whether it makes tensor cores wait
for each product; spills and waits fail. `roofline_us` is arithmetic, not the compiler's: the larger of
operations at an H100's full rate and bytes at its full bandwidth, with the quantizer; in groups, also of what
scales the sums. `step_roofline` is the same of every operation of a compiled step, added up (`hlo_roofline.py`). A step on
a GPU is compiled twice, XLA's products by Triton (untuned: there is no GPU to tune on) and by cuBLASLt, and the way that
counts less is kept, with both counts. `bound_us` of a layer, and of a TPU's step, is the larger of all of its operations at
the device's full rate and all of its bytes. Arguments and temporaries have to fit into the device's memory.

Needs an environment of its own, Python 3.12 or newer: `pip install "jax[tpu]>=0.12"` for TPUs, or
`pip install "jax[cuda12]>=0.12"` for GPUs, and this package. `--target-config` is a file with XLA's
description of a GPU (`GpuTargetConfigProto` as text).

OUT/compile_ahead.json is saved after every program, and the same command goes on from there;
OUT/compile_ahead.md is its table. Expected: about 5 minutes a TPU or GPU on 2 cores with other
work; kernels of w4a8-fast and w8a8-fast in each of them, in a layer no temporaries but a GPU's inputs in int8 or FP8.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# Read when JAX looks for devices: the host's CPU, and no TPU to ask or to log to.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_LOG_DIR", "disabled")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
# What `ptxas` says of kernels is read back from here.
os.environ.setdefault("MOSAIC_GPU_DUMP_TO", tempfile.mkdtemp(prefix="compile_ahead_"))
os.environ.setdefault("MOSAIC_GPU_DUMP_PTXAS", "1")

import jax
import jax.numpy as jnp
import numpy as np
from gpu_reports import emptied, kernel_reports, layer_roofline
from hlo_roofline import FREE, step_roofline
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import qdit_jax as qdit
from qdit_jax.kernels import implementation_of, quantized_matmul
from qdit_jax.models import DiT, family_of, published_config
from qdit_jax.report import provenance
from qdit_jax.sampling import (
    HoistedDenoiser,
    denoiser,
    known_outputs,
    with_narrow_kernels,
    with_ready_kernels,
)
from qdit_jax.speed import DEVICES, recipe_named

TOKENS, FEW_TOKENS = 16 * 256, 2 * 256  # guided steps of 8 samples and of 1
LAYERS = {"qkv": (1152, 3456), "proj": (1152, 1152), "fc1": (1152, 4608), "fc2": (4608, 1152)}
PRESETS = ("w4a8-fast", "w8a8-fast")
WEIGHTS = "w4a16"  # 16-bit inputs
GROUPS = "w4a8-g128"  # a scale and a zero point per group, inputs too
OTHER_GROUPS = ("w4a8-g32", "w4a8-g288")  # layers alone
FP8 = "fp8_e4m3"  # on both sides, which TPUs before v7 have no units for
# Who computes a recipe on a TPU, on a GPU.
KERNELS = {
    True: {**dict.fromkeys(PRESETS, "tpu_levels"), WEIGHTS: "tpu_weights", GROUPS: "tpu_groups"},
    False: {
        **dict.fromkeys(PRESETS, "gpu_levels"),
        **{WEIGHTS: "gpu_weights", GROUPS: "gpu_groups", FP8: "gpu_fp8"},
    },
}
CALLS = {
    True: r'custom_call_target="tpu_custom_call".*tpu_(?:levels|weights|groups)',
    False: r'"mosaic_gpu_v2"',
}
DTYPE = "bfloat16"
# What the products of a recipe multiply, where it is not int8.
MULTIPLIED = {"float32": "float32", DTYPE: DTYPE, WEIGHTS: DTYPE, FP8: "float8"}
# Who computes XLA's products on a GPU. A run there measures which is faster, product by product; here it cannot.
WAYS = {"Triton": {}, "cuBLASLt": {"xla_gpu_enable_triton_gemm": False}}


class Program(NamedTuple):
    """What is compiled: a function and the shapes of its arguments."""

    name: str
    fn: Callable[..., Any]
    arguments: tuple[Any, ...]
    expects_kernel: bool | None  # None: may have it
    roofline_us: float | None = None  # of a layer on an H100, counted from its shapes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="*", default=[], help="TPUs: v5e, v5p, v6e")
    parser.add_argument("--target-config", type=Path, help="a GPU's description")
    parser.add_argument("--only", default="", help="part of the programs' names, such as layer")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8], help="samples of a step")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not args.targets and args.target_config is None:
        parser.error("give --targets, --target-config or both")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "compile_ahead.json"
    kept = json.loads(file.read_text())["programs"] if file.exists() else {}
    kept = {name: with_bounds(name, row) for name, row in kept.items()}
    for target in [*args.targets, *([args.target_config] if args.target_config else [])]:
        sharding, is_tpu = device(target)
        kind = getattr(target, "stem", target)
        for program in programs(is_tpu, args.batches):
            name = f"{kind} {program.name}"
            if args.only in name and name not in kept:
                kept[name] = {
                    "target": kind,
                    **compiled(program, sharding, kind),
                    "made": versions_and_date(),
                }
                kept[name] = with_bounds(name, kept[name])
                print(name, {k: v for k, v in kept[name].items() if k != "made"}, flush=True)
                file.write_text(
                    json.dumps({"note": "compiled, not run", "programs": kept}, indent=1)
                )
    (args.out / "compile_ahead.md").write_text(table(kept))


def device(target: str | Path) -> tuple[SingleDeviceSharding, bool]:
    """Returns a place on a device that is not here, and whether it is a TPU."""
    if isinstance(target, Path):
        config = target.read_text()
        topology = topologies.get_topology_desc(
            "", platform="cuda", topology="1x1x1", target_config=config
        )
    else:
        topology = topologies.get_topology_desc(f"{target}:2x2", platform="tpu")
    return SingleDeviceSharding(topology.devices[0]), isinstance(target, str)


def programs(is_tpu: bool, batches: list[int]) -> Iterator[Program]:
    """Yields the layers and the steps."""
    for layer in LAYERS:
        for tokens in (TOKENS,) if is_tpu else (TOKENS, FEW_TOKENS):
            yield from full_precision(layer, tokens, is_tpu)
            for preset in (*KERNELS[is_tpu], *OTHER_GROUPS):
                yield from quantized(layer, tokens, preset, is_tpu)
    for batch in batches:
        for recipe in (None, *KERNELS[is_tpu]):
            name = f"step {batch} {recipe or DTYPE}"
            fn, (denoise_fn, *inputs) = step(recipe, batch, is_tpu)
            yield Program(name, fn, (denoise_fn, *inputs), bool(recipe))
            ahead = with_known_modulation(denoise_fn, *inputs)
            yield Program(f"{name}, hoisted", fn, (ahead, *inputs), bool(recipe))


def title(layer: str, tokens: int) -> str:
    return f"layer {layer}" if tokens == TOKENS else f"layer {layer} of {tokens}"


def full_precision(layer: str, tokens: int, is_tpu: bool) -> Iterator[Program]:
    """Yields a layer that is not quantized."""
    channels, width = LAYERS[layer]
    for dtype in ("float32", DTYPE):
        shapes = (shape((tokens, channels), dtype), shape((channels, width), dtype))
        counted = layer_roofline(tokens, channels, width, None) if dtype == DTYPE else None
        name = f"{title(layer, tokens)} {dtype}"
        yield Program(name, jnp.matmul, shapes, False, None if is_tpu else counted)


def quantized(layer: str, tokens: int, preset: str, is_tpu: bool) -> Iterator[Program]:
    """Yields a layer by XLA's operations and by the kernel."""
    channels, width = LAYERS[layer]
    spec = recipe_named(preset).rules[0].spec
    kernel = KERNELS[is_tpu][GROUPS if preset in OTHER_GROUPS else preset]
    numerics = "integer" if spec.act else "simulated"
    q = jax.eval_shape(lambda w: qdit.quantize(w, spec.weight), shape((channels, width), "float32"))
    x = shape((tokens, channels), DTYPE)

    def product(implementation: str | None) -> Callable[..., Any]:
        return lambda x, q: quantized_matmul(x, q, spec.act, numerics, implementation)

    name = f"{title(layer, tokens)} {preset}"
    yield Program(f"{name} xla", product("xla"), (x, q), False)
    # It is the first that fits: the kernel refuses what it cannot hold, and cuts all else into blocks.
    platform = "tpu" if is_tpu else "cuda"
    assert implementation_of(x.shape, q, spec.act, numerics, platform, dtype=DTYPE) == kernel
    counted = None if is_tpu else layer_roofline(tokens, channels, width, spec)
    yield Program(f"{name} {kernel}", product(None), (x, q), True, counted)


def step(
    recipe: str | None, batch: int, is_tpu: bool
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns a guided step of DiT-XL/2 and the shapes of its arguments."""
    model = DiT(**published_config("DiT-XL/2"), dtype=DTYPE)
    params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    if recipe is not None:
        chosen = recipe_named(recipe)
        params = jax.eval_shape(lambda params: qdit.quantize_params(params, recipe=chosen), params)
        model = model.clone(numerics="simulated" if recipe == WEIGHTS else "integer")
    platform = "tpu" if is_tpu else "cuda"

    def running(params: Any) -> Any:  # as `generate` has them, but for runs of blocks
        narrow = with_narrow_kernels(model, params)
        return with_ready_kernels(model, narrow, platform=platform)

    params = jax.eval_shape(running, params)
    denoise_fn = denoiser(model, params, 1.5)
    x = shape((batch, *model.sample_shape()), "float32")
    rest = (shape((batch,), "float32"), shape((batch,), "int32"))
    return (lambda fn, *inputs: fn(*inputs)), (denoise_fn, x, *rest)


def with_known_modulation(
    denoise_fn: Any, x: jax.ShapeDtypeStruct, _: object, labels: jax.ShapeDtypeStruct
) -> Any:
    """Returns the denoiser of a step of 50 whose modulation was computed before the loop."""
    inner = denoise_fn.denoise_fn
    family = family_of(inner.model)
    compute = partial(
        known_outputs, pattern=family.part_pattern(family.rounded_first), shape=x.shape
    )
    timesteps = shape((50,), "float32")
    known, condition = jax.eval_shape(compute, denoise_fn, timesteps, labels)
    ahead = HoistedDenoiser(inner.params, known, timesteps, condition, inner.model)
    return dataclasses.replace(denoise_fn, denoise_fn=ahead)


def shape(size: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(size, jnp.dtype(dtype))


def compiled(program: Program, sharding: SingleDeviceSharding, kind: str) -> dict[str, Any]:
    """Returns what the compiler says of a program: of a step on a GPU the way that counts less, and both counts."""

    def placed(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf), sharding=sharding)

    is_tpu, is_step = DEVICES[kind].platform == "tpu", program.name.startswith("step")
    emptied(Path(os.environ["MOSAIC_GPU_DUMP_TO"]))
    began = time.perf_counter()
    lowered = jax.jit(program.fn).lower(*jax.tree.map(placed, program.arguments))
    trace_seconds = round(time.perf_counter() - began, 2)
    first, *others = WAYS if is_step and not is_tpu else [""]
    found = {first: said(program, lowered, is_tpu, first)}
    reports = kernel_reports(Path(os.environ["MOSAIC_GPU_DUMP_TO"]), "gpu_")
    # A step may have kernels of layers only, which were compiled, and reported, with those.
    kernels = found[first]["kernels"]
    is_told = bool(reports) == bool(kernels) or (kernels and is_step)
    assert is_tpu or is_told, f"{program.name}: no report of a kernel"
    found |= {way: said(program, lowered, is_tpu, way) for way in others}
    counted = {way: row["step_roofline"]["us"] for way, row in found.items() if way}
    way = min(counted, key=counted.__getitem__) if counted else first
    row = {"trace_seconds": trace_seconds, **found[way]}
    if counted:
        row |= {"products": way, "us_by_products": counted}
    if reports:
        row["kernel_reports"] = reports
    if program.roofline_us is not None:
        row["roofline_us"] = program.roofline_us
    return row


def said(program: Program, lowered: jax.stages.Lowered, is_tpu: bool, way: str) -> dict[str, Any]:
    """Returns what the compiler says of a lowered program, its products left to a way of `WAYS`."""
    began = time.perf_counter()
    done = lowered.compile(compiler_options=WAYS.get(way))
    seconds = time.perf_counter() - began
    text, memory, costs = done.as_text(), done.memory_analysis(), done.cost_analysis() or {}
    kernels = len(re.findall(CALLS[is_tpu], text))
    expected = bool(kernels) if program.expects_kernel is None else program.expects_kernel
    assert bool(kernels) == expected, f"{program.name}: {kernels} calls of a kernel"
    found = {
        "compile_seconds": round(seconds, 2),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops": costs.get("flops"),
        "kernels": kernels,
        "estimated_cycles": None if kernels else cycles(text),
    }
    if is_tpu and program.name.startswith("step"):
        found |= {"bytes": costs.get("bytes accessed"), "operations": operations(text)}
    if not is_tpu and program.name.startswith("step"):
        found["step_roofline"] = step_roofline(text)
    return found


def with_bounds(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row with the least time of its program, `bound_us`: all operations at the full rate, or all bytes.

    Operations of a layer are those of its product, counted from its shape, and bytes its arguments and its result, each
    once; those of a TPU's step are the compiler's. A GPU's step has `step_roofline`.

    Raises:
        AssertionError: if arguments and temporaries do not fit into the device's memory.
    """
    device = DEVICES[row["target"]]
    assert row["argument_bytes"] + row["temporary_bytes"] <= device.memory, f"{name} does not fit"
    _, program, *words = name.split(" ")
    if program == "layer":
        tokens = FEW_TOKENS if f"of {FEW_TOKENS}" in name else TOKENS
        channels, width = LAYERS[words[0]]
        recipe = words[3 if tokens == FEW_TOKENS else 1]
        itemsize = 4 if recipe == "float32" else 2
        flops = 2.0 * tokens * channels * width
        moved = row["argument_bytes"] + itemsize * tokens * width
        row = {**row, "product_flops": flops, "bytes": moved}
    elif device.platform == "tpu":
        recipe, flops, moved = words[1].rstrip(","), row["flops"], row["bytes"]
    else:
        return row
    bound = max(flops / device.rates[MULTIPLIED.get(recipe, "int8")], moved / device.bandwidth)
    return {**row, "bound_us": round(1e6 * bound, 2)}


def operations(text: str) -> int:
    """Returns how many operations a program has, without its copies to and from a TPU's vector memory."""
    kinds = re.findall(
        r"\n\s+(?:ROOT )?%[\w.\-]+ = (?:\(.*?\)|\S+) ([\w\-]+)\(", text[text.index("\nENTRY") :]
    )
    return sum(kind not in FREE and not kind.endswith(("-start", "-done")) for kind in kinds)


def cycles(text: str) -> int | None:
    """Returns the sum of estimated cycles over the operations of the entry computation."""
    found = re.findall(r'"estimated_cycles":"(\d+)"', text[text.index("\nENTRY") :])
    return sum(map(int, found)) if found else None


def versions_and_date() -> dict[str, str]:
    """Returns the date, the machine, the commit and the versions of what compiled."""
    versions = provenance()
    described = ["git", "describe", "--always", "--dirty"]
    versions["commit"] = subprocess.run(
        described, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    ).stdout.strip()
    for package in ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def table(kept: dict[str, Any]) -> str:
    """Returns the Markdown table."""
    lines = [
        "Compiled, not run.\n",
        "| program | compile s | arguments MB | temporary MB | GFLOP | estimated kilocycles | kernels "
        "| counted us | registers | shared KB | MB moved | operations "
        "| bound us | products |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in kept.items():
        numbers = (
            f"{row['compile_seconds']:.1f}",
            f"{row['argument_bytes'] / 1e6:.1f}",
            f"{row['temporary_bytes'] / 1e6:.1f}",
            f"{(row['flops'] or row.get('product_flops', 0)) / 1e9:.0f}",
            f"{row['estimated_cycles'] / 1e3:.0f}" if row["estimated_cycles"] else "",
            str(row["kernels"]),
            str(row.get("roofline_us", row.get("step_roofline", {}).get("us", ""))),
            ", ".join(str(r["registers"]) for r in row.get("kernel_reports", [])),
            ", ".join(
                f"{r['shared_bytes'] / 1e3:.0f}"
                for r in row.get("kernel_reports", [])
                if "shared_bytes" in r
            ),
            f"{row['bytes'] / 1e6:.0f}" if "bytes" in row else "",
            str(row.get("operations", "")),
            str(row.get("bound_us", "")),
            row.get("products", ""),
        )
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
