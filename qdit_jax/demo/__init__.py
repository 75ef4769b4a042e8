"""The demonstration: every stage, run on a packaged model."""

from qdit_jax.demo.captions import (
    ARTICLE,
    DIGITS,
    POSITIONS,
    ROWS,
    SIZES,
    TINTS,
    WORDS,
    all_captions,
    caption,
    embed_captions,
    mixed_captions,
)
from qdit_jax.demo.packaged import PACKAGED, Packaged
from qdit_jax.demo.run import DemoSettings, recipes, run_demo

__all__ = [
    "ARTICLE",
    "DIGITS",
    "PACKAGED",
    "POSITIONS",
    "ROWS",
    "SIZES",
    "TINTS",
    "WORDS",
    "DemoSettings",
    "Packaged",
    "all_captions",
    "caption",
    "embed_captions",
    "mixed_captions",
    "recipes",
    "run_demo",
]
