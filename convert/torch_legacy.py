"""Reads the format that torch wrote before 1.6, through torch's own safe loader."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from qdit_convert.pickle_reader import Namespace
from qdit_convert.tensors import StoredTensor, bfloat16
from qdit_jax.errors import UserError


def read_torch_legacy(path: Path) -> Any:
    """Returns the object that was saved, like `read_torch_zip`; the whole file is in memory.

    Raises:
        UserError: if torch is not installed, or its safe loader refuses the file.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            "this is torch's format from before version 1.6, which only torch reads: install torch, "
            "or save the file anew with torch.save(torch.load(path), new_path)."
        ) from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"torch's safe loader refuses this file: {reason[:200]}") from None
    return _plain(loaded, torch)


def _plain(value: Any, torch: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _stored(value.detach(), torch)
    if isinstance(value, dict):
        return {key: _plain(item, torch) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item, torch) for item in value)
    if isinstance(value, argparse.Namespace):
        return Namespace(dict(vars(value)))
    return value


def _stored(tensor: Any, torch: Any) -> StoredTensor:
    if tensor.dtype == torch.bfloat16:
        read, dtype = (
            (lambda: tensor.contiguous().view(torch.int16).numpy().view(bfloat16())),
            bfloat16(),
        )
    else:
        dtype = tensor.new_empty(0).numpy().dtype
        read = tensor.numpy
    return StoredTensor(tuple(tensor.shape), np.dtype(dtype), read)
