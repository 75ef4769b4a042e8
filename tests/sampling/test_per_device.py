"""On eight devices each runs the program of one: the same samples, and kernels are not refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parent.parent
CODE = """
import sys
import jax, jax.numpy as jnp, numpy as np
import qdit_jax as qdit
from qdit_jax import sampling
from qdit_jax.evaluation.trajectories import Protocol, batch_sampler, compiled_trajectory
from qdit_jax.kernels import matmul
from qdit_jax.kernels.level_reasons import split_reason
from qdit_jax.sampling import generation
from qdit_jax.speed import bench
from qdit_jax.evaluation import verify
from tiny_models import tiny_checkpoint

count, folder = int(sys.argv[1]), sys.argv[2]
assert jax.device_count() == count
reasons, chosen = [], matmul.first_that_fits


def watched(product):
    reasons.append(split_reason(jax.default_backend()))
    return chosen(product)


matmul.first_that_fits = watched


def taken():
    found = set(reasons)
    reasons.clear()
    return found


full = tiny_checkpoint(depth=2)
recipe = qdit.Recipe.preset("w4a8", full.params, group_size=16)
made = qdit.Checkpoint(full.model, qdit.quantize_params(full.params, recipe=recipe), recipe)
labels, out = np.arange(11) % 5, {}
for name, settings in {
    "loop": {"hoist": False},
    "hoisted": {"hoist": True, "numerics": "integer"},
    "plain": {"hoist": True, "guidance": None},
    "scales": {"hoist": False, "guidance": np.linspace(1, 3, 8), "num_samples": 8},
}.items():
    compiled = generation._generated._cache_size()
    given = labels[: settings.get("num_samples", 11)]
    sampler = qdit.ddim(2, 1.0)
    out[name] = qdit.generate(made, sampler, given, batch_size=8, decode_fn=None, **settings)
    assert generation._generated._cache_size() == compiled + 1  # of two batches
    assert taken() == {None}, name

protocol = Protocol(qdit.ddim(2, 1.0), {}, 8, batch_size=8, num_probed=0)
draw = batch_sampler(made, protocol, sampling.device_mesh())
index = np.arange(8, dtype=np.int32)
first = draw(index, protocol.condition_of(made.model, index))
assert draw(index, protocol.condition_of(made.model, index)).compile_seconds == 0
out |= {"x": first.x, "final": first.final}
assert taken() == {None}

loop = qdit.denoiser(made.model, made.params)
noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
out["sampled"] = qdit.sample(loop, qdit.ddim(2), noise, jnp.arange(2))
assert taken() == {None}
found = verify(made, against=full, num_samples=2, steps=2)
out["final_db"] = found.final_db["estimate"]
assert taken() == {None}
bench(made, batches=(1,), num_rounds=2, numerics=("integer",))
assert taken() == {None}

# A program of the caller's own may have arguments on any devices.
jax.jit(loop)(noise, jnp.zeros(2), jnp.arange(2))
(reason,) = taken()
assert (reason is None) == (count == 1), reason
np.savez(folder + f"/{count}.npz", **out)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    for count in (1, 8):
        flags = f"--xla_force_host_platform_device_count={count}"
        flags += " --xla_backend_optimization_level=0"
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        path = [str(TESTS), str(TESTS.parent), env.get("PYTHONPATH", "")]
        env["PYTHONPATH"] = os.pathsep.join(path)
        command = [sys.executable, "-c", CODE, str(count), str(folder)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return [dict(np.load(folder / f"{count}.npz")) for count in (1, 8)]


@pytest.mark.slow
def test_eight_devices_give_the_samples_of_one_by_its_own_program(found):
    one, many = found
    assert one.keys() == many.keys()
    for name, expected in one.items():
        assert np.isfinite(expected).all()
        error = np.linalg.norm(many[name] - expected) / np.linalg.norm(expected)
        assert error < 1e-3, (name, error)  # products of other sizes may round an input otherwise
