"""Times the search for clipping ranges on a whole network, and the Q-DiT release's algorithm beside it.

    python experiments/benchmarks/make_random_checkpoint.py dit_xl2.pt && qdit convert dit_xl2.pt xl2
    python experiments/benchmarks/bench_ranges.py xl2

Every linear layer of an XL/2 in 4 bits, groups of 128, asymmetric, by three range rules; then the
Q-DiT release's search written as it describes it, a loop in torch over groups and 100 ratios, on the
same weights (skipped where torch is absent). With --torch-seconds too small for the network, torch
runs on the first layer of every shape and the rest is extrapolated by weights.

Expected on 2 free cores (2026-11-23; first run, compilation included): min-max 3 s, `mse` 10 s, the
qdit_release grid 27 s (16 s for the block linears). With `--layers 'blocks_0/.*'`: the loop in
torch 46.6 s (92 CPU s), the qdit_release grid here 1.0 s (1.9) once compiled; 99.9 % of the scales and
99.9999 % of the codes agree (near ties go either way).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

import qdit_jax as qdit
from qdit_jax.memory import give_back_freed_memory
from qdit_jax.quant import integer_codes, quantize
from qdit_jax.report import provenance

GROUP_SIZE = 128
BITS = 4
RULES = {
    "min-max": qdit.ranges.minmax,
    "mse, 50 ratios": qdit.ranges.mse(),
    "qdit_release grid": qdit.ranges.qdit_release_mse,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a full-precision checkpoint folder")
    parser.add_argument("--layers", default=".*", help="regular expression (default: every linear)")
    parser.add_argument("--torch-seconds", type=float, default=300, help="most to spend in torch")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args()
    give_back_freed_memory()
    kernels = kernels_of(args.checkpoint, args.layers)
    weights = sum(w.size for w in kernels.values())
    blocks = qdit.Recipe.preset("w4a16", layers="part:blocks")
    print(f"{len(kernels)} layers, {weights / 1e6:.0f} million weights, {os.cpu_count()} cores")
    print(f"{'rule':18} {'layers':14} {'first run, s':>13} {'again, s':>9} {'CPU s again':>12}")
    found: dict[str, Any] = {"layers": len(kernels), "weights": weights, "made": provenance()}
    in_blocks = {name: w for name, w in kernels.items() if blocks.get(name) is not None}
    for title, rule in RULES.items():
        for what, some in (("block linears", in_blocks), ("all", kernels)):
            jax.clear_caches()
            (first, _), (again, cpu) = (seconds_to_quantize(some, rule) for _ in range(2))
            print(f"{title:18} {what:14} {first:13.1f} {again:9.1f} {cpu:12.1f}", flush=True)
            found[f"{title}, {what}"] = {"first": first, "again": again, "again_cpu": cpu}
    if find_spec("torch") is None:
        print("torch is absent: the release's loop was not run.")
    else:
        found["torch"] = compare_with_torch(kernels, args.torch_seconds)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


def kernels_of(path: Path, layers: str) -> dict[str, jax.Array]:
    """Returns the kernels `[K, N]` of the layers that match, in memory."""
    flat = flatten_dict(qdit.load(path).params, sep="/")
    kernels = {name.removesuffix("/kernel"): w for name, w in flat.items() if "/kernel" in name}
    return {
        name: w.reshape(-1, w.shape[-1])
        for name, w in kernels.items()
        if re.fullmatch(layers, name) and not isinstance(w, qdit.QTensor)
    }


def spec_of(rule: Any) -> qdit.WeightSpec:
    return qdit.WeightSpec(bits=BITS, group_size=GROUP_SIZE, range_fn=rule)


def seconds_to_quantize(kernels: dict[str, jax.Array], rule: Any) -> tuple[float, float]:
    """Returns the seconds, by the clock and of all cores, that all kernels take, one by one."""
    began, cpu = time.perf_counter(), time.process_time()
    for w in kernels.values():
        jax.block_until_ready(quantize(w, spec_of(rule)))
    return time.perf_counter() - began, time.process_time() - cpu


def compare_with_torch(kernels: dict[str, jax.Array], limit: float) -> dict[str, Any]:
    """Prints and returns the torch loop's seconds, and how far codes and scales agree."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    names = list({w.shape: name for name, w in reversed(kernels.items())}.values())
    some = sum(kernels[name].size for name in names)
    every = sum(w.size for w in kernels.values())
    times = {name: timed_in_torch(kernels[name]) for name in names}
    total, cpu = (sum(column) * every / some for column in zip(*times.values(), strict=True))
    how = f"extrapolated by weights from {len(names)} layers, {some / every:.1%} of the weights"
    if total <= limit:
        rest = [name for name in kernels if name not in times]
        times |= {name: timed_in_torch(kernels[name]) for name in rest}
        total, cpu = (sum(column) for column in zip(*times.values(), strict=True))
        how = "measured on every layer"
    print(f"release's loop in torch {torch.__version__}: {total:.1f} s, {cpu:.1f} CPU s, {how}")
    same_scale, same_codes = [], []
    for name in names:
        codes, scale = released_search(torch.from_numpy(np.array(kernels[name].T)))
        q = quantize(kernels[name], spec_of(qdit.ranges.qdit_release_mse))
        same_scale.append(np.isclose(np.asarray(q.scale).T, scale.numpy(), rtol=1e-6).mean())
        same_codes.append((codes.numpy() == np.asarray(integer_codes(q)).T).mean())
        print(f"  {name}: equal scales {same_scale[-1]:.4%}, equal codes {same_codes[-1]:.4%}")
    equal = {"equal_scales": min(same_scale), "equal_codes": min(same_codes)}
    return {"seconds": total, "cpu": cpu, "how": how, **equal}


def timed_in_torch(kernel: jax.Array) -> tuple[float, float]:
    """Returns the seconds of the search, by the clock and of all cores."""
    import torch

    w = torch.from_numpy(np.array(kernel.T))
    began, cpu = time.perf_counter(), time.process_time()
    released_search(w)
    return time.perf_counter() - began, time.process_time() - cpu


def released_search(w: Any) -> tuple[Any, Any]:
    """Returns codes `[N, K]` and scales `[N, G]` of a weight `[N, K]`, group after group.

    The rule of Q-DiT (arXiv:2406.17343) as its release applies it: 100 ratios from 1 to 0.901,
    the least sum of |error|**2.4 for every output channel, the first of equals.
    """
    import torch

    top = 2**BITS - 1
    all_codes, all_scales = [], []
    for x in torch.split(w, GROUP_SIZE, dim=1):
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        best = torch.full_like(low, float("inf"))
        best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
        for step in range(100):
            ratio = 1 - step * 0.1 / 100
            scale = ((high - low) * ratio).clamp(min=1e-5) / top
            zero = torch.clamp(torch.round(-low * ratio / scale), 0, top)
            codes = torch.clamp(torch.round(x / scale) + zero, 0, top)
            error = ((codes - zero) * scale - x).abs().pow(2.4).sum(1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
        all_codes.append(torch.clamp(torch.round(x / best_scale) + best_zero, 0, top))
        all_scales.append(best_scale)
    return torch.cat(all_codes, 1), torch.cat(all_scales, 1)


if __name__ == "__main__":
    main()
