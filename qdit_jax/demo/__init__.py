"""The demonstration: every stage, run on a packaged model."""

from qdit_jax.demo.captions import all_captions, caption, embed_captions, mixed_captions
from qdit_jax.demo.packaged import PACKAGED, Packaged
from qdit_jax.demo.run import DemoSettings, run_demo

__all__ = [
    "PACKAGED",
    "DemoSettings",
    "Packaged",
    "all_captions",
    "caption",
    "embed_captions",
    "mixed_captions",
    "run_demo",
]
