"""Quantizes networks of other people's packages, and checks the result against rounding by hand.

    pip install --no-deps google-tunix flaxdiff     # in an environment that has qdit_jax
    python experiments/benchmarks/networks_of_others.py

NNX: the language models Llama 3 and Qwen 3 (experts included) and the SigLIP vision transformer of google-tunix.
Linen: the diffusion transformers SimpleDiT and SimpleMMDiT of flaxdiff. All small, with random weights. Their code
stays as it is. For each: how many layers of those that the recipe names were quantized and which were left and why;
the distance from the same network whose kernels were rounded and dequantized by hand (W4A16; float32 rounding only
is left), and the error at W4A8. A few minutes on 2 cores, compilation for the most part.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import qdit_jax as qdit
from qdit_jax.quant import dequantize, quantize
from qdit_jax.report import provenance

GROUP = 16
LANGUAGE = {
    "num_layers": 2,
    "vocab_size": 64,
    "embed_dim": 64,
    "hidden_dim": 128,
    "num_heads": 4,
    "head_dim": 16,
    "num_kv_heads": 2,
    "rope_theta": 10_000,
    "norm_eps": 1e-5,
}


def bare(package: str) -> None:
    """Lets modules of a package be imported without its `__init__`, which needs trainers and their packages."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit(f"{package} is not installed; see --help.")
    module = types.ModuleType(package)
    module.__path__ = list(spec.submodule_search_locations)
    sys.modules[package] = module


def language(name: str, kind: str, **more: Any) -> tuple[nnx.Module, tuple[Any, ...]]:
    """Returns a language model of tunix and what it is called with."""
    module = importlib.import_module(f"tunix.models.{name}.model")
    config = module.ModelConfig(**LANGUAGE, **more)
    model = getattr(module, kind)(config, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 64, (2, 12)))
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((12, 12), bool)), (2, 12, 12))
    return model, (tokens, positions, None, mask)


def vision() -> tuple[nnx.Module, tuple[Any, ...]]:
    """Returns the vision transformer of tunix's Gemma 3 and an image."""
    module = importlib.import_module("tunix.models.gemma3.vision")
    sizes = {"image_height": 28, "image_width": 28, "patch_size": (7, 7), "width": 48, "depth": 2}
    tokens = {"num_mm_tokens_per_image_prepool": 16, "num_mm_tokens_per_image": 4}
    config = module.SigLIPConfig(**sizes, **tokens, mlp_dim=96, num_heads=3)
    shardings = module.SigLIPShardingConfig.get_default_sharding()
    model = module.SigLiP(config, rngs=nnx.Rngs(0), shd_config=shardings)
    return model, (jnp.asarray(normal(1, 1, 28, 28, 3)),)


def dit(name: str, kind: str) -> tuple[Any, dict[str, Any], tuple[Any, ...]]:
    """Returns a diffusion transformer of flaxdiff, its variables, and what it is called with."""
    module = importlib.import_module(f"flaxdiff.models.{name}")
    model = getattr(module, kind)(patch_size=2, emb_features=48, num_layers=2, num_heads=3)
    given = jnp.asarray(normal(2, 8, 8, 3)), jnp.array([0.1, 0.7]), jnp.asarray(normal(2, 5, 32))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *given)["params"]
    rng = np.random.default_rng(3)
    draw = lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
    return model, {"params": jax.tree.map(draw, shapes)}, given


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def first(out: Any) -> np.ndarray:
    return np.asarray(jax.tree.leaves(out)[0], np.float64)


def decibels(exact: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10(np.square(exact).sum() / np.square(exact - found).sum()))


def recipe_of(bits: str) -> qdit.Recipe:
    return qdit.Recipe.preset(bits, layers=".*", group_size=GROUP, act_group_size=0)


def rounded(kernel: jax.Array, recipe: qdit.Recipe, name: str) -> jax.Array:
    """Returns a kernel `[K, N]` after rounding, in its own dtype."""
    spec = recipe.get(name)
    assert spec is not None
    assert spec.weight is not None
    return dequantize(quantize(kernel, spec.weight)).astype(kernel.dtype)


