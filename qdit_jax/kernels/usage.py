"""Which implementation computes which layers of a network, for reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from qdit_jax.kernels.matmul import implementation_of
from qdit_jax.kernels.product import layer_numerics
from qdit_jax.quant import ActQuant, QTensor, kernel_of_other
from qdit_jax.types import Params


def implementations_used(
    params: Params,
    numerics: str = "simulated",
    *,
    dtype: str,
    platform: str | None = None,
    rows: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Returns how many quantized kernels of a network each implementation computes, by name.

    Empty for a network in full precision. Arrays may be abstract; each kernel of a stack counts.

    Args:
        dtype: that the network computes in, see `checkpoint.dtype_of`.
        platform: one of `PLATFORMS`, by default JAX's.
        rows: how many rows each layer is given, by path (`models.rows_per_sample` times the batch);
            1 where it is not named.

    Raises:
        ValueError: if a product cannot run with these numerics, or they are integer and no layer
            quantizes its input.
    """
    found: Counter[str] = Counter()
    layers = list(quantized_layers(params))
    acts = [act for _, _, act in layers]
    for path, kernel, act in layers:
        shape = ((rows or {}).get(path, 1), kernel.shape[0])
        # Without scales: an unpicked table would be refused, and its rows make no difference here.
        settings = None if act is None else ActQuant(act.spec)
        own = layer_numerics(act, numerics, acts)
        name = implementation_of(shape, kernel, settings, own, platform, dtype=dtype)
        found[name] += math.prod(kernel.scale.shape[:-2])
    return dict(found)


def quantized_layers(
    params: object, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, QTensor, ActQuant | None]]:
    """Yields path, kernel and activation quantizer of every layer with a quantized kernel.

    A kernel of other bits at some timesteps counts by itself, under the layer's path.
    """
    if not isinstance(params, Mapping):
        return
    for name, kernel in params.items():
        is_kernel = name == "kernel" or kernel_of_other(name) is not None
        if is_kernel and isinstance(kernel, QTensor):
            yield "/".join(path), kernel, params.get("act_quant")
    for name, entry in params.items():
        yield from quantized_layers(entry, (*path, str(name)))
