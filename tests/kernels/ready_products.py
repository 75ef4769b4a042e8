"""Products of kernels in groups that are ready, by the kernel for GPUs, interpreted on CPU. As a script, JSON."""

import json
import sys

import jax.numpy as jnp
import numpy as np

from qdit_jax.kernels.gpu_reasons import GPU_GROUPS
from qdit_jax.kernels.gpu_tiles import Tiles
from qdit_jax.quant import ActQuant, ActSpec, WeightSpec, quantize, readied

SPECS = {
    "4 bits": WeightSpec(4, 128),
    "symmetric": WeightSpec(4, 128, symmetric=True),
    "8 bits": WeightSpec(8, 128),
    "groups of 32": WeightSpec(4, 32),
}
ACT_GROUPS = (128, 64)


def is_equal(spec, act_group):
    """Returns whether a product is the same, to the bit, with a kernel that is ready."""
    from jax.experimental.pallas import mosaic_gpu

    rng = np.random.default_rng(0)
    q = quantize(jnp.asarray(rng.normal(size=(256, 24)), jnp.float32), spec)
    x = jnp.asarray(rng.normal(size=(6, 256)) + 0.5, jnp.float32)
    settings = {"tiles": Tiles(64, 64, 2), "interpret": mosaic_gpu.InterpretGPUParams()}
    act = ActQuant(ActSpec(8, act_group))
    one, two = (
        GPU_GROUPS.run(x, w, act, "integer", **settings) for w in (q, readied(q, with_sums=True))
    )
    return bool(np.isfinite(one).all() and np.array_equal(one, two))


def main():
    found = {
        f"{name}, {act_group}": is_equal(spec, act_group)
        for name, spec in SPECS.items()
        for act_group in ACT_GROUPS
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
