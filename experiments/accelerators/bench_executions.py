"""Times one network in full precision and quantized, and reads how much device memory each takes.

    python experiments/accelerators/bench_executions.py --model DiT-XL/2 --batch-size 8 --out runs/executions.json
    python experiments/accelerators/bench_executions.py --model DiT-S/2 --batch-size 2 --steps 2     # on a CPU

Random weights of the published size are made on the device. Every variant samples the same noise
with guidance through the compiled loop; the rounds of all variants are interleaved, and the ratio
to full precision is the median over rounds. "arguments" are the bytes of weights and inputs,
"temporary" what the compiled loop needs beside them, both as XLA counts them: a network whose
weights were dequantized all at once would show in the latter.

Expected on an H100 (2026-11-23, jax 0.11.2): full precision 22.6 ms a step with products in TF32, 92.5
in float32; W4A8 simulated 96, integer 116; 0.35 GB of arguments in place of 2.70. On 2 CPU cores,
DiT-S/2: all within a tenth of full precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qdit_jax as qdit
from qdit_jax.allocation import Rollout, seeds
from qdit_jax.models import DiT, published_config
from qdit_jax.report import provenance

LAYERS = r"(?!.*/operands/).*"  # all but the operands of attention


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run the network; bits None is full precision."""

    name: str
    bits: tuple[int, int] | None = None
    numerics: str = "simulated"
    precision: str = "default"


VARIANTS = (
    Variant("full precision"),
    Variant("full precision, float32 products", precision="highest"),
    Variant("W4A8 simulated", (4, 8)),
    Variant("W4A8 integer", (4, 8), "integer"),
    Variant("W8A8 simulated", (8, 8)),
    Variant("W8A8 integer", (8, 8), "integer"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="DiT-XL/2", help="a published size (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="DDIM steps (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each (%(default)s)")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--only", default="", help="part of the variants' names, such as W4A8")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    device = jax.devices()[0]
    model, params = random_network(args.model)
    variants = [v for v in VARIANTS if v.bits is None or args.only in v.name]
    runs, found = {}, {}
    for variant in variants:
        runs[variant.name], found[variant.name] = prepared(variant, model, params, args)
        print(
            f"compiled {variant.name} in {found[variant.name]['compile_seconds']:.1f} s", flush=True
        )
    del params
    seconds = interleaved(runs, args.rounds)
    base = np.array(seconds["full precision"])
    print(
        f"\n{args.model}, batch {args.batch_size}, {args.steps} steps with guidance, {device.device_kind}"
    )
    print(
        f"{'variant':34} {'ms a step':>10} {'x full':>7} {'arguments GB':>13} {'temporary GB':>13}"
    )
    for name, row in found.items():
        row |= {
            "seconds": seconds[name],
            "ratio": float(np.median(np.array(seconds[name]) / base)),
        }
        ms = 1000 * float(np.median(seconds[name])) / args.steps
        print(
            f"{name:34} {ms:10.1f} {row['ratio']:7.2f} {row['argument_bytes'] / 1e9:13.3f} "
            f"{row['temporary_bytes'] / 1e9:13.3f}"
        )
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        summary = {"made": provenance(), **settings, "variants": found}
        args.out.write_text(json.dumps(summary, indent=1))


def random_network(name: str) -> tuple[DiT, Any]:
    """Returns a network of a published size with normal weights, made on the device."""
    model = DiT(**published_config(name))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    values = [0.02 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return model, jax.tree.unflatten(tree, values)


def prepared(
    variant: Variant, model: DiT, params: Any, args: argparse.Namespace
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Returns what samples once and waits, run once already, and what its program needs."""
    if variant.bits is not None:
        weight, act = variant.bits
        spec = {
            "weight": qdit.WeightSpec(weight, args.group_size, scale_dtype="float16"),
            "act": qdit.ActSpec(act, args.group_size),
        }
        recipe = qdit.Recipe((qdit.Rule(LAYERS, qdit.LayerSpec(**spec)),))
        params = qdit.quantize_params(params, recipe=recipe)
    sampler = qdit.ddim(steps=args.steps)
    rollout = Rollout.of(model.clone(numerics=variant.numerics), sampler, 1.5)
    data = tuple(a[0] for a in seeds(model, jax.random.key(1), 1, args.batch_size))
    began = time.perf_counter()
    with jax.default_matmul_precision(variant.precision):
        compiled = (
            jax.jit(lambda rollout, *rest: rollout(*rest)).lower(rollout, params, *data).compile()
        )
    memory = compiled.memory_analysis()
    figures = {
        "compile_seconds": time.perf_counter() - began,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }

    def run() -> Any:
        return compiled(rollout, params, *data).block_until_ready()

    assert bool(jnp.isfinite(run()).all())
    return run, figures


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of every run in every round, one of each in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
