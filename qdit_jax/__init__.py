"""Diffusion transformers in 4 to 8 bits in JAX.

`params -> quantize_params -> params`; the network is called the same way before and after.
"""

from qdit_jax import quant
from qdit_jax.calibration import calibrate
from qdit_jax.calibration_items import collect_items
from qdit_jax.checkpoint import Checkpoint, load, save
from qdit_jax.diffusion import ddim, ddpm, flow, sample
from qdit_jax.errors import UserError
from qdit_jax.export import load_safetensors, save_safetensors
from qdit_jax.kernels import quantized_matmul
from qdit_jax.linen import quantize_linen
from qdit_jax.ptq import LayerSpec, Recipe, Rule, Stats, plan, quantize_params
from qdit_jax.quant import ActSpec, QTensor, WeightSpec, dequantize, quantize, ranges
from qdit_jax.rounding import round_params
from qdit_jax.sampling import denoiser, generate
from qdit_jax.searching import search
from qdit_jax.streaming import quantize_checkpoint

__version__ = "0.1.0"

__all__ = [
    "ActSpec",
    "Checkpoint",
    "LayerSpec",
    "QTensor",
    "Recipe",
    "Rule",
    "Stats",
    "UserError",
    "WeightSpec",
    "calibrate",
    "collect_items",
    "ddim",
    "ddpm",
    "denoiser",
    "dequantize",
    "flow",
    "generate",
    "load",
    "load_safetensors",
    "plan",
    "quant",
    "quantize",
    "quantize_checkpoint",
    "quantize_linen",
    "quantize_params",
    "quantized_matmul",
    "ranges",
    "round_params",
    "sample",
    "save",
    "save_safetensors",
    "search",
]
