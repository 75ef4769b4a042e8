"""What makes a checkpoint hard to quantize, measured on its weights and on its layers' inputs.

Dimensions: S timesteps, K input channels, N output channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from safetensors import safe_open

import qdit_jax as qdit
from qdit_jax.calibration import conditional_and_null, trajectory
from qdit_jax.demo import embed_captions, mixed_captions
from qdit_jax.models import Linear
from qdit_jax.sampling import cyclic_conditions, denoiser

KINDS = {"qkv": "attn/qkv", "proj": "attn/proj", "fc1": "mlp/fc1", "fc2": "mlp/fc2"}
CONDITIONAL, NULL = 0, 1


class Property(NamedTuple):
    """A measured figure and what it must reach; `least` None is for the record only."""

    name: str
    value: float
    least: float | None
    note: str = ""

    @property
    def passes(self) -> bool:
        return self.least is None or self.value >= self.least


def read_checkpoint(path: str | Path, num_heads: int | None = None) -> qdit.Checkpoint:
    """Returns the checkpoint in a folder of this library, or the one of PyTorch weights."""
    if (Path(path) / "model.json").is_file():
        return qdit.load(path)
    import qdit_convert

    with safe_open(path, "numpy") as file:
        of_text = "t_block.1.weight" in file.keys()  # noqa: SIM118
    scale = {"interpolation_scale": 1.0} if of_text else {}  # a PixArt of no published size
    return qdit_convert.convert(path, num_heads=num_heads, **scale)


def conditions_of(model: Any) -> Any:
    """Returns what the samples of a model are conditioned on: the captions of a text's; None for all classes."""
    return embed_captions(mixed_captions()) if model.all_conditions() is None else None


@partial(jax.jit, static_argnames="model")
def layer_measures(params: Any, x: Any, timestep: Any, label: Any, *, model: nn.Module) -> Any:
    """Returns by layer what one call shows of its input: see the names of the inner dict."""
    found: dict[str, dict[str, jax.Array]] = {}

    def record(next_fn, args, kwargs, context):
        if isinstance(context.module, Linear) and context.method_name == "__call__":
            value = args[0]
            rows = value.reshape(-1, value.shape[-1])
            centered = rows - rows.mean()
            tokens = jnp.abs(value).max(-1)  # [B, T] or [B]
            found["/".join(context.module.path)] = {
                "channel_max": jnp.abs(rows).max(0),
                "channel_rms": jnp.sqrt(jnp.square(rows).mean(0)),
                "token_rms": jnp.sqrt(jnp.square(rows).mean(1)),
                "token_ratio": (tokens.max(-1) / jnp.median(tokens, -1)).max(),
                "skewness": (centered**3).mean() / (jnp.square(centered).mean() ** 1.5 + 1e-12),
            }
        return next_fn(*args, **kwargs)

    with nn.intercept_methods(record):
        model.apply({"params": params}, x, timestep, label)
    return found


def collect(
    checkpoint: qdit.Checkpoint, sampler: Any, key: Any, num_samples: int, guidance: float
) -> dict[str, dict[str, np.ndarray]]:
    """Returns `{layer: {measure: [2, S, ...]}}`, conditional and null, over one batch's trajectory."""
    model, params = checkpoint.model, checkpoint.params
    halves = 2 if model.has_null else 1
    guided = denoiser(model, params, guidance if model.has_null else None)
    index = np.arange(num_samples)
    condition = cyclic_conditions(model, conditions_of(model), index)
    inputs, timesteps = trajectory(guided, sampler, model, key, index, condition)
    seen = [
        jax.device_get(layer_measures(params, x, jnp.full(len(x), at), label, model=model))
        for at, x in zip(np.asarray(timesteps).tolist(), inputs, strict=True)
        for label in conditional_and_null(model, params, condition).values()
    ]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *seen)
    return jax.tree.map(lambda a: np.moveaxis(a.reshape(-1, halves, *a.shape[1:]), 1, 0), stacked)


