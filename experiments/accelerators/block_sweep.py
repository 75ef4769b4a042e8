"""The fastest blocks of the kernels for GPUs and TPUs, by shape, and the tables that they read them from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import qdit_jax as qdit
from qdit_jax.files import replaced_file
from qdit_jax.kernels import Product, expected, gpu_tiles, tpu_blocks
from qdit_jax.quant import ActQuant
from qdit_jax.speed import Call, TimeFn, interleaved, recipe_named

DTYPE = "bfloat16"  # of inputs and results
ROUNDS = 7


class Layer(NamedTuple):
    """A product of a network: its rows, input and output channels, how it is quantized, and a sample's tokens."""

    rows: int
    channels: int
    width: int
    recipe: str
    tokens: int

    @property
    def product(self) -> tuple[Any, ActQuant | None, str]:
        """Returns the spec of the weights, the quantizer of the inputs and the numerics."""
        spec = recipe_named(self.recipe).rules[0].spec
        return spec.weight, spec.act and ActQuant(spec.act), "integer" if spec.act else "simulated"


class Platform(NamedTuple):
    """Whose blocks are swept.

    Attributes:
        blocks: the module that chooses them, with its table.
        kernel: of the first recipe; where the device refuses it, nothing is swept.
        recipes: that have a kernel there, with what of a shape they determine.
        shapes_fn: returns the shapes of a layer, as rows of the table have them.
    """

    name: str
    blocks: Any
    kernel: str
    recipes: Mapping[str, Any]
    shapes_fn: Callable[[Layer, Any], list[Any]]

    @property
    def table(self) -> Path:
        """Returns the packaged table."""
        return Path(self.blocks.__file__).parent / self.blocks.TABLE.file

    def shapes(self, layer: Layer) -> list[Any]:
        """Returns the shapes of a layer."""
        return self.shapes_fn(layer, self.recipes[layer.recipe])


def gpu_shapes(layer: Layer, more: tuple[int, int, int, str]) -> list[gpu_tiles.Shape]:
    """Returns a shape; `more` are bits, input channels of a scale, bits of the inputs, elements."""
    bits, *rest = more
    return [gpu_tiles.Shape(*layer[:3], bits, jnp.dtype(DTYPE).itemsize, *rest)]


def tpu_sizes(layer: Layer, sizes_fn: Callable[..., tpu_blocks.Sizes]) -> list[tpu_blocks.Sizes]:
    """Returns the sizes of a product, by the function of its kernel: alone, and where a block lies in one sample."""
    weight = jax.ShapeDtypeStruct((layer.channels, layer.width), jnp.float32)
    q = jax.eval_shape(lambda w: qdit.quantize(w, layer.product[0]), weight)
    sizes = sizes_fn((layer.rows, layer.channels), q, jnp.dtype(DTYPE).itemsize)
    return [sizes, dataclasses.replace(sizes, tokens_per_sample=layer.tokens)]


GPU = Platform(
    *("cuda", gpu_tiles, "gpu_levels"),
    {
        "w4a8-fast": (4, 0, 8, "integer"),
        "w8a8-fast": (8, 0, 8, "integer"),
        "w4a8-g128": (4, 128, 8, "integer"),
        "w4a16": (4, 128, 16, "integer"),
        "fp8_e4m3": (8, 0, 8, "fp8"),
    },
    gpu_shapes,
)
TPU = Platform(
    *("tpu", tpu_blocks, "tpu_levels"),
    {
        "w4a8-fast": tpu_blocks.sizes_of,
        "w8a8-fast": tpu_blocks.sizes_of,
        "w4a8-g128": partial(tpu_blocks.groups_sizes, spec=qdit.ActSpec(8, 128)),
        "w4a16": tpu_blocks.weights_sizes,
    },
    tpu_sizes,
)


def layers_of(
    platform: Platform, sizes: Sequence[tuple[int, int]], inputs: Sequence[int], tokens: int
) -> Iterator[Layer]:
    """Yields the products of a network's layers, input and output channels, by each recipe, the first inputs first.

    `inputs` counts those of the network in a step, of so many tokens each.
    """
    for count in inputs:
        for recipe in platform.recipes:
            for channels, width in sizes:
                yield Layer(count * tokens, channels, width, recipe, tokens)


def product_call(platform: Platform, layer: Layer, tiles: Any) -> Callable[[], Any]:
    """Returns what computes a product with these blocks, its operands on the device already."""
    weight, act, numerics = layer.product
    key = jax.random.key(0)
    x = jax.random.normal(key, (layer.rows, layer.channels), DTYPE)
    q = qdit.quantize(jax.random.normal(key, (layer.channels, layer.width)), weight)
    kernel = expected(Product(x.shape, q, act, numerics, platform.name, x.dtype.name))
    run = jax.jit(partial(kernel.run, act=act, numerics=numerics, tiles=tiles))
    return partial(run, x, q)


def swept(
    platform: Platform,
    layer: Layer,
    *,
    call_fn: Callable[[Platform, Layer, Any], Callable[[], Any]] = product_call,
    time_fn: TimeFn = interleaved,
) -> list[dict[str, Any]]:
    """Returns a row for each shape of a layer that can be cut: its fastest blocks, and the microseconds of all.

    Every block is timed once, in the product alone, whichever shapes may have it.
    """
    usable = {shape: platform.blocks.usable(shape) for shape in platform.shapes(layer)}
    tried = list(dict.fromkeys(tiles for found in usable.values() for tiles in found))
    calls = [Call(str(tiles), call_fn(platform, layer, tiles)) for tiles in tried]
    medians = 1e6 * np.median(time_fn(calls, ROUNDS), axis=1)
    times = dict(zip(tried, medians.tolist(), strict=True))
    return [
        {
            "layer": layer._asdict(),
            "shape": dataclasses.asdict(shape),
            "tiles": dataclasses.asdict(min(found, key=times.__getitem__)),
            "microseconds": {str(tiles): round(times[tiles], 2) for tiles in found},
        }
        for shape, found in usable.items()
        if found
    ]


def keep(
    platform: Platform,
    rows: Sequence[dict[str, Any]],
    device: str,
    made: dict[str, str],
    table: Path,
) -> None:
    """Adds rows to a table, in place of those of the same device and shape."""
    held = json.loads(table.read_text()) if table.exists() else {}
    new = [row["shape"] for row in rows]
    old = [row for row in held.get(device, []) if row["shape"] not in new]
    held[device] = [*old, *({**row, "made": made} for row in rows)]
    with replaced_file(table) as temporary:
        temporary.write_text(json.dumps(held, indent=1) + "\n")
    platform.blocks.TABLE.forget()
