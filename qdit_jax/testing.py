"""A random DiT whose weights and activations are as hard to quantize as a trained one's.

For tests and benchmarks: plain Gaussian weights have no outliers, so that every method looks good
on them. It has, at least as strongly as `tests/test_testing.py` requires:

- outlier channels at the inputs of qkv and fc1, through adaLN: the top channel's largest value is
  20 times the median channel's or more; milder ones (3 times) at the inputs of proj and fc2;
- temporal drift: over the timesteps the largest value of about half of those channels changes by 3
  times or more;
- weights that spread over input channels 3 times more than over output channels, with heavy
  tails (kurtosis above 5; a normal has 3);
- a null class whose modulation differs from that of the classes;
- inputs of fc2 (after GELU) that are skewed: a few large positive values above many near zero.

Dimensions: S timesteps, D width, K input channels, N output channels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qdit_jax.models import DiT, sincos_positions, timestep_features

SMALL = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 128,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 10,
}
OUTLIER_SHARE = 0.03
OUTLIER_FACTORS = (25.0, 45.0)
NUM_TIMESTEPS = 24


class Condition(NamedTuple):
    """Directions of `silu(condition)`, `[D]`, along which modulation is steered.

    `time @ (silu(c) - mean)` runs from -1 to 1 over the timesteps; `null @ (silu(c) - mean)` is
    about 1 for the null class and 0 on average for the others.
    """

    mean: np.ndarray
    time: np.ndarray
    null: np.ndarray


def realistic_dit(seed: int = 0, **config: Any) -> tuple[DiT, dict[str, Any]]:
    """Returns a DiT and its params (NumPy, float32): the same for the same seed and config.

    `config` are fields of `DiT`; the defaults are a small model: 16 tokens, width 128, depth 2, 4
    heads, 10 classes. Takes about 20 ms for that size, and 0.1 microseconds per further value.
    """
    model = DiT(**{**SMALL, **config})
    rng = np.random.default_rng(seed)
    d, p = model.hidden_size, model.patch_size
    size = model.input_size
    grid = (size, size) if isinstance(size, int) else tuple(size)
    channels = model.in_channels * (2 if model.learn_sigma else 1)
    params = condition_params(rng, model)
    condition = condition_directions(params, model)
    positions = sincos_positions(d, (grid[0] // p, grid[1] // p))
    embed = normal(rng, (p, p, model.in_channels, d), 1 / math.sqrt(p * p * model.in_channels))
    params |= {
        "pos_embed": positions[None],
        "x_embedder": {"proj": {"kernel": embed, "bias": normal(rng, (d,), 0.1)}},
        "final_layer": {
            "adaLN_modulation": linear(rng, d, 2 * d, 0.3),
            "linear": linear(rng, d, p * p * channels, 1.0),
        },
    }
    for i in range(model.depth):
        params[f"blocks_{i}"] = block_params(rng, model, condition)
    return model, params


def condition_params(rng: np.random.Generator, model: DiT) -> dict[str, Any]:
    """Returns the embedders of timestep and label; the null class stands apart."""
    d = model.hidden_size
    table = normal(rng, (model.num_classes + int(model.null_class), d), 0.3)
    if model.null_class:
        table[-1] += normal(rng, (d,), 0.6)
    first = linear(rng, 256, d, 1.5)
    first["kernel"] *= slow_features(1.0 if model.velocity else 1000.0)[:, None]
    times = {"mlp_0": first, "mlp_2": linear(rng, d, d, 2.0)}
    return {"t_embedder": times, "y_embedder": {"embedding_table": table}}


def slow_features(span: float) -> Float[np.ndarray, " F"]:
    """Returns weights of the timestep features that favor about one oscillation over `span`.

    A trained model follows the noise level, which is slow; fast features would only add noise.
    """
    phase = span * 10_000 ** (-np.arange(128) / 128)
    weights = np.tile(np.where((phase > 0.3) & (phase < 6), 1, 0.15), 2).astype(np.float32)
    return weights / np.sqrt(np.square(weights).mean())


def condition_directions(params: dict[str, Any], model: DiT) -> Condition:
    """Returns the directions in which `silu(condition)` follows time and the null class."""
    timestep = np.linspace(0, 1 if model.velocity else 999, NUM_TIMESTEPS, dtype=np.float32)
    shift = model.frequency_shift
    features = np.asarray(timestep_features(jnp.asarray(timestep), frequency_shift=shift))
    first, second = (params["t_embedder"][name] for name in ("mlp_0", "mlp_2"))
    hidden = silu(features @ first["kernel"] + first["bias"])
    times = hidden @ second["kernel"] + second["bias"]  # [S, D]
    table = params["y_embedder"]["embedding_table"]
    seen = silu(times + table[: model.num_classes].mean(0))
    mean = seen.mean(0)
    time = np.linalg.svd(seen - mean, full_matrices=False)[2][0]
    along = (seen - mean) @ time
    time *= 2 / np.ptp(along)
    mean += time * (along.max() + along.min()) / np.ptp(along) / (time @ time)
    null = (silu(times + table[-1]) - seen).mean(0)
    null -= time * (null @ time) / (time @ time)
    return Condition(mean, time, null / np.maximum(null @ null, 1e-6))


def block_params(
    rng: np.random.Generator, model: DiT, condition: Condition
) -> dict[str, dict[str, Any]]:
    """Returns a block whose adaLN makes outlier channels and whose weights partly undo them."""
    d, hidden = model.hidden_size, int(model.hidden_size * model.mlp_ratio)
    sizes = [channel_sizes(rng, d) for _ in range(2)]
    qkv, fc1 = (
        linear(rng, d, n, 1.0, sizes=s) for n, s in zip((3 * d, hidden), sizes, strict=True)
    )
    qkv["kernel"][:, 2 * d :] *= mild_outliers(rng, d)
    # Mostly closed gates, some wide open: the skew and the large channels that GELU shows.
    fc1["bias"] = normal(rng, (hidden,), 0.5) - np.float32(0.7)
    fc1["bias"][pick(rng, hidden)] += np.float32(8.0)
    parts = []
    for channels in sizes:
        parts += [shift_rows(rng, channels, condition), scale_rows(rng, channels, condition)]
        parts.append(gate_rows(rng, d, condition))
    kernels, biases = zip(*parts, strict=True)
    return {
        "adaLN_modulation": {
            "kernel": np.concatenate(kernels, axis=1),
            "bias": np.concatenate(biases),
        },
        "attn": {"qkv": qkv, "proj": linear(rng, d, d, 1.0)},
        "mlp": {"fc1": fc1, "fc2": linear(rng, hidden, d, 1.0)},
    }


def channel_sizes(rng: np.random.Generator, width: int) -> Float[np.ndarray, " D"]:
    """Returns how large each channel of a modulated input is: lognormal, with a few outliers."""
    sizes = 0.7 * np.exp(normal(rng, (width,), 0.25))
    chosen = pick(rng, width)
    sizes[chosen] = 0.7 * rng.uniform(*OUTLIER_FACTORS, chosen.size)
    sizes[chosen[0]] = 0.7 * OUTLIER_FACTORS[1]
    return sizes.astype(np.float32)


def scale_rows(
    rng: np.random.Generator, sizes: Float[np.ndarray, " D"], condition: Condition
) -> tuple[np.ndarray, np.ndarray]:
    """Returns adaLN's kernel and bias of the scale: `1 + scale` is `sizes`, swinging with time."""
    swing = rng.choice([-1, 1], sizes.size) * rng.uniform(0.5, 0.85, sizes.size)
    swing[sizes > 10] = rng.uniform(0.3, 0.6, (sizes > 10).sum())
    kernel, offset = steered(rng, swing, normal(rng, sizes.shape, 0.4), condition)
    return kernel * sizes, sizes * (1 + offset) - 1


