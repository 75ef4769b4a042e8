"""RepQ-ViT: ranges per channel become one range per layer by an exact change of coordinates."""

from __future__ import annotations

import numpy as np
from flax import linen as nn

from qdit_jax.calibration import LayerInputs
from qdit_jax.methods.data import CalibrationData, spread_items
from qdit_jax.methods.input_transforms import Transform, places, transformed
from qdit_jax.methods.method import Method
from qdit_jax.methods.network_inputs import fitted_and_held_out, linear_specs
from qdit_jax.methods.report import Report
from qdit_jax.methods.rtn import apply
from qdit_jax.methods.static_ranges import PER_TENSOR, PER_TENSOR_HARDWARE, static_ranges
from qdit_jax.quant import ranges
from qdit_jax.recipes import Recipe
from qdit_jax.types import Params


def reparameterize(
    params: Params, *, model: nn.Module, recipe: Recipe, data: CalibrationData, report: Report
) -> tuple[Params, CalibrationData]:
    """Returns `params` whose foldable inputs have one range in all channels, and `data`.

    Those are the inputs whose shift folds as well: a range has two ends.
    """
    specs = {p: s for p, s in linear_specs(params, model, recipe).items() if s.act}
    folded = [p for p in places(params, specs) if p.folded and not p.scale_only]
    inputs = fitted_and_held_out(params, model, folded, data, report)
    for place in folded:
        act = specs[place.layers[0]].act
        assert act is not None
        transform = one_range(inputs[place.layers[0]][0], act.bits)
        params = transformed(params, place, transform)
    report.note(f"inputs have one range in all channels at {len(folded)} places")
    return params, data


def one_range(inputs: LayerInputs, bits: int) -> Transform:
    """Returns the transform after which every channel has the mean step and mean zero point.

    With a channel's step δ and zero point z, and their means δ̃ and z̃ over channels: scale is δ/δ̃
    and shift is `z̃ δ - z δ`, so that the code of a value is that of its channel's own quantizer.
    """
    low, high = np.minimum(inputs.low, 0), np.maximum(inputs.high, 0)
    step = np.maximum((high - low) / (2**bits - 1), 1e-8)
    zero = np.round(-low / step)
    return Transform(
        scale=(step / step.mean()).astype(np.float32),
        shift=((zero.mean() - zero) * step).astype(np.float32),
    )


METHOD = Method(
    name="repq_vit",
    paper="RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers, "
    "arXiv:2212.08254",
    idea="Gives each channel of an input its own range and folds the ranges into what produces it, so "
    "that one static range serves the layer. Weights have one scale per output channel and are "
    "rounded to nearest. The paper's logarithmic softmax is left out: attention is not quantized.",
    runtime_cost="None: static ranges are constants.",
    hardware=PER_TENSOR_HARDWARE.format(ranges="one static range per input"),
    needs={"items": spread_items},
    prepare=(reparameterize, static_ranges),
    apply=apply,
    settings={**PER_TENSOR, "act_range_fn": ranges.percentile(0.9999)},
)