def measure(checkpoint: qdit.Checkpoint, seen: dict[str, dict[str, np.ndarray]]) -> list[Property]:
    """Returns every property of METHODS, from weights and from what `collect` returned."""
    flat = flatten_dict(checkpoint.params, sep="/")
    found: list[Property] = []
    for kind, suffix in KINDS.items():
        paths = [
            path for path in seen if path.startswith("blocks_") and path.endswith(f"/{suffix}")
        ]
        modulated = kind in ("qkv", "fc1")
        kernels = [np.asarray(flat[f"{path}/kernel"], np.float32) for path in paths]
        found += activation_properties(kind, [seen[path] for path in paths], modulated)
        found.append(
            Property(
                f"{kind}: weights, input spread / output spread",
                median(spread(rms(k, 1)) / spread(rms(k, 0)) for k in kernels),
                2.0 if modulated else None,
            )
        )
    return found


def activation_properties(
    kind: str, layers: list[dict[str, np.ndarray]], modulated: bool
) -> list[Property]:
    """Returns the properties of one kind of layer's inputs; `layers` holds one entry per block."""
    sizes = [layer["channel_max"] for layer in layers]  # [2, S, K]
    ratios = np.array([outlier_ratio(size) for size in sizes])
    listed = ", ".join(f"{r:.0f}" for r in ratios)
    found = [
        Property(
            f"{kind}: top channel / median channel",
            float(np.sort(ratios)[len(ratios) // 2]),
            20.0 if modulated else None,
            f"by block {listed}",
        ),
        Property(
            f"{kind}: share of channels that drift 3x over time",
            median(share_of_drifting(size) for size in sizes),
            0.25 if modulated else None,
        ),
        Property(
            f"{kind}: activations, channel spread / token spread",
            median(activation_spread(layer) for layer in layers),
            2.0 if modulated else None,
        ),
        Property(
            f"{kind}: top token / median token",
            max(float(layer["token_ratio"].max()) for layer in layers),
            2.0 if kind == "fc2" else None,
        ),
    ]
    if len(sizes[0]) > 1:
        share = median(share_of_null_differences(size) for size in sizes)
        least = 0.2 if modulated else None
        found.append(Property(f"{kind}: share of channels with another null range", share, least))
    if kind == "fc2":
        skewness = median(layer["skewness"][CONDITIONAL].mean() for layer in layers)
        found.append(Property("fc2: skewness after GELU", skewness, 2.0))
    return found


def outlier_ratio(size: np.ndarray) -> float:
    """Returns the largest absolute value of the top channel over that of the median one."""
    top = size.max((0, 1))
    return float(top.max() / np.median(top))


def share_of_drifting(size: np.ndarray, factor: float = 3.0) -> float:
    """Returns the share of channels whose largest value changes by `factor` over the timesteps."""
    drift = size[CONDITIONAL].max(0) / np.maximum(size[CONDITIONAL].min(0), 1e-9)
    return float((drift >= factor).mean())


def share_of_null_differences(size: np.ndarray, factor: float = 1.1) -> float:
    """Returns the share of channels whose range differs by `factor` for the null class, on average."""
    ratio = np.abs(np.log(size[NULL] / np.maximum(size[CONDITIONAL], 1e-9))).mean(0)
    return float((ratio >= np.log(factor)).mean())


def activation_spread(layer: dict[str, np.ndarray]) -> float:
    """Returns how much more activations spread over channels than over tokens."""
    channels = [spread(a) for a in layer["channel_rms"][CONDITIONAL]]
    tokens = [spread(a) for a in layer["token_rms"][CONDITIONAL]]
    return float(np.median(channels) / max(np.median(tokens), 1e-9))


def rms(kernel: np.ndarray, axis: int) -> np.ndarray:
    return np.sqrt(np.square(kernel).mean(axis))


def spread(sizes: np.ndarray) -> float:
    """Returns the standard deviation of the logarithm: 0.7 is about a factor of 2."""
    return float(np.log(np.maximum(sizes, 1e-9)).std())


def median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))
