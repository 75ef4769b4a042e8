"""The way back from this library's parameter tree to the published PyTorch names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file


def facebook_state_dict(params: Any, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Returns `{key: array}` in the facebook DiT layout (linear `[out, in]`, convolution OIHW)."""
    state = {}
    for path, leaf in flatten_dict(params, sep=".").items():
        array = np.asarray(leaf)
        name = re.sub(r"_(\d+)\b", r".\1", path)
        name = name.replace("adaLN_modulation", "adaLN_modulation.1")
        name = name.replace("embedding_table", "embedding_table.weight")
        if name.endswith(".kernel"):
            name = name.removesuffix("kernel") + "weight"
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        state[name] = np.ascontiguousarray(array, dtype=dtype)
    return state


def write_facebook(path: Path, params: Any, dtype: Any = np.float16) -> None:
    """Writes a `.safetensors` in the facebook DiT layout, beside and renamed: whole or not at all."""
    temporary = path.with_name(f"unfinished_{path.name}")
    save_file(facebook_state_dict(params, dtype=dtype), temporary)
    temporary.replace(path)
