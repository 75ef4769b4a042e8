"""How a product is cut into blocks that fit into a TPU's vector memory (VMEM).

The kernels of `tpu_levels`, `tpu_groups` and `tpu_weights` run over panels of output channels, blocks of rows, and blocks of output
channels. A panel's unpacked weights stay in VMEM while all rows pass; usually one panel is all of them.

Which blocks are fastest is measured, by `experiments/accelerators/bench_accelerator.py`, and kept in
`tpu_blocks.json`, a row per device and product (of none yet: nothing has run on a TPU). Products without a row get
blocks by arithmetic, see `blocks_by_arithmetic`.

Dimensions: M rows, K input channels, N output channels, all padded; G groups along K.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from qdit_jax.kernels.measured import Table, closest
from qdit_jax.kernels.units import unit_of
from qdit_jax.quant import ActSpec, QTensor, WeightSpec, num_groups, packing

TILE = 128  # lanes: channels are padded to multiples
STRIP = 32  # rows of an int8 tile
_SUBLANES = 8  # rows of a float32 tile
VMEM_LIMIT = 48 << 20  # bytes; a core of v5p has 64 MiB, of v5e and v6e 128
_SPARE = 4 << 20  # for what the compiler keeps there itself
_ROWS = (512, 256, 128)  # of a block, the most first
_LEAST_ROWS = 128  # of a block that has to lie in one sample
_COLUMNS = (4, 3, 2, 1)  # tiles of a block


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product is cut.

    Attributes:
        rows: of a block, a multiple of 32.
        columns: of a block, a multiple of 128 that divides the padded output channels.
        panels: of whole blocks of columns.
    """

    rows: int
    columns: int
    panels: int = 1


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The grid of a product.

    Attributes:
        rows, columns: of a block.
        num_rows: blocks of rows.
        panels: of output channels, whose weights are unpacked at a time.
        panel: blocks of columns of a panel.
    """

    rows: int
    columns: int
    num_rows: int
    panels: int
    panel: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """(panels, blocks of rows, blocks of columns of a panel)."""
        return self.panels, self.num_rows, self.panel


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the bytes of a block depend on.

    Attributes:
        num_rows, num_channels, width: M, K, N, not padded.
        bits: of the packed codes.
        num_groups: G.
        itemsize: bytes of a number of the input.
        unpacked: bytes of a weight once it is unpacked; 1 where the rows are quantized too.
        map_bytes: of what makes a weight of a code, per group and output channel.
        units: scales that a token has, where it has several, see `units`; else 0.
        result_itemsize: bytes of a number of the result; by default the most.
        channel_rows: rows of float32 that the input's channels are scaled and moved with.
        added_itemsize: bytes of a number of what the result is added to, or 0.
        tokens_per_sample: which have one modulation, then a block has rows of one sample; else 0.
    """

    num_rows: int
    num_channels: int
    width: int
    bits: int
    num_groups: int
    itemsize: int
    unpacked: int = 1
    map_bytes: int = 2
    units: int = 0
    result_itemsize: int = 4
    channel_rows: int = 0
    added_itemsize: int = 0
    tokens_per_sample: int = 0

    @property
    def channels(self) -> int:
        """K, padded to whole tiles."""
        return rounded_up(self.num_channels, TILE)

    @property
    def code_channels(self) -> int:
        """K with which each plane of bits has whole tiles of bytes, see `packing`."""
        return rounded_up(self.channels, STRIP * 8 // min(packing.planes(self.bits)))

    @property
    def column_tiles(self) -> int:
        """N in tiles."""
        return rounded_up(self.width, TILE) // TILE


def sizes_of(x_shape: tuple[int, ...], weight: QTensor | WeightSpec, itemsize: int) -> Sizes:
    """Returns the sizes of a product; N is not known of a `WeightSpec` and taken to be a tile."""
    num_channels = x_shape[-1]
    width = weight.shape[1] if isinstance(weight, QTensor) else TILE
    count = num_groups(num_channels, weight.group_size)
    num_rows = math.prod(x_shape[:-1])
    return Sizes(num_rows, num_channels, width, weight.bits, count, itemsize)


def weights_sizes(
    x_shape: tuple[int, ...], weight: QTensor | WeightSpec, itemsize: int = 2
) -> Sizes:
    """Returns the sizes of a product of `tpu_weights`: bfloat16, and three maps in float32."""
    return dataclasses.replace(sizes_of(x_shape, weight, itemsize), unpacked=2, map_bytes=12)


def groups_sizes(
    x_shape: tuple[int, ...], weight: QTensor | WeightSpec, itemsize: int, spec: ActSpec | None
) -> Sizes:
    """Returns the sizes of a product of `tpu_groups`, where a token has a scale for every unit of K."""
    sizes = sizes_of(x_shape, weight, itemsize)
    size = 0 if spec is None else spec.group_size
    unit = unit_of(sizes.num_channels, size, weight.group_size)
    return dataclasses.replace(sizes, map_bytes=1, units=sizes.channels // unit)


def rounded_up(number: int, multiple: int) -> int:
    """Returns the least multiple that is not less than `number`."""
    return -(-number // multiple) * multiple


def vmem_bytes(sizes: Sizes, blocks: Blocks) -> int:
    """Returns the VMEM that a product needs: what is held, two blocks of what is streamed, sums."""
    rows, columns, channels = blocks.rows, blocks.columns, sizes.channels
    groups = rounded_up(sizes.num_groups, STRIP)
    packed = packing.packed_bytes(sizes.code_channels, sizes.bits)
    streamed = rows * channels * sizes.itemsize
    streamed += rows * columns * (sizes.result_itemsize + sizes.added_itemsize)
    streamed += 4 * _SUBLANES * (sizes.channel_rows * channels + columns)  # and a gate
    streamed += (packed + sizes.map_bytes * groups + 2 * 4 * 8) * columns
    held = blocks.panel * channels * columns * sizes.unpacked + packed * columns
    if sizes.unpacked == 1:
        held += rows * channels + 4 * rows * TILE  # the rows' codes and scales
    sums = 2 * 4 * rows * columns  # int32 and float32
    if sizes.added_itemsize:
        sums += 4 * rows * columns
    if sizes.units:  # zero points of rows, sums of weights, scales of both; sums are added up
        units = rounded_up(sizes.units, STRIP)
        held += 4 * (2 * rows * rounded_up(sizes.units, TILE) + units * columns * blocks.panel)
        streamed += 4 * units * columns
        sums += 4 * rows * columns
    return 2 * streamed + held + sums + _SPARE


def chosen_blocks(sizes: Sizes) -> Blocks | None:
    """Returns the blocks of a product: measured ones on this device, else those by arithmetic; None if none fit.

    Measured are products alone: with what stands around it, a product takes their blocks where these fit. A row
    that has the tokens of a sample says which of the blocks that divide them are fastest, and is read where they must.
    """

    def applies(row: Sizes, tiles: Tiles) -> bool:
        is_whole = sizes.tokens_per_sample > 0 or row.tokens_per_sample == 0
        return is_whole and alone(row) == alone(sizes) and misfit(tiles, sizes) is None

    found = closest(TABLE.rows(), sizes.num_rows, lambda row: row.num_rows, applies)
    return blocks_by_arithmetic(sizes) if found is None else blocks_of(found, sizes)


def alone(sizes: Sizes) -> Sizes:
    """Returns the sizes without rows and without what stands around a product: what a row of the table says."""
    around = {"result_itemsize": 4, "channel_rows": 0, "added_itemsize": 0, "tokens_per_sample": 0}
    return dataclasses.replace(sizes, num_rows=0, **around)


def blocks_by_arithmetic(sizes: Sizes) -> Blocks | None:
    """Returns the blocks with the fewest panels that fit, and of these the largest; None if none do.

    Narrower blocks of columns are tried where even one such block is too much.
    """
    for columns, panels in cuts(sizes):
        for rows, _ in row_blocks(sizes):
            tiles = Tiles(rows, columns, panels)
            if misfit(tiles, sizes) is None:
                return blocks_of(tiles, sizes)
    return None


def usable(sizes: Sizes) -> tuple[Tiles, ...]:
    """Returns how a product may be cut: each number of rows and columns in the fewest panels that fit.

    More panels would read and quantize the inputs once more. The choice by arithmetic is among them.
    """
    found: dict[tuple[int, int], Tiles] = {}
    for columns, panels in cuts(sizes):
        for rows, _ in row_blocks(sizes):
            tiles = Tiles(rows, columns, panels)
            if (rows, columns) not in found and misfit(tiles, sizes) is None:
                found[rows, columns] = tiles
    return tuple(found.values())


def cuts(sizes: Sizes) -> Iterator[tuple[int, int]]:
    """Yields columns of a block and panels, the widest blocks first, of each the fewest panels."""
    tiles = sizes.column_tiles
    for columns in (count for count in _COLUMNS if tiles % count == 0):
        whole = tiles // columns  # blocks of columns
        yield from ((columns * TILE, n) for n in range(1, whole + 1) if whole % n == 0)


def misfit(tiles: Tiles, sizes: Sizes) -> str | None:
    """Returns why a product cannot be cut so, or None if it can."""
    rows, columns, panels = tiles.rows, tiles.columns, tiles.panels
    if rows < STRIP or rows % STRIP:
        return f"rows={rows} are no multiple of {STRIP}."
    if sizes.tokens_per_sample % rows:
        return f"rows={rows} do not divide the {sizes.tokens_per_sample} tokens of a sample."
    if columns < TILE or columns % TILE or sizes.column_tiles % (columns // TILE):
        return f"columns={columns} are no tiles of {TILE} that divide the {sizes.column_tiles}."
    if panels < 1 or sizes.column_tiles * TILE // columns % panels:
        return f"panels={panels} do not divide the blocks of {columns} columns."
    if (needed := vmem_bytes(sizes, blocks_of(tiles, sizes))) > VMEM_LIMIT:
        return f"they need {needed / 2**20:.1f} MiB of VMEM, more than {VMEM_LIMIT >> 20}."
    return None


def blocks_of(tiles: Tiles, sizes: Sizes) -> Blocks:
    """Returns the grid of a product that is cut so."""
    panel = sizes.column_tiles * TILE // tiles.columns // tiles.panels
    num_rows = -(-sizes.num_rows // tiles.rows)
    return Blocks(tiles.rows, tiles.columns, num_rows, tiles.panels, panel)


def row_blocks(sizes: Sizes) -> Iterator[tuple[int, int]]:
    """Yields rows of a block and how many blocks there are, the largest first.

    Where a sample has a modulation, as many strips of rows as divide its tokens; none, if those are few.
    """
    for most in _ROWS:
        if not sizes.tokens_per_sample:
            num_rows = -(-sizes.num_rows // most)
            yield rounded_up(-(-sizes.num_rows // num_rows), STRIP), num_rows
            continue
        fitting = [
            rows
            for rows in range(_LEAST_ROWS, most + 1, STRIP)
            if sizes.tokens_per_sample % rows == 0
        ]
        if fitting:
            yield fitting[-1], sizes.num_rows // fitting[-1]


TABLE = Table("tpu_blocks.json", "tpu", Sizes, Tiles)
