"""Q-DiT as its paper describes it: groups, dynamic activations, a searched recipe, GPTQ."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from qdit_jax.methods.data import CalibrationData, spread_items
from qdit_jax.methods.fitting import fit_rounding
from qdit_jax.methods.method import Method
from qdit_jax.quant import gptq
from qdit_jax.recipes import LayerSpec


def note_one_size(specs: Mapping[str, LayerSpec]) -> str | None:
    """Returns a note if the recipe was not searched."""
    weights = [spec.weight for spec in specs.values() if spec.weight]
    if len({spec.group_size for spec in weights}) != 1:
        return None
    return (
        "note: all layers have one group size; the paper searches one for each layer: bring a "
        "recipe from `qdit search` (qdit.search)"
    )


def check(specs: Mapping[str, LayerSpec], data: CalibrationData) -> None:
    """Raises `ValueError` if a layer has whole-channel scales or a static activation quantizer."""
    remedy = "use a recipe with groups and dynamic activations, or method='gptq' (--method gptq)."
    for path, spec in specs.items():
        if spec.weight is not None and spec.weight.fmt is None and spec.weight.group_size == 0:
            raise ValueError(
                f"method 'qdit': {path} has group_size=0, one scale per channel; {remedy}"
            )
        if spec.act is not None and spec.act.mode != "dynamic":
            raise ValueError(f"method 'qdit': the input of {path} has mode='static'; {remedy}")


METHOD = Method(
    name="qdit",
    paper="Q-DiT: Accurate Post-Training Quantization for Diffusion Transformers, arXiv:2406.17343",
    idea="Gives each group of input channels a scale of its own, quantizes activations by the range "
    "of the sample at hand, takes each layer's group size from a search, and rounds by GPTQ.",
    runtime_cost="Minimum and maximum of every group of each token's channels, before each product.",
    needs={"items": spread_items},
    check=check,
    apply=partial(fit_rounding, round_fn=gptq, note_fn=note_one_size),
)