def nnx_row(made: tuple[nnx.Module, tuple[Any, ...]]) -> dict[str, Any]:
    """Quantizes an NNX network; returns what was quantized and how close the outputs are."""
    model, given = made
    rng = np.random.default_rng(3)  # tunix begins with zeros, for weights that are loaded
    for path, leaf in nnx.iter_graph(model):
        if isinstance(leaf, nnx.Param) and path[-1] not in ("scale", "bias"):
            leaf[...] = jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype)
    reports: list[Any] = []
    small = qdit.quantize_nnx(model, recipe_of("w4a16"), report_fn=reports.append)
    by_hand = nnx.clone(model)
    layers = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(by_hand)}
    for name in reports[0].quantized:
        kernel = layers[name].kernel
        kernel[...] = rounded(kernel[...], recipe_of("w4a16"), name)
    call = nnx.jit(lambda model: model(*given))
    exact, wanted, found = (first(call(m)) for m in (model, by_hand, small))
    both = qdit.quantize_nnx(model, recipe_of("w4a8"))
    return row(reports[0], exact, wanted, found, first(call(both)))


def linen_row(made: tuple[Any, dict[str, Any], tuple[Any, ...]]) -> dict[str, Any]:
    """Quantizes a linen network; returns what was quantized and how close the outputs are."""
    model, variables, given = made
    apply_fn, small = qdit.quantize_linen(model, variables, recipe_of("w4a16"), example_args=given)
    flat, packed = (flatten_dict(v["params"], sep="/") for v in (variables, small))
    for name in apply_fn.report.quantized:
        kernel = flat[f"{name}/kernel"]  # `[inputs..., outputs...]`
        wide = kernel.reshape(packed[f"{name}/kernel"].shape)
        flat[f"{name}/kernel"] = rounded(wide, recipe_of("w4a16"), name).reshape(kernel.shape)
    by_hand = {"params": unflatten_dict(flat, sep="/")}
    exact, wanted = (first(jax.jit(model.apply)(v, *given)) for v in (variables, by_hand))
    found = first(jax.jit(apply_fn)(small, *given))
    both_fn, both = qdit.quantize_linen(model, variables, recipe_of("w4a8"), example_args=given)
    return row(apply_fn.report, exact, wanted, found, first(jax.jit(both_fn)(both, *given)))


def row(report: Any, exact: Any, wanted: Any, found: Any, both: Any) -> dict[str, Any]:
    scale = np.abs(wanted).max()
    return {
        "quantized": len(report.quantized),
        "left": dict(report.left),
        "from_by_hand": float(np.abs(found - wanted).max() / scale),
        "w4a16_db": decibels(exact, found),
        "w4a8_db": decibels(exact, both),
    }


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "tunix Llama3 (NNX)": lambda: nnx_row(language("llama3", "Llama3")),
    "tunix Qwen3 (NNX)": lambda: nnx_row(language("qwen3", "Qwen3")),
    "tunix Qwen3 with experts (NNX)": lambda: nnx_row(
        language("qwen3", "Qwen3", num_experts=4, num_experts_per_tok=2)
    ),
    "tunix SigLIP (NNX)": lambda: nnx_row(vision()),
    "flaxdiff SimpleDiT (linen)": lambda: linen_row(dit("simple_dit", "SimpleDiT")),
    "flaxdiff SimpleMMDiT (linen)": lambda: linen_row(dit("simple_mmdit", "SimpleMMDiT")),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    parser.add_argument("--only", help="cases whose title contains this")
    args = parser.parse_args()
    bare("tunix")
    packages = {name: version(name) for name in ("google-tunix", "flaxdiff", "flax")}
    rows = {}
    print("| network | quantized | left | from rounding by hand | W4A16, dB | W4A8, dB |")
    print("|---|---|---|---|---|---|")
    for title, case in CASES.items():
        if args.only and args.only.lower() not in title.lower():
            continue
        found = rows[title] = case()
        kinds = sorted(set(found["left"].values()))
        left = f"{len(found['left'])}: {'; '.join(kinds)}" if kinds else "0"
        print(
            f"| {title} | {found['quantized']} | {left} | {found['from_by_hand']:.1e} | "
            f"{found['w4a16_db']:.1f} | {found['w4a8_db']:.1f} |",
            flush=True,
        )
    if args.out is not None:
        made = {"made": provenance(), "versions": packages, "group_size": GROUP, "rows": rows}
        args.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
