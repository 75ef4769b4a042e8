"""Memory: weights stay packed inside the sampling loop, and streaming holds one layer at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

TEMPORARIES = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from qdit_jax import Recipe, ddim, quantize_params
from qdit_jax.models import build_model
from qdit_jax.sampling import denoiser
from qdit_jax.sampling.generation import _generated
config = dict(input_size=8, hidden_size=512, depth=4, num_heads=8, num_classes=9)
model = build_model("dit", config).clone(numerics=sys.argv[1])
params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
full = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
recipe = Recipe.preset("w4a8", params).with_part("adaln", "w4a8")
packed = jax.eval_shape(lambda p: quantize_params(p, recipe=recipe), params)
held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(packed))
compiled = _generated.lower(
    denoiser(model, packed, 1.5), ddim(4), jax.random.key(0),
    jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32), (8, 8, 4),
).compile()
memory = compiled.memory_analysis()
print(json.dumps({"full": full, "held": held, "temporaries": memory.temp_size_in_bytes}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["simulated", "integer"])
def test_weights_stay_packed_in_the_sampling_loop(numerics):
    run = subprocess.run(
        [sys.executable, "-c", TEMPORARIES, numerics],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["held"] < 0.2 * found["full"]
    # Without any flag: one layer in float32 at most (adaLN, 512 x 3072), not the network.
    assert found["temporaries"] < 0.12 * found["full"], found


STREAMED = """
import sys
import numpy as np, jax
from qdit_jax.checkpoint import Checkpoint, save
from qdit_jax.models import build_model
from qdit_jax.cli import main
what, folder, depth = sys.argv[1:]
if what == "make":
    model = build_model("dit", dict(hidden_size=1024, depth=int(depth), num_heads=16))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    rng = np.random.default_rng(0)
    save(folder + "/full", Checkpoint(model, jax.tree.map(
        lambda s: rng.standard_normal(s.shape, np.float32), shapes)))
else:
    options = ["--recipe", "w4a16", "--layers", what, "--force", "--method", "rtn"]
    assert main(["quantize", folder + "/full", folder + "/out", *options]) == 0
    # Not getrusage: its peak is that of the process that started this one, where that is greater.
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(int(status["VmHWM"].split()[0]) * 1024)
"""
KERNELS = r".*(qkv|proj|fc1|fc2|adaLN_modulation)"


def peaks_of_quantizing(folder, depth):
    """Returns the peak memory of quantizing every kernel, and of quantizing few of a random DiT."""

    def run(what):
        done = subprocess.run(
            [sys.executable, "-c", STREAMED, what, str(folder), str(depth)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    folder.mkdir()
    run("make")
    return [int(run(what).splitlines()[-1]) for what in (KERNELS, r"blocks_\d+/attn/proj")]


@pytest.mark.slow
def test_quantizing_needs_the_memory_of_its_largest_layer_however_deep_the_network(tmp_path):
    shallow = peaks_of_quantizing(tmp_path / "shallow", 2)
    deep = peaks_of_quantizing(tmp_path / "deep", 10)
    # Eight blocks more: 85 MB of codes and scales, or 570 MB where most layers are left as they are.
    for before, after in zip(shallow, deep, strict=True):
        assert after - before < 35e6, (shallow, deep)
    # 280 MB of Python and JAX, 50 MB of programs, the largest layer twice (25 MB) while it is read.
    assert max(deep) < 450e6, deep
