"""The fastest blocks of the kernels for GPUs, by shape, and the table that it reads them from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qdit_jax as qdit
from qdit_jax.files import replaced_file
from qdit_jax.kernels import Product, expected, gpu_tiles
from qdit_jax.quant import ActQuant
from qdit_jax.speed import Call, TimeFn, interleaved, recipe_named

Shape, Tiles = gpu_tiles.Shape, gpu_tiles.Tiles
TABLE = Path(gpu_tiles.__file__).parent / gpu_tiles.TABLE
# By bits, the input channels that have one scale, bits of the inputs, and elements: recipes.
RECIPES = {
    (4, 0, 8, "integer"): "w4a8-fast",
    (8, 0, 8, "integer"): "w8a8-fast",
    (4, 128, 8, "integer"): "w4a8-g128",
    (4, 128, 16, "integer"): "w4a16",
    (8, 0, 8, "fp8"): "fp8_e4m3",
}
ROUNDS = 7


def shapes_of(layers: Sequence[tuple[int, int]], row_counts: Sequence[int]) -> Iterator[Shape]:
    """Yields the products of a network's layers in bfloat16, those of the first row count first."""
    for rows in row_counts:
        for bits, *rest in RECIPES:
            for channels, width in layers:
                yield Shape(rows, channels, width, bits, 2, *rest)


def product_call(shape: Shape, tiles: Tiles) -> Callable[[], Any]:
    """Returns what computes a product with these blocks, its operands on the device already."""
    recipe = RECIPES[shape.bits, shape.unit, shape.x_bits, shape.elements]
    spec = recipe_named(recipe).rules[0].spec
    key = jax.random.key(0)
    x = jax.random.normal(key, (shape.rows, shape.channels), jnp.bfloat16)
    q = qdit.quantize(jax.random.normal(key, (shape.channels, shape.width)), spec.weight)
    act, numerics = spec.act and ActQuant(spec.act), "integer" if spec.act else "simulated"
    kernel = expected(Product(x.shape, q, act, numerics, "cuda", x.dtype.name))
    run = jax.jit(partial(kernel.run, act=act, numerics=numerics, tiles=tiles))
    return partial(run, x, q)


def swept(
    shape: Shape,
    *,
    call_fn: Callable[[Shape, Tiles], Callable[[], Any]] = product_call,
    time_fn: TimeFn = interleaved,
) -> dict[str, Any]:
    """Returns the row of a shape: its fastest blocks, and the microseconds of all."""
    usable = gpu_tiles.usable(shape)
    calls = [Call(str(tiles), call_fn(shape, tiles)) for tiles in usable]
    medians = 1e6 * np.median(time_fn(calls, ROUNDS), axis=1)
    best = usable[int(np.argmin(medians))]
    times = {call.name: round(float(us), 2) for call, us in zip(calls, medians, strict=True)}
    return {
        "shape": dataclasses.asdict(shape),
        "tiles": dataclasses.asdict(best),
        "microseconds": times,
    }


def keep(rows: Sequence[dict[str, Any]], device: str, made: dict[str, str], table: Path) -> None:
    """Adds rows to a table, in place of those of the same device and shape."""
    held = json.loads(table.read_text()) if table.exists() else {}
    new = [row["shape"] for row in rows]
    old = [row for row in held.get(device, []) if row["shape"] not in new]
    held[device] = [*old, *({**row, "made": made} for row in rows)]
    with replaced_file(table) as temporary:
        temporary.write_text(json.dumps(held, indent=1) + "\n")
    gpu_tiles.forget()
