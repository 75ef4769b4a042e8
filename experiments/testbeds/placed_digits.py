"""Digits placed on a larger field: small ones somewhere, under a caption, or moving.

Dimensions: N digits, B batch, F frames, S side of a field (32, twice the picture's), V words, L rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from demo_data import read_digits
from einops import reduce
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from qdit_jax.demo import (
    ARTICLE,
    DIGITS,
    POSITIONS,
    ROWS,
    SIZES,
    TINTS,
    WORDS,
)

FIELD, SIDES = 32, (20, 28)  # of a small and of a large digit
ROOM = (FIELD - SIDES[0]) // 2  # how far a small one may go from the middle
TEXT_WIDTH = 32
# Of the small ones: rows and columns from the middle, in the order of `POSITIONS`.
OFFSETS = np.array([(0, 0), (0, -5), (0, 5), (-5, 0), (5, 0)])


def load_fields(path: str | None, sizes: Sequence[str] = SIZES) -> dict[str, np.ndarray]:
    """Returns `fields [N, sizes, S, S]` uint8, each with a digit in the middle, and `labels [N]`."""
    images, labels = read_digits(path)
    sides = [SIDES[SIZES.index(size)] for size in sizes]
    fields = np.zeros((len(images), len(sides), FIELD, FIELD), np.uint8)
    for image, field in zip(images, fields, strict=True):
        # The digits of MNIST lie in a box of 20 x 20 pixels with a margin of 4.
        digit = Image.fromarray(image[4:24, 4:24] if image.shape == (28, 28) else image)
        for side, place in zip(sides, field, strict=True):
            low = (FIELD - side) // 2
            scaled = digit.resize((side, side), Image.Resampling.BICUBIC)
            place[low : low + side, low : low + side] = np.asarray(scaled)
    return {"fields": fields, "labels": labels}


def load_captioned(path: str | None, model: object = None) -> dict[str, np.ndarray]:
    """Returns `load_fields`, and `words [V, E]`: the fixed vector of every word."""
    return load_fields(path) | {"words": make_words()}


def load_moving(path: str | None, model: object = None) -> dict[str, np.ndarray]:
    """Returns `load_fields` of small digits."""
    return load_fields(path, ["small"])


def make_words() -> Float[np.ndarray, "V E"]:
    """Returns a vector of independent normal values for every word, exact in half precision."""
    drawn = np.random.default_rng(0).standard_normal((len(WORDS), TEXT_WIDTH))
    return drawn.astype(np.float16).astype(np.float32)


def shrunk(fields: UInt8[Array, "*B S S"]) -> Float[Array, "*B H W 1"]:
    """Returns pictures in [-1, 1] of half the side: a move by one pixel of the field is half of one."""
    mean = reduce(fields.astype(jnp.float32), "... (h p) (w q) -> ... h w", "mean", p=2, q=2)
    return mean[..., None] / 127.5 - 1


def moved(fields: UInt8[Array, "B S S"], offsets: Int[Array, "B 2"]) -> UInt8[Array, "B S S"]:
    """Returns the fields with their digits moved by rows and columns."""
    return jax.vmap(lambda field, by: jnp.roll(field, by, (0, 1)))(fields, offsets)


def draw_captioned(
    data: dict[str, Array], key: Array, batch: int
) -> tuple[Float[Array, "B H W 1"], dict[str, Array]]:
    """Returns pictures and the embedded captions, each kind as likely; positions vary by a pixel."""
    keys = jax.random.split(key, 5)
    pick = jax.random.randint(keys[0], (batch,), 0, data["labels"].size)
    kind = jax.random.randint(keys[1], (batch,), -1, len(POSITIONS))  # -1 is a large one
    tint = jax.random.randint(keys[2], (batch,), 0, len(TINTS))
    jitter = jax.random.randint(keys[3], (batch, 2), -1, 2)
    small, position = kind >= 0, jnp.maximum(kind, 0)
    fields = data["fields"][pick, jnp.where(small, 0, 1)]
    pictures = tinted(shrunk(moved(fields, jnp.asarray(OFFSETS)[position] + jitter)), tint)
    ids = word_ids(data["labels"][pick], small, position, tint)
    mask = ids >= 0
    text = jnp.where(mask[..., None], data["words"][ids], 0.0)
    return pictures, {"text": text, "text_mask": mask}


def tinted(pictures: Float[Array, "B H W 1"], tint: Int[Array, " B"]) -> Float[Array, "B H W 1"]:
    """Returns the pictures white on black, dim, or black on white, by the number in `TINTS`."""
    factor, offset = jnp.array([1.0, 0.45, -1.0])[tint], jnp.array([0.0, -0.55, 0.0])[tint]
    return pictures * factor[:, None, None, None] + offset[:, None, None, None]


def word_ids(
    digit: Int[Array, " B"], small: Array, position: Int[Array, " B"], tint: Int[Array, " B"]
) -> Int[Array, "B L"]:
    """Returns the numbers of the caption's words in `WORDS`, -1 after the last."""
    number = {word: i for i, word in enumerate(WORDS)}

    def chosen(words: Sequence[str], which: Array) -> Array:
        return jnp.array([number.get(word, -1) for word in words])[which]

    columns = [
        jnp.full_like(digit, number[ARTICLE]),
        chosen(SIZES, jnp.where(small, 0, 1)),
        chosen(DIGITS, digit),
        chosen(POSITIONS, position),
        chosen(TINTS, tint),
    ]
    ids = jnp.stack(columns, axis=1)
    assert ids.shape[1] == ROWS
    return jnp.take_along_axis(ids, jnp.argsort(ids < 0, axis=1, stable=True), axis=1)


def draw_moving(
    data: dict[str, Array], key: Array, batch: int, num_frames: int = 8
) -> tuple[Float[Array, "B F H W 1"], Int[Array, " B"]]:
    """Returns videos of a digit that moves at a constant speed and bounces, and the digits."""
    keys = jax.random.split(key, 3)
    pick = jax.random.randint(keys[0], (batch,), 0, data["labels"].size)
    start = jax.random.randint(keys[1], (batch, 2), -ROOM, ROOM + 1)
    speed = jax.random.randint(keys[2], (batch, 2), -1, 2)
    way = start + speed * jnp.arange(num_frames)[:, None, None] + ROOM  # [F, B, 2]
    offsets = jnp.abs((way + 2 * ROOM) % (4 * ROOM) - 2 * ROOM) - ROOM
    fields = data["fields"][pick, 0]
    frames = jnp.stack([moved(fields, at) for at in offsets], axis=1)
    return shrunk(frames), data["labels"][pick]
