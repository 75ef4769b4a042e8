"""What modulates the inputs of a block's layers, and inverse folds into it.

DiT and Latte have a modulation in every block, which the family's folds reach. A PixArt's blocks share
`t_block`, and each adds rows of its own: a channel's scale passes through those too, if it is the same
in all blocks.

Dimensions: S timesteps, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from qdit_jax.methods import fold_inputs, producers
from qdit_jax.models import TimestepEmbedder, family_of

NUM_TIMESTEPS = 32
SHARED, TABLE = "t_block", "scale_shift_table"
ROWS = ("shift", "scale", "gate")  # of the attention, then of the MLP
BRANCHES = {"attn/qkv": 0, "mlp/fc1": 1}
Vectors = Mapping[str, np.ndarray]


def alike(model: Any) -> list[list[str]]:
    """Returns the layers that get outlier channels; those of one list get the same ones."""
    blocks = [f"blocks_{i}" for i in range(model.depth)]
    if family_of(model).name == "pixart":
        shared = [[f"{block}/{kind}" for block in blocks] for kind in BRANCHES]
        values = [[f"{b}/{kind}/proj"] for b in blocks for kind in ("attn", "cross_attn")]
        return shared + values
    return [[f"{b}/{kind}"] for b in blocks for kind in (*BRANCHES, "attn/proj")]


def last_timestep(model: Any) -> float:
    """Returns the timestep at one end, 0 being the other."""
    return 1.0 if model.prediction == "velocity" else 999.0


def time_embedding(model: Any, params: Any) -> Float[np.ndarray, "S D"]:
    """Returns what the modulation is computed from over the timesteps, for the mean class."""
    timestep = jnp.linspace(0, last_timestep(model), NUM_TIMESTEPS)
    embedder = TimestepEmbedder(model.hidden_size, getattr(model, "frequency_shift", 0))
    found = np.asarray(embedder.apply({"params": params["t_embedder"]}, timestep))
    table = params["y_embedder"].get("embedding_table")
    return found if table is None else found + np.asarray(table)[: model.num_classes].mean(0)


def input_size(model: Any, params: Any, paths: list[str]) -> Float[np.ndarray, "S D"]:
    """Returns the root mean square of layers' modulated inputs: the norm's is 1."""
    hidden = np.asarray(jax.nn.silu(time_embedding(model, params)))
    squares = [np.square(part) for path in paths for part in parts(model, params, path, hidden)]
    return np.sqrt(sum(squares) / len(paths)) + 1e-3


def parts(model: Any, params: Any, path: str, hidden: np.ndarray) -> list[np.ndarray]:
    """Returns the factor and the shift of a layer's input over the timesteps."""
    flat, family = flatten_dict(params, sep="/"), family_of(model)
    if family_of(model).name == "pixart":
        block, first = block_and_row(path)
        m = hidden @ flat[f"{SHARED}/kernel"] + flat[f"{SHARED}/bias"]
        rows = m.reshape(len(m), 6, -1) + np.asarray(flat[f"{block}/{TABLE}"])
        return [rows[:, first], rows[:, first + 1] + 1.0]
    found = []
    for made in producers(path, family, flat):
        m = hidden @ flat[f"{made.layer}/kernel"] + flat[f"{made.layer}/bias"]
        found.append(m[:, family.chunk(made.layer, made.output, m.shape)] + made.offset)
    return found


def loudness(model: Any, params: Any, path: str) -> Float[np.ndarray, " D"]:
    """Returns the mean square weight of every channel of v that an attention's output layer reads."""
    family = family_of(model)
    flat = flatten_dict(params, sep="/")
    (made,) = producers(path, family, flat)
    kernel = np.asarray(flat[f"{made.layer}/kernel"])
    return np.square(kernel).mean(0)[family.chunk(made.layer, made.output, kernel.shape)]


def fold_modulated(model: Any, params: Any, scale: Vectors, shift: Vectors) -> Any:
    """Returns params of the same function, where the named layers see `(x - shift) / scale`."""
    if family_of(model).name != "pixart":
        return fold_inputs(params, scale=scale, shift=shift)
    kinds = {kind: [path for path in scale if path.endswith(kind)] for kind in BRANCHES}
    shared = {path for paths in kinds.values() for path in paths}
    folded = fold_inputs(params, scale={k: v for k, v in scale.items() if k not in shared})
    flat = {k: np.asarray(v, np.float64) for k, v in flatten_dict(folded, sep="/").items()}
    for paths in kinds.values():
        fold_shared(flat, paths, scale, shift)
    return unflatten_dict({k: v.astype(np.float32) for k, v in flat.items()}, sep="/")


def fold_shared(
    flat: dict[str, np.ndarray], paths: list[str], scale: Vectors, shift: Vectors
) -> None:
    """Rewrites the shared modulation, every block's rows and the layers that read them, in `flat`.

    The input is `norm * (1 + m + row) + m' + row'`, m and m' shared: divided by the scale, the shared
    part is that of smaller columns, and the rest of other rows.
    """
    s = scale[paths[0]]
    width, (_, first) = s.size, block_and_row(paths[0])
    for name in ("kernel", "bias"):
        shared = flat[f"{SHARED}/{name}"].copy()
        for row in (first, first + 1):
            shared[..., row * width : (row + 1) * width] /= s
        flat[f"{SHARED}/{name}"] = shared
    for path in paths:
        assert np.array_equal(scale[path], s)
        table, kernel = f"{block_and_row(path)[0]}/{TABLE}", flat[f"{path}/kernel"]
        rows = flat[table].copy()
        rows[first] = (rows[first] - shift[path]) / s
        rows[first + 1] = (rows[first + 1] + 1) / s - 1
        flat[table] = rows
        flat[f"{path}/bias"] = flat[f"{path}/bias"] + shift[path] @ kernel
        flat[f"{path}/kernel"] = s[:, None] * kernel


def block_and_row(path: str) -> tuple[str, int]:
    """Returns the block of a layer, and the row of its table that shifts the layer's input."""
    block, _, kind = path.partition("/")
    return block, len(ROWS) * BRANCHES[kind]
