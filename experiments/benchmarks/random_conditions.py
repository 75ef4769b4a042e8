"""Writes the condition of one random prompt for a network, of its own length.

python experiments/benchmarks/random_conditions.py wan runs/random.npz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from qdit_jax.checkpoint import open_checkpoint
from qdit_jax.speed import random_condition


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="ends with .npz")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = open_checkpoint(args.checkpoint).model
    condition = dict(random_condition(model.example_condition(1), args.seed))
    if model.has_null:
        condition |= {f"null_{name}": np.zeros_like(entry) for name, entry in condition.items()}
    np.savez(args.out, **condition)


if __name__ == "__main__":
    main()