def shift_rows(
    rng: np.random.Generator, sizes: Float[np.ndarray, " D"], condition: Condition
) -> tuple[np.ndarray, np.ndarray]:
    """Returns adaLN's kernel and bias of the shift, some of it larger in the outlier channels."""
    swing, null = normal(rng, sizes.shape, 0.3), normal(rng, sizes.shape, 0.2)
    kernel, offset = steered(rng, swing, null, condition)
    reach = np.sqrt(sizes / 0.7)
    return kernel * reach, (offset + normal(rng, sizes.shape, 0.4)) * reach


def gate_rows(
    rng: np.random.Generator, width: int, condition: Condition
) -> tuple[np.ndarray, np.ndarray]:
    """Returns adaLN's kernel and bias of the gate: about 0.3 per channel, of either sign."""
    kernel, offset = steered(
        rng, normal(rng, (width,), 0.15), normal(rng, (width,), 0.05), condition
    )
    return kernel, offset + normal(rng, (width,), 0.3)


def steered(
    rng: np.random.Generator, swing: np.ndarray, null: np.ndarray, condition: Condition
) -> tuple[Float[np.ndarray, "D N"], Float[np.ndarray, " N"]]:
    """Returns kernel and bias that give 0 on average, `±swing` over time, `null` for the null class."""
    kernel = np.outer(condition.time, swing) + np.outer(condition.null, null)
    kernel = (kernel + normal(rng, kernel.shape, 0.1 / math.sqrt(len(kernel)))).astype(np.float32)
    return kernel, -(condition.mean @ kernel)


def linear(
    rng: np.random.Generator,
    num_inputs: int,
    num_outputs: int,
    gain: float,
    *,
    sizes: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Returns a kernel `[K, N]` with heavy tails and uneven input channels, and a small bias.

    `sizes` are those of the input channels: large ones get small weights, but not in full, so that
    an outlier channel matters 3 times as much as others.
    """
    z = normal(rng, (num_inputs, num_outputs), 1.0)
    kernel = z * (1 + 0.1 * z * z) * np.float32(gain / math.sqrt(1.75 * num_inputs))
    rows = np.exp(normal(rng, (num_inputs,), 0.5) - np.float32(0.25))
    if sizes is not None:
        rows = np.where(sizes > 10, 3 / sizes, rows)
    columns = np.exp(normal(rng, (num_outputs,), 0.1))
    kernel *= rows[:, None].astype(np.float32) * columns
    return {"kernel": kernel, "bias": normal(rng, (num_outputs,), 0.1)}


def mild_outliers(rng: np.random.Generator, width: int) -> Float[np.ndarray, " D"]:
    factors = np.ones(width, np.float32)
    factors[pick(rng, width)] = 6.0
    return factors


def pick(rng: np.random.Generator, width: int) -> np.ndarray:
    """Returns the indices of the outlier channels, two at least."""
    return rng.choice(width, max(2, round(OUTLIER_SHARE * width)), replace=False)


def normal(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(deviation)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))
