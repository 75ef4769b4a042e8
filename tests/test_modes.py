"""The same bits in every mode of JAX: 64-bit types, strict promotion, NaN checks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax import quant
from qdit_jax.quant import ActSpec, WeightSpec, formats, ranges
from qdit_jax.sampling import initial_noise

MODES = {
    "x64": {"JAX_ENABLE_X64": "1"},
    "strict": {"JAX_NUMPY_DTYPE_PROMOTION": "strict"},
    "nans": {"JAX_DEBUG_NANS": "True"},
}
PROGRAM = Path(__file__).parent / "modes.py"


def results(out: Path, parts: tuple[str, ...], environment: dict[str, str]) -> dict:
    subprocess.run(
        [sys.executable, str(PROGRAM), str(out), *parts],
        env={**os.environ, **environment},
        check=True,
    )
    with np.load(out) as data:
        return dict(data)


@pytest.mark.slow
def test_every_mode_computes_the_same_bits(tmp_path):
    parts = ("roundings", "products", "network")
    plain = results(tmp_path / "plain.npz", parts, {})
    assert len(plain) > 40
    for mode, environment in MODES.items():
        found = results(tmp_path / f"{mode}.npz", parts, environment)
        assert found.keys() == plain.keys()
        for name, wanted in plain.items():
            assert found[name].dtype == wanted.dtype, (mode, name)
            if wanted.dtype.kind == "f" and "rounded" not in name:
                scale = np.abs(np.nan_to_num(wanted)).max()
                np.testing.assert_allclose(
                    found[name], wanted, rtol=1e-5, atol=1e-5 * scale, err_msg=f"{mode}: {name}"
                )
            elif "rounded" not in name:
                np.testing.assert_array_equal(found[name], wanted, err_msg=f"{mode}: {name}")


def computed() -> dict:
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((40, 16), (16, 4)))
    spec = WeightSpec(4, 8, scale_dtype="float16")
    noise, _ = initial_noise(jax.random.key(5), jnp.arange(2, dtype=jnp.int32), (4, 4, 2))
    return {
        "nearest": quant.quantize(w, spec),
        "mse": quant.quantize(w, WeightSpec(4, 8, range_fn=ranges.mse(2))),
        "nvfp4": quant.quantize(w, WeightSpec(fmt=formats.nvfp4)),
        "gptq": quant.gptq(w, x.T @ x, spec),
        "inputs": quant.fake_quantize(x, ActSpec(8, 8)),
        "noise": noise,
    }


def contexts() -> dict:
    return {
        "x64": lambda: jax.enable_x64(True),
        "strict": lambda: jax.numpy_dtype_promotion("strict"),
        "nans": lambda: jax.debug_nans(True),
    }


@pytest.mark.parametrize("mode", ["x64", "strict", "nans"])
def test_a_few_in_this_process(mode):
    plain = computed()
    with contexts()[mode]():
        found = computed()
    for name, tree in plain.items():
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(tree), strict=True):
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)
