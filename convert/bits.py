"""Rearrangements of bits and of tiles in which others store 4-bit codes and block scales.

Dimensions: N rows (output channels), K columns (input channels), G groups along K.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped, UInt8

ROWS, COLUMNS = 128, 4  # of a tile of block scales


def nibbles(packed: UInt8[np.ndarray, "N K2"], *, high_first: bool) -> UInt8[np.ndarray, "N K"]:
    """Returns the two codes of every byte, neighbors along K.

    Args:
        high_first: whether the code of the even column is in the high four bits.
    """
    halves = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    return np.stack(halves, axis=-1).reshape(len(packed), -1)


def packed_nibbles(codes: UInt8[np.ndarray, "N K"], *, high_first: bool) -> np.ndarray:
    """Returns codes of 4 bits, two in a byte, uint8 `[N, K / 2]`: what `nibbles` undoes."""
    even, odd = codes[:, ::2], codes[:, 1::2]
    high, low = (even, odd) if high_first else (odd, even)
    return (high << 4 | low).astype(np.uint8)


def tiled_shape(num_rows: int, num_columns: int) -> tuple[int, int]:
    """Returns the shape of a table of block scales in tiles: whole tiles of 128 rows, 4 columns."""
    return -(-num_rows // ROWS) * ROWS, -(-num_columns // COLUMNS) * COLUMNS


def in_tiles(table: Shaped[np.ndarray, "N G"]) -> np.ndarray:
    """Returns a table of block scales in the order in which NVIDIA's 4-bit products read them.

    Tiles of 128 rows and 4 columns, padded with zeros, one after another along the columns. Inside a
    tile, rows that are 32 apart lie together: row r, column c is at `16 * (r % 32) + 4 * (r // 32) + c`.
    """
    rows, columns = tiled_shape(*table.shape)
    padded = np.zeros((rows, columns), table.dtype)
    padded[: table.shape[0], : table.shape[1]] = table
    tiles = padded.reshape(rows // ROWS, 4, 32, columns // COLUMNS, COLUMNS)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(rows, columns)


def from_tiles(tiled: Shaped[np.ndarray, "..."], num_rows: int, num_columns: int) -> np.ndarray:
    """Returns the table `[num_rows, num_columns]` of which `in_tiles` made `tiled`."""
    rows, columns = tiled_shape(num_rows, num_columns)
    tiles = tiled.reshape(rows // ROWS, columns // COLUMNS, 32, 4, COLUMNS)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(rows, columns)[:num_rows, :num_columns]
