"""Samples are those of one device, however the noise lies on a mesh of four."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
CODE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import qdit_jax as qdit
from qdit_jax.diffusion import dpm_solver_pp, guided_doubled, unipc
from tiny_models import tiny_checkpoint

assert len(jax.devices()) == 4
made = tiny_checkpoint()
path = sys.argv[1] + "/model"
qdit.save(path, made)
qdit.save(path + ".safetensors", made)
label = jnp.arange(8) % 5
noise = jax.random.normal(jax.random.key(0), (8, 4, 4, 4))
keys = jax.random.split(jax.random.key(1), 8)
flow_fn = jax.tree_util.Partial(lambda x, timestep, label: jnp.cos(3 * timestep[0]) - x)
for name in (path, path + ".safetensors"):
    loaded = qdit.load(name)
    plain = qdit.denoiser(loaded.model, loaded.params, guidance=None)
    guided = qdit.denoiser(loaded.model, loaded.params, guidance=1.5)
    scales = qdit.denoiser(loaded.model, loaded.params, guidance=jnp.linspace(1, 2, 8))
    doubled = guided_doubled(plain, 1.5)
    cases = [(fn, qdit.ddim(2)) for fn in (guided, plain, scales, doubled)]
    more = [(guided, qdit.ddpm(2)), (guided, dpm_solver_pp(3)), (flow_fn, unipc(3))]
    cases = [*cases, *more] if name == path else cases[:1]
    for fn, sampler in cases:
        expected = np.asarray(qdit.sample(fn, sampler, noise, label, keys))
        for kind in (AxisType.Explicit, AxisType.Auto):
            mesh = jax.make_mesh((4,), ("batch",), (kind,))
            split = NamedSharding(mesh, PartitionSpec("batch"))
            whole = [label] if fn is guided else []
            for given in [*whole, jax.device_put(label, split)]:
                out = qdit.sample(fn, sampler, jax.device_put(noise, split), given, keys)
                assert len(out.sharding.device_set) == 4
                np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * abs(expected).max())
print("equal")
"""


def test_sharded_noise_gives_the_samples_of_one_device(tmp_path):
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "equal"
