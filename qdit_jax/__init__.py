"""Diffusion transformers in 4 to 8 bits in JAX.

`params -> quantize_params -> params`; the network is called the same way before and after.
A name is imported from its room when it is first used, so that `import qdit_jax` alone is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdit_convert import convert as convert
    from qdit_jax import quant as quant
    from qdit_jax.adapters import quantize_linen as quantize_linen
    from qdit_jax.adapters import quantize_nnx as quantize_nnx
    from qdit_jax.allocation import search as search
    from qdit_jax.calibration import Stats as Stats
    from qdit_jax.calibration import calibrate as calibrate
    from qdit_jax.calibration import collect_items as collect_items
    from qdit_jax.checkpoint import Checkpoint as Checkpoint
    from qdit_jax.checkpoint import load as load
    from qdit_jax.checkpoint import load_safetensors as load_safetensors
    from qdit_jax.checkpoint import save as save
    from qdit_jax.checkpoint import save_safetensors as save_safetensors
    from qdit_jax.checkpoint import with_dtype as with_dtype
    from qdit_jax.checkpoint import with_expanded_weights as with_expanded_weights
    from qdit_jax.diffusion import ddim as ddim
    from qdit_jax.diffusion import ddpm as ddpm
    from qdit_jax.diffusion import flow as flow
    from qdit_jax.diffusion import sample as sample
    from qdit_jax.errors import UserError as UserError
    from qdit_jax.evaluation import evaluate as evaluate
    from qdit_jax.evaluation import verify as verify
    from qdit_jax.kernels import quantized_matmul as quantized_matmul
    from qdit_jax.methods import CalibrationData as CalibrationData
    from qdit_jax.methods import quantize as quantize
    from qdit_jax.ptq import plan as plan
    from qdit_jax.ptq import quantize_checkpoint as quantize_checkpoint
    from qdit_jax.ptq import quantize_params as quantize_params
    from qdit_jax.ptq import round_params as round_params
    from qdit_jax.quant import ActSpec as ActSpec
    from qdit_jax.quant import QTensor as QTensor
    from qdit_jax.quant import WeightSpec as WeightSpec
    from qdit_jax.quant import dequantize as dequantize
    from qdit_jax.quant import quantize_array as quantize_array
    from qdit_jax.quant import ranges as ranges
    from qdit_jax.recipes import LayerSpec as LayerSpec
    from qdit_jax.recipes import Recipe as Recipe
    from qdit_jax.recipes import Rule as Rule
    from qdit_jax.sampling import denoiser as denoiser
    from qdit_jax.sampling import generate as generate
    from qdit_jax.sampling import read_conditions as read_conditions
    from qdit_jax.sampling import write_conditions as write_conditions
    from qdit_jax.speed import bench as bench

    __version__: str

SOURCE_VERSION = "0.1.0"  # of a tree that is not installed; installed, the tag's number counts

# Room -> the names that the package shows of it.
PUBLIC = {
    "adapters": ("quantize_linen", "quantize_nnx"),
    "allocation": ("search",),
    "calibration": ("Stats", "calibrate", "collect_items"),
    "checkpoint": (
        *("Checkpoint", "load", "load_safetensors", "save", "save_safetensors"),
        "with_dtype",
        "with_expanded_weights",
    ),
    "diffusion": ("ddim", "ddpm", "flow", "sample"),
    "errors": ("UserError",),
    "evaluation": ("evaluate", "verify"),
    "kernels": ("quantized_matmul",),
    "methods": ("CalibrationData", "quantize"),
    "ptq": ("plan", "quantize_checkpoint", "quantize_params", "round_params"),
    "quant": ("ActSpec", "QTensor", "WeightSpec", "dequantize", "quantize_array", "ranges"),
    "recipes": ("LayerSpec", "Recipe", "Rule"),
    "sampling": ("denoiser", "generate", "read_conditions", "write_conditions"),
    "speed": ("bench",),
}
ROOM_OF = {name: room for room, names in PUBLIC.items() for name in names}

__all__ = sorted(["convert", "quant", *ROOM_OF])


def __getattr__(name: str) -> Any:
    """Returns a public name, imported from its room now."""
    if name in ROOM_OF:
        value = getattr(import_module(f"qdit_jax.{ROOM_OF[name]}"), name)
        globals()[name] = value
        return value
    if name == "__version__":
        return installed_version()
    if name == "quant":
        return import_module("qdit_jax.quant")
    if name == "convert":  # the package of readers stands above this one
        return import_module("qdit_convert").convert
    raise AttributeError(f"module 'qdit_jax' has no attribute {name!r}")


def installed_version() -> str:
    """Returns the version of the installed package, else that of the source tree."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("qdit-jax")
    except PackageNotFoundError:
        return SOURCE_VERSION


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
