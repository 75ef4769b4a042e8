"""Refuses parameters that hold NaN or infinity, by the names of their layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from qdit_jax.checkpoint import DeferredArray
from qdit_jax.quant import GREATEST_WEIGHT, check_finite
from qdit_jax.types import Params


def check_finite_params(params: Params, quantized: Container[str]) -> None:
    """Raises `ValueError` for the first array in memory that is not finite; it names the leaf.

    Args:
        quantized: paths of layers that are to be quantized, whose kernels may not be too large either.
    """
    for name, leaf in flatten_dict(params, sep="/").items():
        if hasattr(leaf, "dtype"):
            path = name.removesuffix("/kernel")  # errors name a layer by its path
            check_finite(path, leaf, GREATEST_WEIGHT if path in quantized else math.inf)


def finite_where_kept(params: Params, written: Params) -> dict[str, Any]:
    """Returns `written`, after a check of the leaves unchanged from `params` for NaN and infinity.

    Arrays that are still on disk are checked when they are read.

    Raises:
        ValueError: if one in memory is not finite; it names the leaf.
    """
    flat, kept = dict(flatten_dict(written, sep="/")), flatten_dict(params, sep="/")
    for name, leaf in flat.items():
        if leaf is not kept.get(name) or not hasattr(leaf, "dtype"):
            continue
        called = name.removesuffix("/kernel")  # errors name a layer by its path
        if isinstance(leaf, DeferredArray):
            flat[name] = checked_when_read(called, leaf)
        else:
            check_finite(called, leaf)
    return unflatten_dict(flat, sep="/")


def checked_when_read(name: str, leaf: DeferredArray) -> DeferredArray:
    """Returns a lazy array that is checked for NaN and infinity when it is read, by `name`."""

    def make() -> dict[str, Any]:
        array = leaf.make()[leaf.name]
        check_finite(name, array)
        return {leaf.name: array}

    return dataclasses.replace(leaf, make=make)
