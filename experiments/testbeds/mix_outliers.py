"""Gives a DiT outliers that lie in no single channel, without changing what it computes.

    python experiments/testbeds/mix_outliers.py demo_dit.safetensors mixed.safetensors --num-heads 4

Takes seconds. In every block, one random direction of each head's values grows by `--factor` and the
projection behind it shrinks as much: with M = I + (f - 1) u uᵀ, columns of v become `W_v M` and rows
of proj `M⁻¹ W`, which is exact because attention only averages values. The outliers at the input of
proj then spread over all channels of a head, so that scales per channel cannot undo them, while a
rotation or a low-rank branch can. Nothing of the kind fits the inputs of qkv, fc1 (a modulation that
differs by sample stands before them) and fc2 (a GELU does): those stay as they are.

Expected: the printed change of the output is below 1e-4.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from inject_outliers import largest_change
from published_layout import write_published
from testbed_measures import read_checkpoint


def mixed(params: Any, num_heads: int, factor: float, seed: int = 0) -> Any:
    """Returns parameters of the same function whose values have outlier directions."""
    flat = dict(flatten_dict(params, sep="/"))
    rng = np.random.default_rng(seed)
    for path in [p for p in flat if p.endswith("attn/qkv/kernel")]:
        block = path.removesuffix("attn/qkv/kernel")
        matrix, inverse = directions(rng, flat[path].shape[0], num_heads, factor)
        for name in (path, f"{block}attn/qkv/bias"):
            both, values = np.split(np.asarray(flat[name], np.float64), [2 * len(matrix)], axis=-1)
            flat[name] = np.concatenate([both, values @ matrix], axis=-1).astype(np.float32)
        name = f"{block}attn/proj/kernel"
        flat[name] = (inverse @ np.asarray(flat[name], np.float64)).astype(np.float32)
    return unflatten_dict(flat, sep="/")


def directions(
    rng: np.random.Generator, width: int, num_heads: int, factor: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a block-diagonal matrix `[width, width]`, a block per head, and its inverse."""
    size = width // num_heads
    matrix, inverse = np.eye(width), np.eye(width)
    for head in range(num_heads):
        u = rng.standard_normal(size)
        line = np.outer(u, u) / (u @ u)
        span = slice(head * size, (head + 1) * size)
        matrix[span, span] += (factor - 1) * line
        inverse[span, span] += (1 / factor - 1) * line
    return matrix, inverse


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="weights in the published layout")
    parser.add_argument("out", type=Path, help="the .safetensors file to write, half precision")
    parser.add_argument("--num-heads", type=int, required=True)
    parser.add_argument("--factor", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    checkpoint = read_checkpoint(args.source, args.num_heads)
    params = mixed(checkpoint.params, args.num_heads, args.factor, args.seed)
    print(f"largest change of the output: {largest_change(checkpoint, params):.2g}")
    write_published(args.out, params)


if __name__ == "__main__":
    main()
