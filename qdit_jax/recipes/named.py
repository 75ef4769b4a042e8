"""The table of presets by name: what each means, which method it is meant for, and its hardware format."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qdit_jax.models import asset

INT8_DOT = "One int8 dot over all input channels."
INT8_GROUPS = "An int8 dot per group of input channels."
DEFAULT_METHOD = "best"


@dataclasses.dataclass(frozen=True)
class NamedPreset:
    """One row of the table.

    Attributes:
        name: as `Recipe.preset` and `--recipe` take it.
        bits: the preset `w<bits>a<bits>` that it stands for.
        idea: when to take it, one sentence.
        hardware: the product that it makes of a layer, one sentence.
        method: the method that it was measured with and is meant for.
        settings: those of `Recipe.preset` that it gives.
    """

    name: str
    bits: str
    idea: str
    hardware: str
    method: str = DEFAULT_METHOD
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def block_format(fmt: str, bits: str, idea: str, hardware: str, **settings: Any) -> NamedPreset:
    """Returns a preset whose weights and inputs are of one number format, which GPTQ cannot round to."""
    both = {"weight_format": fmt, "act_format": fmt, **settings}
    return NamedPreset(fmt, bits, idea, hardware, "smoothquant", both)


ROWS = (
    NamedPreset("w8a8", "w8a8", "Hardly any loss; weights in groups of 128.", INT8_GROUPS),
    NamedPreset(
        "w8a8-fast",
        "w8a8-fast",
        "Hardly any loss in the product that 8-bit hardware runs fastest.",
        INT8_DOT,
    ),
    NamedPreset("w4a8", "w4a8", "Half the bytes of w8a8; weights in groups of 128.", INT8_GROUPS),
    NamedPreset(
        "w4a8-fast",
        "w4a8-fast",
        "Half the bytes of w8a8-fast in the same product: codes become int8 levels.",
        INT8_DOT,
    ),
    NamedPreset(
        "w4a8-best",
        "w4a8",
        "The closest of the 4-bit ones: groups of 32 on both sides.",
        INT8_GROUPS,
        settings={"group_size": 32},
    ),
    NamedPreset(
        "w4a8-all",
        "w4a8-all",
        "The smallest file: every layer and label table, the attention operands excepted.",
        INT8_GROUPS,
    ),
    NamedPreset(
        "w4a16", "w4a16", "Small weights, inputs untouched.", "Float dots after unpacking."
    ),
    NamedPreset(
        "lut4",
        "w4a8-fast",
        "A codebook of 16 values per kernel, for the same product as w4a8-fast.",
        INT8_DOT + " Codes are looked up.",
        "smoothquant",
        {"weight_format": "lut4", "group_size": 16},
    ),
    NamedPreset(
        "nf4",
        "w4a16",
        "Quantiles of a normal distribution, inputs untouched, as QLoRA stores weights.",
        "Float dots after a lookup.",
        "rtn",
        {"weight_format": "nf4", "group_size": 64},
    ),
    block_format(
        "nvfp4",
        "w4a4",
        "FP4 on both sides with an E4M3 scale per 16 channels.",
        "FP4 dots of Blackwell GPUs.",
    ),
    block_format(
        "mxfp4",
        "w4a4",
        "FP4 on both sides with a power of two per 32 channels (OCP MX).",
        "MXFP4 dots of Blackwell and MI350 GPUs.",
    ),
    block_format(
        "mxfp8",
        "w8a8",
        "FP8 on both sides with a power of two per 32 channels (OCP MX).",
        "MXFP8 dots of Blackwell and MI350 GPUs.",
    ),
    block_format(
        "fp8_e4m3",
        "w8a8",
        "FP8 on both sides, a scale per output channel and token.",
        "FP8 dots of Hopper and later GPUs, and of TPU v7.",
        group_size=0,
    ),
)
NAMED: Mapping[str, NamedPreset] = MappingProxyType({row.name: row for row in ROWS})


def measured_presets() -> dict[str, Any]:
    """Returns what `experiments/tables/measure_presets.py` found on the packaged model.

    Its keys are `rows` by the preset's name, `settings` and `made`.
    """
    found: dict[str, Any] = json.loads(asset("presets.json").read_text())
    return found
