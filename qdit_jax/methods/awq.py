"""AWQ: weights of channels with large inputs are scaled up, so that they are rounded more finely."""

from __future__ import annotations

from qdit_jax.methods.choosing import ChooseTransforms
from qdit_jax.methods.data import spread_items
from qdit_jax.methods.method import Method
from qdit_jax.methods.rtn import apply
from qdit_jax.methods.scales import activation_aware
from qdit_jax.methods.static_ranges import static_ranges
from qdit_jax.quant import ranges

METHOD = Method(
    name="awq",
    paper="AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, "
    "arXiv:2306.00978",
    idea="Divides each input channel by a power of its mean absolute value, the power with the least "
    "output error on held-out inputs, and clips each group's weights to the range with the least "
    "squared error. Weights are rounded to nearest.",
    runtime_cost="None where a fold takes the scales; elsewhere (behind a GELU) one product per channel.",
    needs={"items": spread_items},
    prepare=(
        ChooseTransforms(activation_aware(tuple(i / 20 for i in range(1, 20)))),
        static_ranges,
    ),
    apply=apply,
    settings={"range_fn": ranges.mse()},
)
