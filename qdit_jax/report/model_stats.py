"""Figures about a network's weights and activations that decide how it should be quantized.

Dimensions: S timesteps, K input channels, N output channels, G groups.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float

from qdit_jax.calibration import Stats
from qdit_jax.models import Family, family_of_params
from qdit_jax.quant import QTensor, dequantize, effective_group_size
from qdit_jax.recipes import layer_paths
from qdit_jax.types import Params

OUTLIER_FACTOR = 6.0  # times the median channel
NUM_LISTED = 8
GROUP_SIZE = 32  # of the ranges shown, where a layer is not quantized


class Place(NamedTuple):
    """Where a layer stands: its block, that block's number in the network, its path within it."""

    block: str
    number: int
    kind: str


def block_layers(params: Params) -> dict[str, Place]:
    """Returns the place of every linear layer that presets quantize, block by block.

    Empty for parameters that no family claims.
    """
    family = family_of_params(params)
    if family is None:
        return {}
    paths = [path for path in layer_paths(params) if family.part_of(path) == "blocks"]
    paths = sorted(paths, key=natural_order)
    names = [family.block_of(path) or path for path in paths]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return {
        path: Place(name, numbers[name], family.kind_of(path))
        for path, name in zip(paths, names, strict=True)
    }


def natural_order(path: str) -> list[int | str]:
    """Returns a sort key in which `blocks_2` comes before `blocks_10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def kernel_of(params: Params, path: str) -> Float[np.ndarray, "K N"]:
    """Returns the kernel of one layer in float32, unpacked if it is quantized."""
    leaf: Any = params
    for name in (*path.split("/"), "kernel"):
        leaf = leaf[name]
    values = dequantize(leaf) if isinstance(leaf, QTensor) else leaf
    return np.asarray(values, np.float32).reshape(-1, values.shape[-1])


def spread(values: Float[np.ndarray, " C"]) -> float:
    """Returns the standard deviation of channels' largest values over their mean: 0 if all equal."""
    return float(values.std() / max(float(values.mean()), 1e-12))


def weight_facts(params: Params, paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns each layer's largest absolute weight by input and by output channel, and spreads."""
    facts = {}
    for path in paths:
        size = np.abs(kernel_of(params, path))
        by_input, by_output = size.max(1), size.max(0)
        facts[path] = {
            "by_input": by_input,
            "by_output": by_output,
            "input_spread": spread(by_input),
            "output_spread": spread(by_output),
        }
    return facts


def channel_sizes(stats: Stats, path: str) -> Float[np.ndarray, "S K"]:
    """Returns the largest absolute input of a layer, by timestep and channel."""
    return np.maximum(np.abs(stats.low[path]), np.abs(stats.high[path]))


def activation_facts(stats: Stats, paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns each layer's outlier channels and how its range moves over the timesteps.

    A channel is an outlier if its largest value is more than `OUTLIER_FACTOR` times the median
    channel's. `drift` is the largest range of any timestep over the smallest.
    """
    facts = {}
    for path in paths:
        sizes = channel_sizes(stats, path)
        by_channel, by_timestep = sizes.max(0), sizes.max(1)
        ratio = by_channel / max(float(np.median(by_channel)), 1e-12)
        order = np.argsort(-ratio)
        outliers = [int(k) for k in order if ratio[k] > OUTLIER_FACTOR]
        facts[path] = {
            "by_channel": by_channel,
            "by_timestep": by_timestep,
            "median_by_timestep": np.median(sizes, axis=1),
            "num_channels": len(by_channel),
            "num_outliers": len(outliers),
            "outlier_channels": outliers[:NUM_LISTED],
            "largest_over_median": float(ratio[order[0]]),
            "spread": spread(by_channel),
            "drift": float(by_timestep.max() / max(float(by_timestep.min()), 1e-12)),
        }
    return facts


def group_ranges(w: Float[np.ndarray, "K N"], group_size: int) -> Float[np.ndarray, " R"]:
    """Returns the range of every group of `group_size` input channels (0: whole columns)."""
    starts = np.arange(0, len(w), group_size or len(w))
    low, high = (ends.reduceat(w, starts, axis=0) for ends in (np.minimum, np.maximum))
    return (high - low).ravel()


def shown_group_sizes(trees: Sequence[Params], paths: Iterable[str]) -> dict[str, int]:
    """Returns the group size in which each layer's ranges are shown.

    It is that of the first of the parameter trees that quantizes the layer, else `GROUP_SIZE`, and
    no more than the layer's channels.
    """
    flats = [flatten_dict(params, sep="/") for params in trees]
    sizes = {}
    for path in paths:
        leaves = [flat[f"{path}/kernel"] for flat in flats]
        found = [leaf.group_size for leaf in leaves if isinstance(leaf, QTensor)]
        channels = int(np.prod(leaves[0].shape[:-1]))
        sizes[path] = effective_group_size(channels, found[0] if found else GROUP_SIZE)
    return sizes


def group_text(sizes: Mapping[str, int]) -> str:
    """Returns the group sizes of the layers shown, in words."""
    found = sorted(set(sizes.values()))
    told = ", ".join(map(str, found[:-1])) + " or " if len(found) > 1 else ""
    return f"groups of {told}{found[-1]} input channels"


def weight_ranges(
    params: Params, paths: Iterable[str], group_sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Returns the ranges of all groups of each layer's weights."""
    return {path: group_ranges(kernel_of(params, path), group_sizes[path]) for path in paths}


def input_ranges(stats: Stats, paths: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns the ranges of each layer's input channels, over all timesteps."""
    return {path: (stats.high[path] - stats.low[path]).ravel() for path in paths}


def summary_of(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns facts as JSON's types, without the arrays by channel."""
    return {
        path: {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in entry.items()
            if name not in ("by_input", "by_output", "by_channel")
        }
        for path, entry in facts.items()
    }


def part_of(path: str, family: Family | None) -> str:
    """Returns the kind of layer a parameter belongs to, the same for all blocks."""
    layer = path.rpartition("/")[0]
    block = None if family is None else family.block_of(layer)
    return path.split("/")[0] if block is None else f"blocks/{layer.removeprefix(f'{block}/')}"
