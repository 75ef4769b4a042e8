"""SmoothQuant: the range of each input channel is shared out between input and kernel."""

from __future__ import annotations

from qdit_jax.methods.choosing import ChooseTransforms
from qdit_jax.methods.data import spread_items
from qdit_jax.methods.method import Method
from qdit_jax.methods.rtn import apply
from qdit_jax.methods.scales import ALPHAS, smoothing
from qdit_jax.methods.static_ranges import static_ranges

METHOD = Method(
    name="smoothquant",
    paper="SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, "
    "arXiv:2211.10438",
    idea="Divides each input channel by a scale between its own range and that of its weights, which "
    "are multiplied by it; each layer's exponents are those with the least output error on held-out "
    "inputs, or it stays as it is. Weights are rounded to nearest.",
    runtime_cost="None where a fold takes the scales; elsewhere (behind a GELU) one product per channel.",
    needs={"items": spread_items},
    prepare=(ChooseTransforms(smoothing(ALPHAS)), static_ranges),
    apply=apply,
)
