"""The way back from this library's parameter tree to the published PyTorch names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file


def published_state_dict(params: Any, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Returns `{key: array}` in the authors' layout of DiT, Latte or PixArt.

    Linear weights are `[out, in]`, convolutions OIHW.
    """
    state = {}
    for path, leaf in flatten_dict(params, sep=".").items():
        array = np.asarray(leaf)
        name = re.sub(r"_(\d+)\b", r".\1", path)
        # A linear layer that follows SiLU in a `Sequential`.
        name = re.sub(r"\b(adaLN_modulation|t_block)\b", r"\1.1", name)
        name = name.replace("embedding_table", "embedding_table.weight")
        if name.endswith(".kernel"):
            name = name.removesuffix("kernel") + "weight"
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        state[name] = np.ascontiguousarray(array, dtype=dtype)
    return state


def write_published(path: Path, params: Any, dtype: Any = np.float16) -> None:
    """Writes a `.safetensors` in the authors' layout, beside and renamed: whole or not at all."""
    temporary = path.with_name(f"unfinished_{path.name}")
    save_file(published_state_dict(params, dtype=dtype), temporary)
    temporary.replace(path)
