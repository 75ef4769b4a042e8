"""Compiles guided steps of published networks for this CPU, a TPU and a GPU, and reads the memory they need.

    python experiments/accelerators/compile_networks.py --targets cpu v5e --out runs/networks
    python experiments/accelerators/compile_networks.py --target-config h100.txtpb --out runs/networks

By default networks of videos: STDiT3 at 16 x 256 x 256 and at 51 x 480p, Wan 2.1 1.3B at 81 x 480 x 832,
each in float32, bfloat16, W8A8 and W4A8, one sample with guidance. Nothing runs: arguments and
temporaries are those of the compiled program (`memory_analysis`), from shapes alone; milliseconds are the
step's at the device's full rates (`qdit bench --dry-run`), not measured. A program that the compiler refuses
stays with its sentence, such as the memory that it would need.

What the CPU's fused operations hold is in no figure of its compiler (attention of 4,096 tokens took 3.2 GB where it
counts 0.1): its rows have the weights of the largest attention beside them, which are in memory there.

For this CPU alone any environment does; for others see `compile_ahead.py`. OUT/compile_networks.json is
saved after every program, and the same command goes on from there; OUT/compile_networks.md is its table.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from compile_ahead import Program, compiled, device, shape, versions_and_date
from jax.sharding import SingleDeviceSharding

import qdit_jax as qdit
from qdit_jax.models import attention_calls, published_named
from qdit_jax.sampling import denoiser, running_params
from qdit_jax.speed import DEVICES, abstract_checkpoint, devices_named, predicted, recipe_named

NETWORKS = ("STDiT3-16x256x256", "STDiT3-51x480p", "Wan2.1-T2V-1.3B")
FORMATS = ("float32", "bfloat16", "w8a8-fast", "w4a8-fast")
CPU = "cpu"
GUIDANCE = 4.0  # of any number; a step calls the network on the sample and on its null sample


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--targets", nargs="*", default=[], help="cpu; TPUs: v5e, v5p, v6e")
    parser.add_argument("--target-config", type=Path, help="a GPU's description")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "compile_networks.json"
    kept = json.loads(file.read_text())["programs"] if file.exists() else {}
    for target in [*args.targets, *([args.target_config] if args.target_config else [])]:
        kind, sharding, is_tpu = place(target)
        for network in args.networks:
            for name in args.formats:
                title = f"{kind} {network} {name}"
                if title not in kept:
                    kept[title] = row(network, name, kind, sharding, is_tpu)
                    print(title, kept[title], flush=True)
                    content = {"note": "compiled, not run", "programs": kept}
                    file.write_text(json.dumps(content, indent=1) + "\n")
    (args.out / "compile_networks.md").write_text(table(kept))
    print(table(kept))


def place(target: str | Path) -> tuple[str, SingleDeviceSharding, bool]:
    """Returns a target's name, a place on it, and whether it is a TPU."""
    if target == CPU:
        return CPU, SingleDeviceSharding(jax.devices("cpu")[0]), False
    return str(getattr(target, "stem", target)), *device(target)


def row(
    network: str, name: str, kind: str, sharding: SingleDeviceSharding, is_tpu: bool
) -> dict[str, Any]:
    """Returns what compiler and counting say of one network in one format."""
    fn, arguments = step(network, name)
    facts = {"network": network, "format": name, "target": kind, "made": versions_and_date()}
    facts["milliseconds_at_full_rates"] = counted(network, name, kind)
    try:
        said = compiled(Program(network, fn, arguments, None), sharding, is_tpu)
    except jax.errors.JaxRuntimeError as error:
        return {**facts, "refused": first_sentence(str(error))}
    if kind == CPU:
        said["attention_weight_bytes"] = attention_weight_bytes(network)
    return {**facts, **said}


def attention_weight_bytes(network: str) -> int:
    """Returns the bytes of the largest attention's weights in float32, of a sample and its null sample."""
    calls = attention_calls(published_named(network).build())
    return max(2 * 4 * c.query[0] * c.query[2] * c.query[1] * c.key[1] for c in calls)


def step(network: str, name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns a guided step of one sample and the shapes of its arguments."""
    dtype = name if name in ("float32", "bfloat16") else "bfloat16"
    model: Any = published_named(network).build().clone(dtype=dtype)
    params = abstract_checkpoint(model).params
    if name != dtype:
        recipe = recipe_named(name)
        params = jax.eval_shape(lambda p: qdit.quantize_params(p, recipe=recipe), params)
        model = model.clone(numerics="integer")
    params = jax.eval_shape(lambda p: running_params(model, p), params)
    x, timestep, condition = model.example_inputs(1)
    null = {f"null_{k}": v for k, v in condition.items() if k in ("text", "text_mask")}
    arguments = (denoiser(model, params, GUIDANCE), x, timestep, {**condition, **null})
    return (lambda fn, *inputs: fn(*inputs)), jax.tree.map(
        lambda leaf: shape(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf, arguments
    )


def counted(network: str, name: str, kind: str) -> float | None:
    """Returns the milliseconds of a step at a device's full rates; None of one without known rates."""
    if kind not in DEVICES:
        return None
    published = published_named(network)
    recipes = [] if name in ("float32", "bfloat16") else [recipe_named(name)]
    rows = predicted(
        abstract_checkpoint(published.build()),
        recipes,
        [1],
        2,
        devices=devices_named([kind]),
        dtype="bfloat16",
    )
    (found,) = [r for r in rows if r.title == name] if not recipes else rows[-1:]
    return round(found.milliseconds[kind], 2)


def first_sentence(text: str) -> str:
    """Returns the line of a compiler's message that names the memory, else its first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next(
        (line for line in lines if re.search(r"[Uu]sed .* of .* hbm|exceed", line)), lines[0]
    )


def table(kept: dict[str, Any]) -> str:
    """Returns the Markdown table."""
    lines = [
        "One sample with guidance. Compiled, not run.\n",
        "| network | format | target | arguments GB | temporaries GB | ms at full rates | compile s |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in kept.values():
        head = f"| {found['network']} | {found['format']} | {found['target']} |"
        time = found["milliseconds_at_full_rates"]
        shown = "" if time is None else f"{time:.4g}"
        if "refused" in found:
            lines.append(f"{head} refused: {found['refused']} | | {shown} | |")
            continue
        sizes = [f"{found[key] / 1e9:.2f}" for key in ("argument_bytes", "temporary_bytes")]
        if weights := found.get("attention_weight_bytes"):
            sizes[1] += f" + {weights / 1e9:.2f} of attention"
        lines.append(f"{head} {' | '.join(sizes)} | {shown} | {found['compile_seconds']:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
