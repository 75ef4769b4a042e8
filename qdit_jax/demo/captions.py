"""Captions of the packaged text-to-image model, and the embeddings that it was trained with.

A caption names a digit, its size, and where they differ from the plain case its position and its
tint: "a large seven", "a small three, left, inverted". Every word is one fixed vector of the packaged
table, one row of text each.

Dimensions: B captions, L rows of text, E channels of text, V words.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import Float

from qdit_jax.models import asset

WORDS_FILE = "demo_words.npz"
SIZES = ("small", "large")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
POSITIONS = ("", "left", "right", "top", "bottom")  # of a small one; a large one has no room
TINTS = ("", "dim", "inverted")
ARTICLE = "a"
WORDS = (ARTICLE, *SIZES, *DIGITS, *POSITIONS[1:], *TINTS[1:])
ROWS = 5  # the words of the longest caption


def caption(digit: int, size: str = "large", position: str = "", tint: str = "") -> str:
    """Returns such as "a small seven, left, inverted"."""
    return ", ".join([f"{ARTICLE} {size} {DIGITS[digit]}", *filter(None, (position, tint))])


def all_captions() -> list[str]:
    """Returns every caption that the model was trained on, the digit changing fastest."""
    places = [("large", ""), *(("small", position) for position in POSITIONS)]
    kinds = itertools.product(TINTS, places, range(len(DIGITS)))
    return [caption(digit, size, position, tint) for tint, (size, position), digit in kinds]


def mixed_captions() -> list[str]:
    """Returns `all_captions` in an order whose first few are of every kind, ten of ten digits."""
    captions = all_captions()
    return [captions[37 * i % len(captions)] for i in range(len(captions))]


@functools.cache
def word_vectors() -> dict[str, Float[np.ndarray, " E"]]:
    """Returns the packaged vector of every word."""
    with resources.as_file(asset(WORDS_FILE)) as file, np.load(file) as table:
        vectors = table["vectors"].astype(np.float32)
        return dict(zip(table["words"].tolist(), vectors, strict=True))


def embed_captions(captions: Sequence[str]) -> dict[str, Any]:
    """Returns the condition of captions: `text [B, L, E]` and its mask, padded with zeros.

    Raises:
        ValueError: if there is no caption, or one is empty, too long or has an unknown word.
    """
    table = word_vectors()
    text = np.zeros((len(captions), ROWS, next(iter(table.values())).size), np.float32)
    mask = np.zeros((len(captions), ROWS), bool)
    for i, each in enumerate(captions):
        words = each.replace(",", " ").split()
        unknown = [word for word in words if word not in table]
        if unknown or not 0 < len(words) <= ROWS:
            wrong = f"has unknown words {unknown}" if unknown else f"has {len(words)} words"
            raise ValueError(
                f"caption {each!r} {wrong}; use 1 to {ROWS} words of {', '.join(table)}."
            )
        for row, word in enumerate(words):
            text[i, row], mask[i, row] = table[word], True
    if not len(captions):
        raise ValueError("there is no caption; give at least one.")
    return {"text": text, "text_mask": mask}
