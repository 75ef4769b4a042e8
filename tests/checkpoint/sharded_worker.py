"""Loads a quantized checkpoint over eight devices and prints what differs from one device's.

python sharded_worker.py FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

import qdit_jax as qdit
from qdit_jax.checkpoint import encode_params, split_over
from qdit_jax.ptq import quantize_params
from qdit_jax.recipes import Recipe
from qdit_jax.sampling import device_mesh
from qdit_jax.testing import realistic_dit

given: list[int] = []  # bytes of every array that a device was given


def watching(device_put):
    """Returns JAX's `device_put` that writes down how large the arrays are."""

    def put(x, *args, **kwargs):
        given.extend(leaf.nbytes for leaf in jax.tree.leaves(x) if hasattr(leaf, "nbytes"))
        return device_put(x, *args, **kwargs)

    return put


def quantized():
    """Returns a quantized checkpoint whose arrays eight devices divide."""
    model, params = realistic_dit(0, hidden_size=64, depth=1, num_heads=2)
    recipe = Recipe.preset("w4a8", params, group_size=32)
    params = quantize_params(params, recipe=recipe)
    return dataclasses.replace(qdit.Checkpoint(model, params), recipe=recipe)


def arrays(checkpoint):
    return flatten_dict(encode_params(checkpoint.params)[0], sep="/")


def main() -> None:
    folder = Path(sys.argv[1])
    checkpoint = quantized()
    whole = {name: np.asarray(array) for name, array in arrays(checkpoint).items()}
    mesh = device_mesh(jax.devices())
    place = split_over(mesh)
    jax.device_put = watching(jax.device_put)
    results = {}
    for name in ("folder", "file.safetensors"):
        qdit.save(folder / name, checkpoint)
        given.clear()
        found = arrays(qdit.load(folder / name, sharding=place))
        split = [n for n, a in found.items() if not a.sharding.is_fully_replicated]
        largest_part = max(whole[n].nbytes for n in split) // 8
        replicated = max((a.nbytes for n, a in whole.items() if n not in split), default=0)
        results[name] = {
            "num_split": len(split),
            "differing": [n for n, a in found.items() if not np.array_equal(a, whole[n])],
            "wrong_sharding": [
                n
                for n, a in found.items()
                if a.sharding != place(n, a.shape) or len(a.sharding.device_set) != 8
            ]
            + [n for n in split if found[n].addressable_shards[0].data.size * 8 != found[n].size],
            "too_large": [size for size in given if size > max(largest_part, replicated)],
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
