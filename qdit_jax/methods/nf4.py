"""NF4: weights as the 16 quantiles of a normal distribution times a scale per group."""

from __future__ import annotations

from qdit_jax.methods.method import Method
from qdit_jax.methods.rtn import apply

METHOD = Method(
    name="nf4",
    paper="QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314",
    idea="Stores each weight as one of 16 quantiles of a normal distribution times its group's scale; "
    "looks at no data.",
    runtime_cost="A table lookup per weight before the product.",
    hardware="Dots of float32 or bfloat16; no integer dot can take these weights.",
    apply=apply,
    settings={"group_size": 64, "weight_format": "nf4"},
)
