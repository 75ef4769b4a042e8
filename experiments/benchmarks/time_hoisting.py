"""Times sampling with the modulation computed before the loop against inside of it, in turn.

    python experiments/benchmarks/time_hoisting.py --model DiT-S/2 --samples 1 --steps 5 --out runs/hoisting.json

Random weights, guided samples, both programs compiled before; the ratio is the median over rounds, A B A B. Hoisting
itself is timed apart, compiled and run. Expected on 2 CPU cores: a ratio near 1, for the modulation is a small part of a
step there; what it saves is reading its weights (XL/2: 0.9 GB in float32) in every step.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import qdit_jax as qdit
from qdit_jax.models import DiT, published_config
from qdit_jax.report import provenance
from qdit_jax.sampling import denoiser, hoisted, running_params, sampler_timesteps
from qdit_jax.speed import Call, interleaved, ratio, taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="DiT-S/2", help="a published size (%(default)s)")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = DiT(**published_config(args.model))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    values = [0.02 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(tree, values)
    sampler, labels = qdit.ddim(steps=args.steps), jnp.arange(args.samples)
    noise = jax.random.normal(jax.random.key(1), (args.samples, *model.sample_shape()))
    began = time.perf_counter()
    ahead = jax.block_until_ready(hoisted(model, params, sampler_timesteps(sampler), labels, 1.5))
    seconds = time.perf_counter() - began
    inside = denoiser(model, running_params(model, params), 1.5)
    calls = [
        Call("in the loop", lambda: qdit.sample(inside, sampler, noise, labels)),
        Call("before the loop", lambda: qdit.sample(ahead, sampler, noise, labels)),
    ]
    first, second = (call.run() for call in calls)
    error = float(jnp.linalg.norm(first - second) / jnp.linalg.norm(first))
    assert error < 1e-5, error
    times = interleaved(calls, args.rounds)
    found = {
        "made": provenance(),
        "settings": {**vars(args), "out": None},
        "cores": os.cpu_count(),
        "relative_error": error,
        "hoisting_seconds": seconds,
        "known_bytes": sum(a.nbytes for a in ahead.denoise_fn.known.values()),
        "milliseconds": [vars(taken(1000 * row)) for row in times],
        "ratio": vars(ratio(times[1], times[0])),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
