"""Prints a digest of everything that the core computes; `test_modes.py` compares them.

Run as a program, because JAX reads its modes from the environment: `python modes.py OUT.npz`.
"""

from __future__ import annotations

import sys

import jax
import numpy as np

import qdit_jax as qdit
from qdit_jax import quant
from qdit_jax.kernels import quantized_matmul
from qdit_jax.metrics import precision_and_recall
from qdit_jax.quant import ActSpec, WeightSpec, formats, ranges
from qdit_jax.testing import realistic_dit

K, N = 48, 8
SPEC = WeightSpec(4, 16, scale_dtype="float16")


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns inputs `[40, K]`, a kernel `[K, N]` and the inputs' Hessian."""
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((40, K), (K, N)))
    return x, w, x.T @ x


def roundings() -> dict[str, object]:
    """Returns a kernel rounded in every way."""
    _, w, hessian = arrays()
    indefinite = hessian - 100 * np.eye(K, dtype=np.float32)
    return {
        "nearest": quant.quantize(w, SPEC),
        "mse": quant.quantize(w, WeightSpec(4, 16, True, ranges.mse(3))),
        "nvfp4": quant.quantize(w, WeightSpec(fmt=formats.nvfp4)),
        "mxfp8": quant.quantize(w, WeightSpec(fmt=formats.mxfp8)),
        "gptq": quant.gptq(w, hessian, SPEC),
        "gptq holdout": quant.gptq(w, hessian, SPEC, holdout=hessian),
        "gptq indefinite": quant.gptq(w, indefinite, SPEC),
        "qdit_release gptq": quant.qdit_release_gptq(w, hessian, WeightSpec(4, 16)),
        "adaround": quant.adaround(w, hessian, SPEC, settings=quant.AdaRoundSettings(num_steps=5)),
    }


def products() -> dict[str, object]:
    """Returns a product in both numerics, and what a search computes."""
    x, w, _ = arrays()
    found: dict[str, object] = {
        "traced weights": quant.fake_quantize_kernel_traced(w, SPEC, 1, (16, 48)),
        "traced inputs": quant.fake_quantize_traced(x, ActSpec(8, 16), 1, (16, 48)),
        "precision, recall": np.array(precision_and_recall(x, x + np.float32(0.1))),
    }
    acts = {
        "int8": ActSpec(8, 16),
        "shifted": ActSpec(8, 16, symmetric=True, unsigned=True, shift=0.2),
        "nvfp4": ActSpec(fmt=formats.nvfp4),
    }
    for name, act in acts.items():
        for numerics in ("simulated", "integer"):
            y = quantized_matmul(x, quant.quantize(w, SPEC), act, numerics=numerics)
            found[f"{name} {numerics}"] = y
    return found


def network() -> dict[str, object]:
    """Returns samples, calibration and a rounding of a whole small network."""
    from qdit_jax.calibration import collect_items
    from qdit_jax.ptq import round_params

    model, params = realistic_dit(0, hidden_size=32, depth=1, num_heads=2)
    checkpoint = qdit.Checkpoint(model, params)
    recipe = qdit.Recipe.preset("w4a8", params, group_size=32)
    quantized = qdit.Checkpoint(model, qdit.quantize_params(params, recipe=recipe))
    found: dict[str, object] = {}
    for name, sampler in (("ddim", qdit.ddim(steps=2)), ("ddpm", qdit.ddpm(steps=2))):
        found[f"sample {name}"] = qdit.generate(quantized, sampler, [1, 2], seed=3, batch_size=2)
    sampler = qdit.ddim(steps=2)
    stats = qdit.calibrate(checkpoint, jax.random.key(0), 2, sampler=sampler, num_tokens=4)
    found["stats"] = [stats.low, stats.high, stats.tokens]
    items = collect_items(checkpoint, jax.random.key(1), 4, sampler=sampler, batch_size=4)
    found["items"] = items
    found["rounded"] = round_params(model, params, items, recipe=recipe)
    return found


def main(out: str, parts: list[str]) -> None:
    found = {}
    for part in parts:
        for name, tree in globals()[part]().items():
            for i, leaf in enumerate(jax.tree.leaves(tree)):
                found[f"{name}, leaf {i}"] = np.asarray(leaf)
    np.savez(out, **found)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
