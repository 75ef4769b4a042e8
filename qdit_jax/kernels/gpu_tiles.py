"""How a product is cut into blocks for a GPU's shared memory and registers.

Which blocks are fastest is measured, by `experiments/accelerators/bench_accelerator.py`, and kept in
`gpu_tiles.json`, a row per device and shape. Shapes without a row get blocks by arithmetic: those that
leave the fewest multiprocessors idle.

Dimensions: M rows (tokens), K input channels, N output channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from qdit_jax.kernels.measured import Table, closest

RUN = 128  # input channels of a step of the pipeline, a run of `packing`
HALF = 64  # of them, which the low and the high codes of 4 bits have
SUB = 32  # of them, which have one step and one offset
COMPUTING = 2  # warpgroups that multiply, one below the other
MULTIPROCESSORS = 132  # of an H100 SXM
SHARED_MEMORY = 232448  # bytes that a block may have there
SPARE = 2048  # of them, for barriers and alignment
# What a block costs beside its rows, in rows: filling the pipeline, unpacking, storing. An estimate.
_OVERHEAD = 48
# Rows whose product takes as long as making 16-bit weights of codes, which goes on beside it: counted.
_UNPACKING = 80


@dataclasses.dataclass(frozen=True, order=True)
class Tiles:
    """A block of the result.

    Attributes:
        rows: of the block, which every warpgroup multiplies.
        columns: of each of the two warpgroups.
        steps: runs of input channels in flight.
    """

    rows: int = 128
    columns: int = 64
    steps: int = 4

    @property
    def block(self) -> int:
        """Columns of both warpgroups."""
        return COMPUTING * self.columns


# Those that compile without spilling registers and without waiting for each product of tensor cores.
CANDIDATES = tuple(
    Tiles(rows, columns, steps)
    for rows, columns in ((64, 64), (96, 64), (128, 64), (192, 64), (64, 128))
    for steps in (4, 6)
)

# In groups, the sums of a unit and their total share the registers: fewer rows.
GROUPED = tuple(Tiles(rows, 64, steps) for rows in (64, 96, 128) for steps in (4, 6))

# Of inputs in 16 bits, where weights become as wide in registers.
WIDE = tuple(
    Tiles(rows, columns, steps)
    for rows, columns in ((64, 64), (96, 64), (128, 64), (192, 64), (64, 128))
    for steps in (3, 4)
)
# Of FP8, where the sums of a run and their total share the registers.
FLOATS = tuple(
    Tiles(rows, columns, steps)
    for rows, columns in ((64, 64), (96, 64), (128, 64), (64, 128))
    for steps in (4, 6)
)
DEPTH = 4  # runs in flight that blocks by arithmetic have at most


@dataclasses.dataclass(frozen=True)
class Shape:
    """A product, as rows of the table know it."""

    rows: int
    channels: int
    width: int
    bits: int
    itemsize: int  # bytes of a number of the result
    unit: int = 0  # input channels that have one scale, where a kernel in groups cuts them; else 0
    x_bits: int = 8  # of a number of the inputs, as the kernel reads them
    elements: str = "integer"  # what tensor cores multiply: "integer" (or 16-bit floats), or "fp8"


def rounded_up(number: int, multiple: int) -> int:
    """Returns the least multiple that is not less than `number`."""
    return -(-number // multiple) * multiple


def shared_bytes(tiles: Tiles, shape: Shape) -> int:
    """Returns the shared memory of a block: runs in flight, and its part of the result."""
    run = (tiles.rows * shape.x_bits + tiles.block * shape.bits) * RUN // 8
    maps = 2 * tiles.block * (RUN // SUB) if shape.bits == 4 else 0
    if shape.unit and shape.x_bits == 16:
        maps = (RUN // shape.unit) * 12 * tiles.block
    elif shape.unit:  # scales and two pairs of corrections, at most
        maps = (RUN // shape.unit) * (12 * tiles.rows + 13 * tiles.block)
    return tiles.steps * (run + maps) + tiles.rows * tiles.block * shape.itemsize + SPARE


def usable(shape: Shape) -> tuple[Tiles, ...]:
    """Returns the blocks that a product may be cut into."""
    tried = CANDIDATES
    if shape.x_bits == 16:
        tried = WIDE
    elif shape.elements == "fp8":
        tried = FLOATS
    elif shape.unit:  # 128 rows in units of 32 would spill
        tried = tuple(tiles for tiles in GROUPED if tiles.rows < 128 or shape.unit > SUB)
    return tuple(tiles for tiles in tried if fits(tiles, shape))


def fits(tiles: Tiles, shape: Shape) -> bool:
    """Returns whether a block fits into shared memory."""
    return shared_bytes(tiles, shape) <= SHARED_MEMORY


def chosen_tiles(shape: Shape, allowed: Callable[[Tiles], bool] = lambda _: True) -> Tiles:
    """Returns the blocks of a product: measured ones on this device, else those by arithmetic.

    `allowed` says which blocks let the kernel compute what stands beside the product; where none do, any is taken.
    """

    def applies(row: Shape, tiles: Tiles) -> bool:
        alike = dataclasses.replace(row, rows=shape.rows, itemsize=shape.itemsize) == shape
        return alike and fits(tiles, shape) and allowed(tiles)

    found = closest(TABLE.rows(), shape.rows, lambda row: row.rows, applies)
    return found or tiles_by_arithmetic(shape, allowed)


def tiles_by_arithmetic(shape: Shape, allowed: Callable[[Tiles], bool] = lambda _: True) -> Tiles:
    """Returns the blocks with the least work of the busiest multiprocessor, of these the largest.

    Where some blocks divide the rows, only these: others need a copy of the result without its padding.
    """

    def work(tiles: Tiles) -> tuple[int, int]:
        blocks = -(-shape.rows // tiles.rows) * -(-shape.width // tiles.block)
        waves = -(-blocks // MULTIPROCESSORS)
        busy = max(tiles.rows, _UNPACKING) if shape.x_bits == 16 else tiles.rows
        cost = waves * (busy + _OVERHEAD) * tiles.block
        return cost, -tiles.rows * tiles.block

    tried = [tiles for tiles in usable(shape) if tiles.steps <= DEPTH]
    tried = [tiles for tiles in tried if allowed(tiles)] or tried
    deepest = {(tiles.rows, tiles.columns): tiles for tiles in sorted(tried)}
    fitting = list(deepest.values())
    whole = [tiles for tiles in fitting if shape.rows % tiles.rows == 0]
    return min(whole or fitting, key=work)


TABLE = Table("gpu_tiles.json", "gpu", Shape, Tiles)
